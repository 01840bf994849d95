"""Model backend ``HookedTransformer`` (transformer_lens)."""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, ModelError, hookimpl
from saekit.data.vocabulary import special_tokens
from saekit_plugins.backends.compiled_parts import CompiledParts
from saekit_plugins.backends.model_folders import EMBEDDED, instead, load_model, model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import ModelConfig, PretokenizeConfig, TrainConfig
    from saekit.values import Replacement

__all__ = ["EMBEDDED", "HookedTransformerOptions", "TransformerLensBackend"]


@attrs.frozen(kw_only=True)
class HookedTransformerOptions:
    """Any model that transformer_lens knows, a Hugging Face model folder, or a model passed from code."""

    from_pretrained_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to `HookedTransformer.from_pretrained`, such as `{center_writing_weights = false}`."""
    forward_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to every forward of the model."""


class TransformerLensBackend:
    """A ``HookedTransformer``, or anything else with its ``run_with_hooks`` and blocks.

    The model stays as it was: whether its parameters learn, and which of its modules are in training mode.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        d_vocab: int,
        n_ctx: int | None,
        forward_kwargs: Mapping[str, Any],
        autocast: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        self._compiled = None if compile_mode is None else CompiledParts(model, compile_mode)
        self.model, self._evaluating = model, _Evaluating(model)
        self.name, self.d_vocab, self.n_ctx = name, d_vocab, n_ctx
        self.device = str(next(model.parameters()).device)
        self._forward_kwargs, self._autocast = dict(forward_kwargs), autocast
        tokenizer = self.tokenizer = model.tokenizer
        if tokenizer is not None and getattr(tokenizer, "vocab_size", 0) > d_vocab:  # tokens added later do not count
            raise ModelError(
                f"the tokenizer of {name!r} has {tokenizer.vocab_size} tokens, but the model knows {d_vocab}: they do "
                "not belong together"
            )
        self.special_tokens = special_tokens(tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Three random projections of a sample of the weights, rounded: other weights give others."""
        import torch

        samples = []
        for values in self.model.parameters():
            flat = values.detach().flatten()
            samples.append(flat[:: max(len(flat) // 64, 1)][:64].cpu().double())
        weights = torch.cat(samples)
        directions = torch.randn(3, len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        norm = weights.norm()
        return " ".join(f"{value:.3f}" for value in [*(directions @ weights / norm).tolist(), norm.log().item()])

    def memory_bytes(self) -> int:
        """The weights'."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def hook_names(self) -> Sequence[str]:
        return list(self.model.hook_dict)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        tokenizer = self._tokenizer()
        return [tokenizer.decode([token]) for token in tokens]

    def _tokenizer(self) -> Any:
        if self.model.tokenizer is None:
            raise ModelError(
                f"the model {self.name!r} has no tokenizer, so it cannot read text. Give the model one, or use a "
                "dataset of token ids"
            )
        return self.model.tokenizer

    def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
        import torch

        held: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            held[hook.name] = activation

        stop, entry = self._stop_after(hooks)
        with torch.inference_mode():
            residual = self._run(
                tokens, return_type=None, stop_at_layer=stop, fwd_hooks=[(n, keep) for n in hooks if n != entry]
            )
        if entry is not None:
            held[entry] = residual
        if silent := sorted(set(hooks) - set(held)):
            raise ModelError(
                f"the hook {silent[0]!r} of {self.name!r} does not run as the model is configured (TransformerLens has "
                "switches such as use_attn_result and use_split_qkv_input); pass the model from code with it on"
            )
        return held

    def _stop_after(self, hooks: Collection[str]) -> tuple[int | None, str | None]:
        """The layer to stop before, and the hook that equals the residual stream entering it, if it is wanted."""
        layers = []
        for name in hooks:
            if (match := re.match(r"blocks\.(\d+)\.", name)) is not None:
                layers.append(int(match.group(1)))
            elif name not in ("hook_embed", "hook_pos_embed", "hook_tokens"):  # these come before the first block
                return None, None
        last = max(layers, default=-1)
        entry = f"blocks.{last}.hook_resid_pre"
        only_entry = [name for name in hooks if name.startswith(f"blocks.{last}.")] == [entry]
        if only_entry and not self.model.hook_dict[entry].fwd_hooks:
            return last, entry
        return last + 1, None

    def loss(self, tokens: Tensor, replacements: Mapping[str, Replacement] | None = None) -> Tensor:
        import torch

        def hook_for(replace: Replacement) -> Any:
            def hooked(activation: Tensor, hook: Any) -> Tensor:
                # The model's bfloat16 is not for what is put in its place, such as an SAE.
                with torch.autocast(activation.device.type, enabled=False):
                    return replace(activation)

            return hooked

        with torch.inference_mode():
            loss: Tensor = self._run(
                tokens,
                return_type="loss",
                loss_per_token=True,
                fwd_hooks=[(name, hook_for(replace)) for name, replace in (replacements or {}).items()],
            )
        return loss

    def _run(self, tokens: Tensor, fwd_hooks: list[tuple[str, Any]], **options: Any) -> Any:
        import torch

        accepted = inspect.signature(self.model.forward).parameters
        if unknown := sorted(set(self._forward_kwargs) - set(accepted)):
            raise ModelError(
                f"the forward of {self.name!r} does not take {unknown} (model.backend.forward_kwargs); it takes "
                f"{sorted(set(accepted) - {'input'})}"
            )
        tokens = tokens.to(self.device)
        compiled = nullcontext() if self._compiled is None else self._compiled.except_at([n for n, _ in fwd_hooks])
        # A copy of the weights that autocast kept beyond this forward could not be trained on.
        autocast = torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self._autocast, cache_enabled=False)
        with self._evaluating(), compiled, autocast:
            return self.model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **options, **self._forward_kwargs)


class _Evaluating:
    """Calling it gives a context in which the modules of ``model`` are in evaluation mode; then each is as it was.

    Forwards may be nested, or run in several threads: the modules go back when the last one has ended.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._forwards = 0
        self._training: list[Any] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._forwards += 1
            if self._forwards == 1:
                self._training = [module for module in self._model.modules() if module.training]
                self._set(False)
        try:
            yield
        finally:
            with self._lock:
                self._forwards -= 1
                if not self._forwards:
                    self._set(True)
                    self._training = []

    def _set(self, training: bool) -> None:
        for module in self._training:
            module.training = training  # this module alone, not what is in it


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    yield Entry(
        "HookedTransformer",
        HookedTransformerOptions,
        _build,
        summary="models of transformer_lens, Hugging Face folders, and saekit/tiny-python",
        precheck=_precheck,
    )


def _precheck(config: HookedTransformerOptions, whole: TrainConfig | PretokenizeConfig) -> None:
    model_folder(whole.model.name, config.from_pretrained_kwargs)


def _build(config: HookedTransformerOptions, *, model: ModelConfig, loaded: object | None) -> TransformerLensBackend:
    with warnings.catch_warnings():
        # transformer_lens 3 announces its 4.0, which saekit's requirements exclude: nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*HookedTransformer.*deprecated", category=DeprecationWarning)
        module: Any = _passed(loaded) if loaded is not None else load_model(model, config.from_pretrained_kwargs)
    name = getattr(module.cfg, "model_name", None) if loaded is not None else model.name
    return TransformerLensBackend(
        module,
        name=name or "custom",
        d_vocab=module.cfg.d_vocab,
        n_ctx=module.cfg.n_ctx,
        forward_kwargs=config.forward_kwargs,
        autocast=model.autocast,
        compile_mode=model.compile_mode if model.compile else None,
    )


_SAVE_IT = "Save it and its tokenizer with save_pretrained(folder), and choose that with model.name"


def _passed(loaded: object) -> object:
    if hasattr(loaded, "input_dependent_hooks"):
        raise ModelError(
            'the model passed is a HookedMamba, and its backend must be named: model.backend = "HookedMamba"'
        )
    if not all(hasattr(loaded, name) for name in ("run_with_hooks", "hook_dict", "cfg", "tokenizer")):
        told = instead(loaded, "save_pretrained", _SAVE_IT)
        raise ModelError(f"model must be a HookedTransformer, found {type(loaded).__name__}. {told}")
    if lacking := [name for name in ("d_vocab", "n_ctx") if not hasattr(loaded.cfg, name)]:  # type: ignore[attr-defined]
        raise ModelError(f"the cfg of the model, a {type(loaded).__name__}, lacks {' and '.join(lacking)}")
    return loaded
