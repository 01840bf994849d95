"""What transformer_lens does to weights as it loads a model, and which hooks hold something else for it.

A helper of the backends' plugins, not a plugin.  By the library's own functions: ``fold_ln`` moves the weights of norms
into the layers that read them, ``center_writing_weights`` takes its mean from all that is written to the residual
stream of a model with LayerNorm, ``fold_value_biases`` adds the biases of values to that of the attention's output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saekit.for_sae_lens import BY_DEFAULT, NO_PROCESSING
from saekit.hub import is_path
from saekit_plugins.backends.model_folders import PROCESSING, is_native

__all__ = ["NOTHING", "at_hooks", "of_metadata", "seen_in"]

NOTHING = NO_PROCESSING
"""The weights as they are."""
_CENTER, _VALUES = "center_writing_weights", "fold_value_biases"
_FEW = 64  # rows of the embedding
_NO_MEAN = 5e-3  # of the deviation: what is centered has 4e-4 in bfloat16, what is not 4e-2 at a width of 4,096
_VALUE_BIAS = re.compile(
    r".*\b(?:(?:c_attn|v_proj|query_key_value|qkv_proj|qkv|v)(?:\._original_component)?\.bias|_?b_V)"
)

_PLACES = tuple(
    (re.compile(rf"(?:.*\.)?(?:{names})"), frozenset(chosen))
    for names, chosen in (
        (r"hook_(?:embed|pos_embed|resid_pre|resid_mid|resid_post|attn_out|mlp_out|attn_in|mlp_in|[qkv]_input|result)",
         [_CENTER]),
        (r"(?:ln\w*\.)hook_normalized", ["fold_ln"]),
        (r"hook_(?:q|k|rot_q|rot_k)", ["refactor_factored_attn_matrices"]),
        (r"hook_[vz]", [_VALUES, "refactor_factored_attn_matrices"]),
        (r"(?:ln\w*\.)hook_scale|hook_(?:attn_scores|pattern)|mlp\.hook_(?:pre|post|pre_linear)", []),
    )
)  # fmt: skip
"""By transformer_lens' names of hooks: what makes a difference there.  At others, all may."""


def at_hooks(known: Mapping[str, bool], names: Iterable[str] | str | None, model: Any) -> dict[str, bool]:
    """Of ``known`` what makes a difference at one place of ``model``, by all its ``names``; None: anywhere in it."""
    found = {name: done for name, done in known.items() if name in _apply_to(model)}
    if names is None:
        return found
    for name in names:
        for pattern, chosen in _PLACES:
            if pattern.fullmatch(name):
                return {one: done for one, done in found.items() if one in chosen}
    return found


def _apply_to(model: Any) -> set[str]:
    """What would change anything in a model: without LayerNorm nothing is centered, without biases none is folded."""
    norms = {type(module).__name__ for module in model.modules()}
    is_rms = any("RMS" in name for name in norms) and not any("LayerNorm" in name for name in norms)
    biased = any(_VALUE_BIAS.fullmatch(name) for name, _ in model.named_parameters())
    return {*PROCESSING} - ({_CENTER} if is_rms else set()) - (set() if biased else {_VALUES})


def of_metadata(about: Mapping[str, Any]) -> dict[str, bool]:
    """As an SAE's metadata says that its model was loaded; empty where it does not say it.

    Of a folder that is not here, nobody knows of which kind it was.
    """
    saved = about.get("model_processing")
    if isinstance(saved, Mapping):
        return {name: bool(done) for name, done in saved.items()}
    kind, name = about.get("model_class_name"), about.get("model_name")
    if kind == "AutoModelForCausalLM":
        return dict(NOTHING)
    if kind == "TransformerBridge":
        if not about.get("model_compatibility_mode"):
            return dict(NOTHING)
        return {one: bool(about.get(f"model_{one}", done)) for one, done in BY_DEFAULT.items()}
    options = about.get("model_from_pretrained_kwargs")
    lens = kind == "HookedTransformer" or (kind is None and isinstance(options, Mapping))
    if not lens or not isinstance(name, str) or name in ("", "custom") or is_native(name):
        return {}
    if is_path(name) and not Path(name).is_dir():
        return {}
    given = options if isinstance(options, Mapping) else {}
    return {one: bool(given.get(one, done)) for one, done in BY_DEFAULT.items()}


def seen_in(model: Any) -> dict[str, bool]:
    """What was done to the weights of a HookedTransformer, as far as they show it."""
    norm = getattr(getattr(model, "cfg", None), "normalization_type", None)
    if norm not in ("LN", "LNPre", "RMS", "RMSPre"):
        return {}
    found = {"fold_ln": norm.endswith("Pre")}
    rows = model.W_E[:_FEW]
    if rows.is_meta:
        return found
    if norm.startswith("LN"):
        rows = rows.detach().float()
        found[_CENTER] = bool(rows.mean(-1).abs().max() <= _NO_MEAN * rows.std())
    attention = [block.attn for block in model.blocks if hasattr(block, "attn")]
    values, outputs = (any(bool(getattr(one, name).any()) for one in attention) for name in ("b_V", "b_O"))
    if values or outputs:  # else there is none
        found[_VALUES] = not values
    return found
