"""Model backend ``HookedTransformer`` (transformer_lens)."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, ModelError, hookimpl
from saekit.devices import resolve_device
from saekit_plugins.compiled_parts import CompiledParts

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import ModelConfig, PretokenizeConfig, TrainConfig
    from saekit.protocols import Replacement

EMBEDDED = {"saekit/tiny-python": Path(__file__).parent / "tiny_python"}
NATIVE_CONFIG, NATIVE_WEIGHTS = "hooked_transformer.json", "model.safetensors"
_PROCESSING = (
    "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class HookedTransformerOptions:
    """Any model that transformer_lens knows, a Hugging Face model folder, or a model passed from code."""

    from_pretrained_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to `HookedTransformer.from_pretrained`, such as `{center_writing_weights = false}`."""
    forward_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to every forward of the model."""


class TransformerLensBackend:
    """A ``HookedTransformer``, or anything else with its ``run_with_hooks`` and blocks."""

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
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.name, self.d_vocab, self.n_ctx = name, d_vocab, n_ctx
        self.device = str(next(model.parameters()).device)
        self._forward_kwargs, self._autocast = dict(forward_kwargs), autocast
        tokenizer = self.tokenizer = model.tokenizer
        if tokenizer is not None and getattr(tokenizer, "vocab_size", 0) > d_vocab:  # tokens added later do not count
            raise ModelError(
                f"the tokenizer of {name!r} has {tokenizer.vocab_size} tokens, but the model knows {d_vocab}: they do "
                "not belong together"
            )
        self.special_tokens = {
            kind: getattr(tokenizer, f"{kind}_token_id", None) if tokenizer is not None else None
            for kind in ("bos", "eos", "sep")
        }

    @cached_property
    def fingerprint(self) -> str:
        """Three random projections of a sample of the weights, rounded: other weights give others."""
        import torch

        samples = []
        for values in self.model.parameters():
            flat = values.detach().flatten()
            samples.append(flat[:: max(len(flat) // 64, 1)][:64].to("cpu", torch.float64))
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
        with compiled, torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return self.model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **options, **self._forward_kwargs)


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    yield Entry(
        "HookedTransformer",
        HookedTransformerOptions,
        _build,
        summary="models of transformer_lens, Hugging Face folders, and saekit/tiny-python",
        precheck=_precheck,
    )


def _build(config: HookedTransformerOptions, *, model: ModelConfig, loaded: object | None) -> TransformerLensBackend:
    with warnings.catch_warnings():
        # transformer_lens 3 announces its 4.0, which saekit's requirements exclude: nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*HookedTransformer.*deprecated", category=DeprecationWarning)
        module: Any = _passed(loaded) if loaded is not None else _load(model, config.from_pretrained_kwargs)
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


def _passed(loaded: object) -> object:
    if not all(hasattr(loaded, name) for name in ("run_with_hooks", "hook_dict", "cfg", "tokenizer")):
        raise ModelError(f"model must be a HookedTransformer, found {type(loaded).__name__}")
    return loaded


def _load(model: ModelConfig, kwargs: Mapping[str, Any]) -> object:
    """By name: the embedded model, a folder of ours, a Hugging Face folder, or a name of transformer_lens."""
    device = resolve_device(model.device, "model.device")
    if (folder := _folder(model.name, kwargs)) is not None:
        if (folder / NATIVE_CONFIG).is_file():
            return _load_native(folder, model.dtype, device)
        return _load_hf_folder(folder, model.dtype, device, kwargs)
    from transformer_lens import HookedTransformer

    try:
        return HookedTransformer.from_pretrained(model.name, dtype=model.dtype, device=device, **kwargs)
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(_unknown_name(model.name, error)) from error


def _folder(name: str, kwargs: Mapping[str, Any]) -> Path | None:
    """The model folder that ``name`` means, checked; None for a name that transformer_lens may know."""
    folder = EMBEDDED.get(name, Path(name))
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"there is no model folder {name!r} (model.name)")
        return None
    if (folder / NATIVE_CONFIG).is_file():
        if kwargs:
            raise ModelError(f"model.backend.from_pretrained_kwargs do not apply to {name!r}: {sorted(kwargs)}")
        return folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has neither config.json nor {NATIVE_CONFIG}")
    if unknown := sorted(set(kwargs) - set(_PROCESSING)):
        raise ModelError(f"model.backend.from_pretrained_kwargs for a folder can be {_PROCESSING}, found {unknown}")
    return folder


def _precheck(config: HookedTransformerOptions, whole: TrainConfig | PretokenizeConfig) -> None:
    _folder(whole.model.name, config.from_pretrained_kwargs)


def _unknown_name(name: str, error: Exception) -> str:
    import difflib

    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    known = {*EMBEDDED, *OFFICIAL_MODEL_NAMES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        return f"transformer_lens knows no model {name!r}, and there is no such folder.{hint}"
    return f"the model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}"


def _load_native(folder: Path, dtype: str, device: str) -> object:
    """A folder with ``hooked_transformer.json``, ``model.safetensors`` and a tokenizer."""
    import torch
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    config = json.loads((folder / NATIVE_CONFIG).read_text(encoding="utf-8"))
    model = HookedTransformer(
        HookedTransformerConfig(**config, device=device, dtype=getattr(torch, dtype), init_weights=False),
        AutoTokenizer.from_pretrained(folder),
    )
    missing, unexpected = model.load_state_dict(load_file(folder / NATIVE_WEIGHTS), strict=False)
    # The masks and their constants are rebuilt from the configuration.
    missing = [name for name in missing if not name.endswith(("mask", "IGNORE"))]
    if missing or unexpected:
        raise ModelError(f"the weights in {folder} lack {missing or 'nothing'} and have the unknown {unexpected}")
    return torch.nn.Module.to(model, getattr(torch, dtype))  # HookedTransformer.to prints


def _load_hf_folder(folder: Path, dtype: str, device: str, kwargs: Mapping[str, Any]) -> object:
    """A folder of a Hugging Face causal LM: ``config.json``, weights and a tokenizer."""
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = dict.fromkeys(_PROCESSING[:4], True) | dict(kwargs)
    torch_dtype = getattr(torch, dtype)
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with _config_folder(folder) as neutral:
            config = loading.get_pretrained_model_config(
                neutral, fold_ln=options["fold_ln"], device=device, dtype=torch_dtype
            )
        state = loading.get_pretrained_state_dict(str(folder), config, hf_model, dtype=torch_dtype)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model = HookedTransformer(config, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(state, **options)
    return torch.nn.Module.to(model, device)  # HookedTransformer.to prints


@contextmanager
def _config_folder(folder: Path) -> Iterator[str]:
    """A folder with ``config.json`` alone, under a name that says nothing.

    transformer_lens guesses the architecture from words in the path, and reads ``n_ctx``, which transformers 5 no
    longer writes for GPT-2.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "n_positions" in config:
        config.setdefault("n_ctx", config["n_positions"])
    with tempfile.TemporaryDirectory(prefix="saekit") as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield neutral
