"""Models without their weights, on torch's meta device: hooks, shapes and sizes, of which nothing large is downloaded
or allocated.  A helper of the backends' plugins, not a plugin."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit import ModelError
from saekit.garbage import uncollected
from saekit.hub import within_reach
from saekit_plugins.backends.model_folders import (
    NATIVE_CONFIG,
    check_causal_lm_folder,
    config_folder,
    loading,
    model_folder,
    ready,
    unknown_name,
)

if TYPE_CHECKING:
    from saekit.config import ModelConfig

__all__ = ["causal_lm_outline", "hooked_transformer_outline", "mamba_outline"]

_OF_SHAPES = ("fold_ln", "first_n_layers", "n_ctx")
"""What `from_pretrained` takes that decides how large a HookedTransformer is."""


@contextmanager
def _nothing_allocated() -> Iterator[None]:
    """What is made inside is on the meta device, where tensors have shapes and no memory."""
    import torch

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of starting values that cannot be drawn there; nobody uses them
        yield


def hooked_transformer_outline(model: ModelConfig, kwargs: Mapping[str, Any]) -> Any:
    """As :func:`saekit_plugins.backends.model_folders.load_model` would load it."""
    import torch

    with uncollected():
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens import loading_from_pretrained as known
    shapes = {"fold_ln": True, **{name: kwargs[name] for name in _OF_SHAPES if name in kwargs}}
    shapes |= {"device": "meta", "dtype": getattr(torch, model.dtype)}
    folder = model_folder(model.name, kwargs)
    if folder is not None and (folder / NATIVE_CONFIG).is_file():
        with loading(f"the configuration {folder / NATIVE_CONFIG}"):
            options = json.loads((folder / NATIVE_CONFIG).read_text(encoding="utf-8"))
            config = HookedTransformerConfig(**options, device="meta", dtype=shapes["dtype"], init_weights=False)
    elif folder is not None:
        with loading(f"the configuration of the model in {folder}"), config_folder(folder) as neutral:
            config = known.get_pretrained_model_config(neutral, **shapes)
    else:
        with within_reach():
            try:
                config = known.get_pretrained_model_config(model.name, **shapes)
            except Exception as error:  # of the library, of those below it, or of the network
                raise ModelError(unknown_name(model.name, error)) from error
    config.tokenizer_name = None  # it would be downloaded
    with _nothing_allocated():
        return ready(HookedTransformer(config, move_to_device=False), "meta")


def causal_lm_outline(model: ModelConfig, **options: Any) -> Any:
    """As :func:`saekit_plugins.backends.model_folders.load_causal_lm` would load it."""
    import torch

    with uncollected():
        from transformers import AutoConfig, AutoModelForCausalLM
    library: Any = AutoModelForCausalLM  # its methods have no types
    check_causal_lm_folder(model.name)
    attention = options.get("attn_implementation")
    with within_reach(unless=model.name), loading(f"the configuration of the model {model.name!r}"):
        config: Any = AutoConfig.from_pretrained(
            model.name, trust_remote_code=False, revision=options.get("revision", "main")
        )
        if getattr(config, "quantization_config", None) is not None or "quantization_config" in options:
            raise ModelError(f"the model {model.name!r} is quantized: how large it is shows when it is loaded")
        # Of kernels that need a GPU, the way in plain torch has the same shapes.
        attention = {"attn_implementation": attention if attention in ("eager", "sdpa") else None}
        with _nothing_allocated():
            made = library.from_config(config, dtype=getattr(torch, model.dtype), **attention)
    return ready(made, "meta")


def mamba_outline(model: ModelConfig) -> Any:
    """As ``HookedMamba.from_pretrained`` would load it."""
    import torch
    from transformers.utils.hub import cached_file

    with within_reach(unless=model.name), loading(f"the configuration of the Mamba model {model.name!r}"):
        place: Any = cached_file(model.name, "config.json")  # a path, or it raises
        options = json.loads(Path(place).read_text(encoding="utf-8"))
        if lacking := [name for name in ("d_model", "n_layer", "vocab_size") if name not in options]:
            raise ModelError(f"{model.name!r} is no Mamba in the original layout: config.json lacks {lacking[0]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mamba-lens imports names that its dependencies have deprecated
            from mamba_lens import HookedMamba
            from mamba_lens.HookedMamba import convert_original_config_to_hooked_mamba_config as converted
        config = converted(options, device="meta")
        with _nothing_allocated():
            made: Any = HookedMamba(config, tokenizer=None, initialize_params=False)
    return ready(made, getattr(torch, model.dtype))
