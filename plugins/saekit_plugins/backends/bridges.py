"""Models of transformer_lens' TransformerBridge: made of models of transformers, run, and outlined.  A helper of the
backends' plugins, not a plugin."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ModelError
from saekit.backends import Hooks, ModuleBackend
from saekit.reasons import reason
from saekit_plugins.backends.hook_names import layout_of
from saekit_plugins.backends.lens_hooks import exposed
from saekit_plugins.backends.lens_versions import near_names, official_name
from saekit_plugins.backends.model_folders import (
    EMBEDDED,
    NATIVE_CONFIG,
    load_causal_lm,
    load_tokenizer,
    model_folder,
    ready,
)
from saekit_plugins.backends.native_models import load_native_causal_lm, native_outline
from saekit_plugins.backends.outlines import causal_lm_outline

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.abilities import ExposedPoint
    from saekit.config import ModelConfig

__all__ = ["RESIDUAL", "BridgeBackend", "Processing", "bridge_backend"]

RESIDUAL = re.compile(
    r"hook_embed|hook_pos_embed|blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)"
    r"|blocks\.\d+\.hook_(layer_input|out_proj)"  # a Mamba's
)
"""The hooks of transformer_lens that hold the residual stream, or what is added to it as it is."""
_NORMS = ("hook_scale", "hook_normalized")
_OURS = {"input", "input_ids", "return_type", "loss_per_token", "labels", "start_at_layer", "stop_at_layer", "kwargs"}
"""What a forward of saekit's decides itself."""


@attrs.frozen(kw_only=True)
class Processing:
    """What compatibility mode does to the weights, so that hooks hold what they hold in a HookedTransformer."""

    fold_ln: bool = True
    center_writing_weights: bool = True
    center_unembed: bool = True
    fold_value_biases: bool = True
    refactor_factored_attn_matrices: bool = False

    @classmethod
    def none(cls) -> Processing:
        """The weights as they are."""
        return cls(**{field.name: False for field in attrs.fields(cls)})

    def options(self) -> dict[str, bool]:
        """For ``enable_compatibility_mode``."""
        chosen: dict[str, bool] = attrs.asdict(self)
        return chosen | {"no_processing": not any(chosen.values())}


