"""Bridges of transformer_lens around models of transformers, with their weights and without.

A helper of the backends' plugins, not a plugin.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ModelError
from saekit.garbage import uncollected
from saekit.reasons import reason
from saekit_plugins.backends.bridges import BridgeBackend
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
from saekit_plugins.backends.processing import NOTHING

if TYPE_CHECKING:
    from saekit.config import ModelConfig

__all__ = ["Processing", "bridge_backend"]


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

    def done(self) -> dict[str, bool]:
        """By its name, whether it is done."""
        chosen: dict[str, bool] = attrs.asdict(self)
        return chosen

    def options(self) -> dict[str, bool]:
        """For ``enable_compatibility_mode``."""
        chosen = self.done()
        return chosen | {"no_processing": not any(chosen.values())}


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
    import torch

    name = model.name if loaded is None else getattr(loaded.cfg, "model_name", None)
    processed: Mapping[str, bool] | None = None
    if loaded is None:
        folder = model_folder(model.name, {})
        native = folder is not None and (folder / NATIVE_CONFIG).is_file()
        if native:  # nothing of transformers is called, which could take them
            model_folder(model.name, {name: value for name, value in options.items() if name != "revision"})
        kind = (native_processing or processing) if native else processing
        with torch.random.fork_rng(devices=[]):  # the library draws weights, which it then takes from the model
            loaded = (_outlined if outline else _loaded)(model, tokenizer, kind, options, native=native)
        processed = {} if native else NOTHING if kind is None else kind.done()  # a native one is as it was saved
    known = {"d_vocab": loaded.cfg.d_vocab, "n_ctx": loaded.cfg.n_ctx, "autocast": model.autocast}
    return BridgeBackend(loaded, name=name or "custom", forward_kwargs=forward_kwargs, processed=processed, **known)


def _loaded(
    model: ModelConfig, tokenizer: str, processing: Processing | None, options: Mapping[str, Any], *, native: bool
) -> Any:
    official = attrs.evolve(model, name=official_name(model.name))
    if native:
        causal_lm: Any = load_native_causal_lm(model)
    else:
        with _with_near_names(model.name):
            causal_lm = load_causal_lm(official, attn_implementation="eager", **options)
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
        with _with_near_names(model.name):
            causal_lm = causal_lm_outline(official, attn_implementation="eager", **options)
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if processing is not None and head is not None and head.weight is embedding.weight:  # it makes them two
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    # Bridges split some parameters, which they refuse to do where there are no numbers.
    _with_others(causal_lm, _in_one_place)
    with torch.device("meta"):
        # Without any, the library would look for the model's.
        bridge = _booted(causal_lm, model, load_tokenizer(EMBEDDED["saekit/tiny-python"]), "meta")
    bridge.tokenizer = None
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
        with uncollected():
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
                "model.backend=AutoModelForCausalLM takes any causal language model"
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
                "model.backend=TransformerBridge with model.backend.compatibility_mode=false, whose hooks hold what "
                "the model's own library computes"
            ) from error


@contextmanager
def _with_near_names(name: str) -> Iterator[None]:
    """What the Hub has not is said with the models of transformer_lens that are spelled alike."""
    try:
        yield
    except ModelError as error:
        if error.__cause__ is None or model_folder(name, {}) is not None:
            raise
        close = near_names(name, *EMBEDDED)
        hint = f". Did you mean {' or '.join(map(repr, close))}?" if close else ""
        better = ModelError(f"the model {name!r} cannot be loaded: {reason(error.__cause__)}{hint}")
        better.__notes__ = getattr(error, "__notes__", [])  # why the Hub was not asked
        raise better from error
