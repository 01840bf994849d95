"""Model backend ``HookedTransformer`` (transformer_lens; of its version 4, a bridge in compatibility mode)."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ConfigError, Entry, ModelError, hookimpl
from saekit.backends import Hooks, InsideBackend, ModuleBackend
from saekit.config import LATER
from saekit_plugins.backends.aliases import also_called
from saekit_plugins.backends.bridge_loading import Processing, bridge_backend
from saekit_plugins.backends.bridges import BridgeBackend
from saekit_plugins.backends.compiled_parts import CompiledParts
from saekit_plugins.backends.fused_parts import FusedParts
from saekit_plugins.backends.hook_names import RESIDUAL, layout_of_architecture
from saekit_plugins.backends.layered import checked_kwargs
from saekit_plugins.backends.lens_hooks import begins, exposed
from saekit_plugins.backends.lens_versions import has_hooked_transformer, lens_version
from saekit_plugins.backends.model_folders import EMBEDDED, PROCESSING, load_model, model_folder
from saekit_plugins.backends.outlines import hooked_transformer_outline
from saekit_plugins.backends.passed import check_not_for_passed, check_passed
from saekit_plugins.backends.processing import at_hooks, of_metadata, seen_in

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.abilities import ExposedPoint
    from saekit.config import ModelConfig, PretokenizeConfig, TrainConfig

__all__ = ["EMBEDDED", "HookedTransformerOptions", "TransformerLensBackend"]


_INSIDE = re.compile(r"blocks\.(\d+)\.(attn\.hook_z|mlp\.hook_pre|mlp\.hook_post)")
"""Those from which one matrix leads to the residual stream."""
_ENTRY = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post)")
_BEFORE_BLOCKS = ("hook_embed", "hook_pos_embed", "hook_tokens")
_AFTER_BLOCKS = ("ln_final.", "unembed.", "hook_norm", "hook_logits")
_OWN_WAY = ("start_at_layer", "stop_at_layer", "tokens", "prepend_bos", "padding_side", "past_kv_cache",
            "shortformer_pos_embed", "only_use_these_layers")  # fmt: skip
"""What decides where a forward begins or what it sees of the tokens: with these among its options, it is whole."""


@attrs.frozen(kw_only=True)
class HookedTransformerOptions:
    """Any model that transformer_lens knows, a Hugging Face model folder, or a model passed from code."""

    from_pretrained_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to `HookedTransformer.from_pretrained`, such as `{fold_ln = false}`; transformer_lens 4 takes
    those about processing alone, and `revision`."""
    forward_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to every forward of the model."""
    fused: bool = attrs.field(default=False, metadata={LATER: True})
    """Run attention, norms and GPT-2's GELU by torch's fused functions where no hook is inside: the same but
    for rounding, and faster. Not with `model.compile`, nor with transformer_lens 4."""


class TransformerLensBackend(ModuleBackend, InsideBackend):
    """A ``HookedTransformer``, or anything else with its ``run_with_hooks`` and blocks."""

    why_silent = (
        " (TransformerLens has switches such as use_attn_result and use_split_qkv_input); pass the model from code "
        "with it on"
    )

    def __init__(
        self,
        model: Any,
        *,
        forward_kwargs: Mapping[str, Any],
        compile_mode: str | None = None,
        fused: bool | None = None,
        **known: Any,
    ) -> None:
        """``fused`` is None where there is no such option."""
        self._compiled = None if compile_mode is None else CompiledParts(model, compile_mode)
        self._fused = FusedParts(model) if fused else None
        self._may_be_fused = fused is False and self._compiled is None
        super().__init__(model, tokenizer=model.tokenizer, **known)
        if self._fused is not None:
            self._fused.warn_if_none(self.name)
        self._forward_kwargs = dict(forward_kwargs)

    def hook_names(self) -> Sequence[str]:
        return list(self.model.hook_dict)

    def in_residual_stream(self, hook_name: str) -> bool:
        return hook_name in self.model.hook_dict and RESIDUAL.fullmatch(hook_name) is not None

    def to_residual_stream(self, hook_name: str) -> Tensor | None:
        """``W_O`` or ``W_out``; none where a norm lies behind them, and before the product with a gate."""
        found, cfg = _INSIDE.fullmatch(hook_name), self.model.cfg
        behind = getattr(cfg, "use_normalization_before_and_after", False)
        if found is None or hook_name not in self.model.hook_dict or behind:
            return None
        if found[2] == "mlp.hook_pre" and getattr(cfg, "gated_mlp", False):
            return None
        block = self.model.blocks[int(found[1])]
        heads = found[2] == "attn.hook_z"
        weights = getattr(block.attn, "W_O", None) if heads else getattr(block.mlp, "W_out", None)
        if weights is None or weights.ndim != (3 if heads else 2):  # of experts, or quantized
            return None
        return weights.flatten(0, 1) if heads else weights  # type: ignore[no-any-return]

    def other_names(self) -> Collection[str]:
        return also_called(self.name, getattr(self.model.cfg, "model_name", None) or self.name)

    def hook_like(self, name: str) -> str | None:
        """A hook of its own, or the one where transformers' module of that path has its place."""
        if name in self.model.hook_dict:
            return name
        cfg = self.model.cfg
        known = layout_of_architecture(
            getattr(cfg, "original_architecture", None), parallel=getattr(cfg, "parallel_attn_mlp", False)
        )
        found = None if known is None else known.lens_hook(name)
        return found if found in self.model.hook_dict else None

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        """See :class:`saekit.abilities.StatesProcessing`: what can be seen of the weights."""
        known = seen_in(self.model) if about is None else of_metadata(about)
        return at_hooks(known, hook_name and [hook_name], self.model)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        if hasattr(self.model, "lm_head"):  # a Mamba's
            return self.model.lm_head.weight.T, None
        return self.model.W_U, self.model.b_U

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        options: dict[str, Any] = {"return_type": hooks.want}
        entry = None
        if hooks.want == "held":
            stop, entry = self._stop_after(hooks)
            options = {"return_type": None, "stop_at_layer": stop}
        elif hooks.want == "loss":
            options["loss_per_token"] = True

        def at(activation: Tensor, hook: Any) -> Tensor:
            return hooks(hook.name, activation)

        if unknown := [name for name in hooks.names if not self._has(name)]:
            raise self.no_hook(unknown[0])
        names = [name for name in hooks.names if name != entry]
        pairs = [(name, at) for name in names]
        if hooks.entry is not None:
            if hooks.entry.endswith("_post"):  # its block does not run
                pairs = [(name, at) for name in names if name != hooks.entry]
            given = self._begun(tokens, hooks, options)
            if hooks.done:
                return None
            if "only_use_these_layers" in options:
                once = [given]  # a forward inside this one has its own
                pairs.append(("hook_embed", lambda activation, hook: once.pop() if once else activation))
            else:
                tokens = given
        runs = len(options.get("only_use_these_layers", "?")) > 0  # where no block does, nothing is compiled
        faster: AbstractContextManager[None] = nullcontext() if self._fused is None else self._fused.at_work()
        if self._compiled is not None and runs:
            faster = self._compiled.except_at([name for name, _ in pairs])
        with faster:
            out: Tensor | None = self.model.run_with_hooks(
                tokens, fwd_hooks=pairs, **{**checked_kwargs(self, self._forward_kwargs, self._accepted), **options}
            )
        if entry is not None and out is not None:
            hooks(entry, out)
        return out

    def other_forwards(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        """See :class:`saekit.abilities.ForwardsOtherwise`."""
        if not self._may_be_fused:
            return {}
        parts = FusedParts(self.model)
        return {"model.backend.fused=true": parts.at_work} if len(parts) else {}

    def begins(self, tell: Callable[[Tensor | None, int], Callable[[], None] | None]) -> AbstractContextManager[None]:
        embedding = "embedding" if hasattr(self.model, "embedding") else "embed"  # a Mamba's, or a transformer's
        return begins(self.model, self.model.get_submodule(embedding), tell)

    def exposed(self, names: Collection[str]) -> AbstractContextManager[Mapping[str, ExposedPoint]]:
        """See :class:`saekit.abilities.ExposesHooks`: `run_with_cache`, `run_with_hooks` and `add_hook` know them."""
        return exposed(names, self.model.hook_dict, self.model.mod_dict)

    def entry_of(self, hooks: Collection[str]) -> str | None:
        cfg, known = self.model.cfg, self.model.hook_dict
        if "start_at_layer" not in self._accepted or set(_OWN_WAY) & set(self._forward_kwargs):
            return None
        if getattr(cfg, "positional_embedding_type", None) == "shortformer":  # every block adds what the tokens make
            return None
        last = len(self.model.blocks) - 1
        first = (last, "hook_resid_post")
        for name in hooks:
            if not self._has(name):
                return None
            if (match := re.match(r"blocks\.(\d+)\.(.+)", name)) is not None:
                post = match.group(2) == "hook_resid_post"
                first = min(first, (int(match.group(1)), "hook_resid_post" if post else "hook_resid_pre"), key=_order)
            elif not name.startswith(_AFTER_BLOCKS):
                return None
        entry = f"blocks.{first[0]}.{first[1]}"
        return entry if entry in known else None

    def _begun(self, tokens: Tensor, hooks: Hooks, options: dict[str, Any]) -> Tensor:
        """What enters the first block that runs; ``options`` of the forward say which that is."""
        match = _ENTRY.fullmatch(hooks.entry or "")
        if match is None:
            raise ModelError(f"a forward of {self.name!r} cannot begin at the hook {hooks.entry!r}")
        layer, value = int(match.group(1)), hooks.given
        if match.group(2) == "hook_resid_post":
            layer, value = layer + 1, hooks(match.group(), value)
        if "only_use_these_layers" in self._accepted:  # a Mamba's, which starts at no layer and goes on to the end
            stop = options.get("stop_at_layer")
            options["only_use_these_layers"] = range(layer, len(self.model.blocks) if stop is None else stop)
            return value
        options |= {"start_at_layer": layer, "tokens": tokens}
        tokenizer = self.model.tokenizer
        if getattr(tokenizer, "padding_side", None) == "left" and "attention_mask" not in self._forward_kwargs:
            from transformer_lens.utilities.tokenize_utils import get_attention_mask

            options["attention_mask"] = get_attention_mask(tokenizer, tokens, self.model.cfg.default_prepend_bos)
        return value

    def _stop_after(self, hooks: Hooks) -> tuple[int | None, str | None]:
        """The layer to stop before, and the hook that equals the residual stream entering it, if it is wanted."""
        layers = []
        for name in hooks.read:
            if (match := re.match(r"blocks\.(\d+)\.", name)) is not None:
                layers.append(int(match.group(1)))
            elif name not in _BEFORE_BLOCKS:
                return None, None
        last = max(layers, default=-1)
        entry = f"blocks.{last}.hook_resid_pre"
        only_entry = [name for name in hooks.read if name.startswith(f"blocks.{last}.")] == [entry]
        if only_entry and not self.model.hook_dict[entry]._forward_hooks:
            return last, entry
        return last + 1, None

    def _has(self, name: str) -> bool:
        """Also a hook that mamba-lens makes as it runs, one for each token: ``blocks.1.hook_h.3``."""
        parent, _, number = name.rpartition(".")
        return name in self.model.hook_dict or (number.isdigit() and parent in dict(self.model.named_modules()))

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """What the model's forward takes beside the tokens."""
        return frozenset(inspect.signature(self.model.forward).parameters) - {"input"}


def _order(place: tuple[int, str]) -> tuple[int, bool]:
    return place[0], place[1] == "hook_resid_post"


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    yield Entry(
        "HookedTransformer",
        HookedTransformerOptions,
        _build,
        summary="models of transformer_lens, Hugging Face folders, and saekit/tiny-python",
        precheck=_precheck,
        outline=_outline,
        timed=has_hooked_transformer(),  # else it is a bridge
        ships=EMBEDDED,
    )


def _precheck(config: HookedTransformerOptions, whole: TrainConfig | PretokenizeConfig) -> None:
    model_folder(whole.model.name, config.from_pretrained_kwargs)
    _check_fused(config, whole.model)
    if not has_hooked_transformer():
        _check_for_bridge(config, whole.model)


def _build(
    config: HookedTransformerOptions, *, model: ModelConfig, loaded: object | None
) -> TransformerLensBackend | BridgeBackend:
    _check_fused(config, model)
    if loaded is None and not has_hooked_transformer():
        return _bridge(config, model)
    with warnings.catch_warnings():
        # transformer_lens 3 announces that its 4.0 has none.  saekit works with both, so there is nothing to act on.
        warnings.filterwarnings("ignore", message=".*HookedTransformer.*deprecated", category=DeprecationWarning)
        module: Any = (
            _passed(loaded, config) if loaded is not None else load_model(model, config.from_pretrained_kwargs)
        )
    name = getattr(module.cfg, "model_name", None) if loaded is not None else model.name
    mode = model.compile_mode if model.compile else None
    return _around(module, config, model, name or "custom", compile_mode=mode, fused=config.fused)


def _outline(config: HookedTransformerOptions, *, model: ModelConfig) -> TransformerLensBackend | BridgeBackend:
    if not has_hooked_transformer():
        return _bridge(config, model, outline=True)
    module = hooked_transformer_outline(model, config.from_pretrained_kwargs)
    return _around(module, config, model, model.name)


def _check_fused(config: HookedTransformerOptions, model: ModelConfig) -> None:
    if config.fused and model.compile:
        raise ConfigError(
            [("model.backend.fused", "and model.compile are two ways to the same: set one of them to false")]
        )


def _check_for_bridge(config: HookedTransformerOptions, model: ModelConfig) -> None:
    """Raise :class:`saekit.ConfigError` for what transformer_lens 4, which has no HookedTransformer, cannot do."""
    here = f"transformer_lens {lens_version()} is installed, which has no HookedTransformer any more, and of its bridge"
    instead = "Take it out, or install transformer_lens 3: pip install 'transformer-lens<4'"
    problems = [
        (f"model.backend.from_pretrained_kwargs.{name}", f"{here} saekit takes {', '.join(PROCESSING)} and revision. "
         f"{instead}")
        for name in config.from_pretrained_kwargs
        if name not in (*PROCESSING, "revision")
    ]  # fmt: skip
    if model.compile:
        problems.append(("model.compile", f"{here} no part can be compiled. {instead}"))
    if config.fused:
        problems.append(("model.backend.fused", f"{here} no part is fused. {instead}"))
    if problems:
        raise ConfigError(problems)


def _bridge(config: HookedTransformerOptions, model: ModelConfig, *, outline: bool = False) -> BridgeBackend:
    folder = model_folder(model.name, config.from_pretrained_kwargs)
    _check_for_bridge(config, model)
    kwargs = dict(config.from_pretrained_kwargs)
    processing = Processing(**{name: kwargs.pop(name) for name in PROCESSING if name in kwargs})
    revision = kwargs if folder is None else {}
    return bridge_backend(
        model,
        processing=processing,
        native_processing=Processing.none(),  # that of such a folder is what it was saved with
        forward_kwargs=config.forward_kwargs,
        outline=outline,
        **revision,
    )


def _around(
    module: Any,
    config: HookedTransformerOptions,
    model: ModelConfig,
    name: str,
    *,
    compile_mode: str | None = None,
    fused: bool | None = None,
) -> TransformerLensBackend:
    return TransformerLensBackend(
        module,
        name=name,
        d_vocab=module.cfg.d_vocab,
        n_ctx=module.cfg.n_ctx,
        forward_kwargs=config.forward_kwargs,
        autocast=model.autocast,
        compile_mode=compile_mode,
        fused=fused,
    )


def _passed(loaded: object, config: HookedTransformerOptions) -> object:
    check_passed(loaded, "HookedTransformer")
    check_not_for_passed(config, "from_pretrained_kwargs")
    if lacking := [name for name in ("d_vocab", "n_ctx") if not hasattr(loaded.cfg, name)]:  # type: ignore[attr-defined]
        raise ModelError(f"the cfg of the model, a {type(loaded).__name__}, lacks {' and '.join(lacking)}")
    return loaded