class BridgeBackend(ModuleBackend):
    """A ``TransformerBridge``, with the names of its hook points, and its other names for them, as hooks."""

    why_silent = (
        " (the bridge has hook points that run only after a switch such as set_use_attn_result(True) or "
        "set_use_hook_mlp_in(True), and some that no forward of this model reaches; pass the model from code with the "
        "switch on, or take another hook)"
    )

    def __init__(self, model: Any, *, forward_kwargs: Mapping[str, Any] | None = None, **known: Any) -> None:
        super().__init__(model, tokenizer=model.tokenizer, **known)
        self._forward_kwargs = dict(forward_kwargs or {})

    @cached_property
    def _points(self) -> dict[str, Any]:
        """Every name with its hook point: TransformerLens' names, then the bridge's own, in the order of the model."""
        points: dict[str, Any] = self.model.hook_dict
        by_point: dict[int, list[str]] = {}
        for name, point in points.items():
            by_point.setdefault(id(point), []).append(name)
        tables = id(points.get("rotary_emb.hook_out"))  # two tensors, which some call hook_pos_embed
        return {
            name: point
            for key, names in by_point.items()
            if key != tables
            for name in sorted(names, key=lambda one: one == points[one].name)
            for point in (points[name],)
        }

    def hook_names(self) -> Sequence[str]:
        return list(self._points)

    def hook_like(self, name: str) -> str | None:
        """A hook of its own, or the one where transformers' module of that path has its place."""
        if name in self._points:
            return name
        config = self.model.original_model.config.get_text_config()
        known = layout_of(config.model_type, parallel=getattr(config, "use_parallel_residual", False))
        found = None if known is None else known.lens_hook(name)
        return found if found in self._points else None

    def in_residual_stream(self, hook_name: str) -> bool:
        return hook_name in self._residual

    @cached_property
    def _residual(self) -> frozenset[str]:
        found = {id(point) for name, point in self._points.items() if RESIDUAL.fullmatch(name)}
        return frozenset(name for name, point in self._points.items() if id(point) in found)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        try:
            return self.model.W_U, self.model.b_U
        except AttributeError:
            return super().unembedding()

    def logits(self, tokens: Tensor) -> Tensor:
        # Without a cache of keys and values, which nobody reads.
        plain = {"use_cache": False} if "use_cache" in self._accepted else {}
        options: dict[str, Any] = {"return_type": "logits"} | plain | self._checked_kwargs()
        if tokens.is_meta:  # the library looks at the numbers of a mask that it makes itself, and there are none
            options["attention_mask"] = _causal(tokens)
        logits: Tensor = self.model(tokens, **options)
        return logits

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        with ExitStack() as quiet:
            if any(name.endswith(_NORMS) for name in hooks.names):
                # What is put there makes a bridge compute the norm itself, which it warns of: rounding is other.
                quiet.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            return super().forward(tokens, hooks)

    def begins(self, tell: Callable[[Tensor | None, int], None]) -> AbstractContextManager[None]:
        return self._begins(tell, self.model.original_model)  # which the bridge calls, and which generates

    def exposed(self, names: Collection[str]) -> AbstractContextManager[Mapping[str, ExposedPoint]]:
        """See :class:`saekit.abilities.ExposesHooks`: `run_with_cache`, `run_with_hooks` and `add_hook` know them."""
        return exposed(names, self.model._hook_registry)

    def _attach(self, name: str, hooked: Callable[[Tensor], Tensor]) -> _Attached:
        if (point := self._points.get(name)) is None:
            raise self.no_hook(name)

        def at(activation: Tensor, hook: Any) -> Tensor:
            value = hooked(activation)
            # By another object the library knows that it must go on with this one.
            return value.view_as(value) if value is activation and value.requires_grad else value

        point.add_hook(at)  # it brings what the point holds into TransformerLens' shape, and back
        return _Attached(point, point.fwd_hooks[-1])

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """The options of a forward."""
        forwards = (self.model.forward, self.model.original_model.forward)
        return frozenset(name for forward in forwards for name in inspect.signature(forward).parameters) - _OURS

    def _checked_kwargs(self) -> dict[str, Any]:
        if unknown := sorted(set(self._forward_kwargs) - self._accepted):
            raise ModelError(
                f"the forward of {self.name!r} does not take {unknown} (model.backend.forward_kwargs); it takes "
                f"{sorted(self._accepted)}"
            )
        return self._forward_kwargs


@attrs.frozen
class _Attached:
    """A hook at a hook point."""

    point: Any
    handle: Any

    def remove(self) -> None:
        self.handle.hook.remove()
        self.point.fwd_hooks[:] = [one for one in self.point.fwd_hooks if one is not self.handle]


def _causal(tokens: Tensor) -> Tensor:
    """``[b, 1, t, t]``: which tokens each token sees."""
    import torch

    batch, length = tokens.shape
    return torch.ones(batch, 1, length, length, dtype=torch.bool, device=tokens.device).tril()


def bridge_backend(
    model: ModelConfig,
    *,
    processing: Processing | None,
    forward_kwargs: Mapping[str, Any],
    loaded: Any = None,
    tokenizer: str = "",
    outline: bool = False,
    native_processing: Processing | None = None,
    **options: Any,
) -> BridgeBackend:
    """The bridge ``loaded``, or one around the model that ``model.name`` means; with ``outline``, without its weights.

    ``processing`` is that of compatibility mode, None: without that mode.  A folder of a HookedTransformer has
    ``native_processing`` in its place, if that is given.  ``options`` are those of ``from_pretrained``.
    """
    name = model.name if loaded is None else getattr(loaded.cfg, "model_name", None)
    if loaded is None:
        folder = model_folder(model.name, {})
        native = folder is not None and (folder / NATIVE_CONFIG).is_file()
        kind = (native_processing or processing) if native else processing
        loaded = (_outlined if outline else _loaded)(model, tokenizer, kind, options, native=native)
    known = {"d_vocab": loaded.cfg.d_vocab, "n_ctx": loaded.cfg.n_ctx, "autocast": model.autocast}
    return BridgeBackend(loaded, name=name or "custom", forward_kwargs=forward_kwargs, **known)


