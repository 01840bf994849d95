"""What the files of sae-lens say of its architectures ``matching_pursuit`` and ``temporal``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from saekit.errors import SAEFormatError
from saekit_plugins.loaders.sae_lens.config import FoundConfig

__all__ = ["OTHERS"]


def _matching_pursuit(config: FoundConfig, place: str) -> tuple[str, dict[str, Any]]:
    flat = config.flat
    threshold, flag = flat.get("residual_threshold", 1e-2), flat.get("stop_on_duplicate_support", True)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise SAEFormatError(f"residual_threshold in {place} is {threshold!r}, expected a number")
    if not isinstance(flag, bool):
        raise SAEFormatError(f"stop_on_duplicate_support in {place} is {flag!r}, expected true or false")
    return "saekit:matching_pursuit", {
        "residual_threshold": max(float(threshold), 0.0),  # below 0 it does what 0 does
        "max_iterations": None if "max_iterations" not in flat else _count(config, "max_iterations", place),
        "stop_on_duplicate_support": flag,
    }


def _temporal(config: FoundConfig, place: str) -> tuple[str, dict[str, Any]]:
    flat = config.flat
    tied, kind = flat.get("tied_weights"), flat.get("sae_diff_type")
    if not isinstance(tied, bool):
        raise SAEFormatError(f"tied_weights in {place} is {tied!r}, expected true or false")
    if kind not in ("relu", "topk"):
        raise SAEFormatError(f"sae_diff_type in {place} is {kind!r}, expected 'relu' or 'topk'")
    scale = 1.0
    if flat.get("normalize_activations") == "constant_scalar_rescale":
        scale = flat.get("activation_normalization_factor", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise SAEFormatError(f"activation_normalization_factor in {place} is {scale!r}, expected a number above 0")
    return "saekit:temporal", {
        **{name: _count(config, name, place) for name in ("n_heads", "bottleneck_factor")},
        "n_attn_layers": _count(config, "n_attn_layers", place, least=0),
        "sae_diff_type": kind,
        "kval_topk": None if "kval_topk" not in flat else _count(config, "kval_topk", place),
        "tied_weights": tied,
        "input_scale": float(scale),
    }


def _count(config: FoundConfig, name: str, place: str, least: int = 1) -> int:
    value = config.flat.get(name)
    if type(value) is not int or value < least:
        raise SAEFormatError(f"{name} in {place} is {value!r}, expected a whole number of {least} or more")
    return value


OTHERS: Mapping[str, Callable[[FoundConfig, str], tuple[str, dict[str, Any]]]] = {
    "matching_pursuit": _matching_pursuit,
    "temporal": _temporal,
}
"""By the name that sae-lens has: saekit's architecture and its options."""
