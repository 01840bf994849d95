"""The SAE module, its mathematics, its kernels and its folder on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports
from saekit.config import SAEConfig

if TYPE_CHECKING:
    from saekit.sae.hooks import HookPoint
    from saekit.sae.init import geometric_median
    from saekit.sae.kernels import Encoder, Features, active_groups, top_groups
    from saekit.sae.maths import ghost_loss, sparsity_penalty, spread, squared_errors
    from saekit.sae.module import SAE, SAEInfo, StepInput, StepOutput
    from saekit.sae.penalty import SparsityPenalty
    from saekit.sae.screen import screen_for, why_no_screen
    from saekit.sae.sparse import SparseFeatures
    from saekit.sae.step import FastStep

__all__ = [
    "SAE",
    "Encoder",
    "FastStep",
    "Features",
    "HookPoint",
    "SAEConfig",
    "SAEInfo",
    "SparseFeatures",
    "SparsityPenalty",
    "StepInput",
    "StepOutput",
    "active_groups",
    "geometric_median",
    "ghost_loss",
    "screen_for",
    "sparsity_penalty",
    "spread",
    "squared_errors",
    "top_groups",
    "why_no_screen",
]

_MODULES = {
    "hooks": ["HookPoint"],
    "init": ["geometric_median"],
    "kernels": ["Encoder", "Features", "active_groups", "top_groups"],
    "maths": ["ghost_loss", "sparsity_penalty", "spread", "squared_errors"],
    "module": ["SAE", "SAEInfo", "StepInput", "StepOutput"],
    "penalty": ["SparsityPenalty"],
    "screen": ["screen_for", "why_no_screen"],
    "sparse": ["SparseFeatures"],
    "step": ["FastStep"],
}

__getattr__, __dir__ = lazy_exports(
    __name__, {name: f"saekit.sae.{module}" for module, names in _MODULES.items() for name in names}
)