def _loaded(
    model: ModelConfig, tokenizer: str, processing: Processing | None, options: Mapping[str, Any], *, native: bool
) -> Any:
    official = attrs.evolve(model, name=official_name(model.name))
    if native:
        causal_lm: Any = load_native_causal_lm(model)
    else:
        try:
            causal_lm = load_causal_lm(official, attn_implementation="eager", **options)
        except ModelError as error:
            raise _with_near_names(error, model.name) from error
    own = (EMBEDDED.get(model.name, official.name), options.get("revision", "main"))
    read_by = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(*own)
    device = str(next(causal_lm.parameters()).device)
    bridge = _booted(causal_lm, model, read_by, device)
    if processing is not None:
        _make_compatible(bridge, model.name, processing.options())
    return ready(bridge, device)


def _outlined(
    model: ModelConfig, tokenizer: str, processing: Processing | None, options: Mapping[str, Any], *, native: bool
) -> Any:
    """As :func:`_loaded`, but on the meta device, and its weights are not processed: their shapes stay the same."""
    import torch

    official = attrs.evolve(model, name=official_name(model.name))
    if native:
        causal_lm: Any = native_outline(model)
    else:
        causal_lm = causal_lm_outline(official, attn_implementation="eager", **options)
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if processing is not None and head is not None and head.weight is embedding.weight:  # it makes them two
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    # Bridges split some parameters, which they refuse to do where there are no numbers.
    _with_others(causal_lm, _in_one_place)
    with torch.device("meta"):
        bridge = _booted(causal_lm, model, None, "meta")
    if processing is not None:
        _make_compatible(bridge, model.name, {"no_processing": True})
    return _with_others(bridge, lambda value: value.to("meta")).eval()


def _with_others(module: Any, other: Callable[[Any], Any]) -> Any:
    """``module`` with ``other(value)`` in the place of each parameter and buffer; what is one stays one."""
    import torch

    made: dict[int, Any] = {}
    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for name, value in values.items():
                if value is not None and id(value) not in made:
                    new = other(value)
                    made[id(value)] = (
                        torch.nn.Parameter(new, requires_grad=False) if values is part._parameters else new
                    )
                    made[id(made[id(value)])] = made[id(value)]
                values[name] = made.get(id(value))
    return module


def _in_one_place(value: Any) -> Any:
    """A tensor on the CPU like ``value``, whose numbers share their memory."""
    import torch

    return torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)


def _booted(causal_lm: Any, model: ModelConfig, tokenizer: Any, device: str) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that the library's dependencies have deprecated
        from transformer_lens.model_bridge import TransformerBridge

        try:
            bridge: Any = TransformerBridge.boot_transformers(
                official_name(model.name),
                hf_model=causal_lm,
                tokenizer=tokenizer,
                device=device,
                dtype=getattr(torch, model.dtype),
            )
        except Exception as error:  # of the library, which knows some architectures and not others
            raise ModelError(
                f"transformer_lens makes no bridge of {model.name!r}, a {type(causal_lm).__name__}: {reason(error)}. "
                'model.backend = "AutoModelForCausalLM" takes any causal language model'
            ) from error
    bridge.cfg.model_name = model.name
    return bridge


def _make_compatible(bridge: Any, name: str, options: Mapping[str, bool]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bridge.enable_compatibility_mode(disable_warnings=True, **options)
        except Exception as error:  # of the library, where an architecture's weights cannot be processed
            raise ModelError(
                f"the weights of {name!r} cannot be processed as for a HookedTransformer: {reason(error)}. Take "
                'model.backend = {name = "TransformerBridge", compatibility_mode = false}, whose hooks hold what the '
                "model's own library computes"
            ) from error


def _with_near_names(error: ModelError, name: str) -> ModelError:
    """``error``, and the models of transformer_lens that are spelled alike, unless it is one of them."""
    close = [] if model_folder(name, {}) else near_names(name, *EMBEDDED)
    if not close:
        return error
    better = ModelError(f"{error}. Did you mean {' or '.join(map(repr, close))}?")
    better.__notes__ = getattr(error, "__notes__", [])  # why the Hub was not asked
    return better
