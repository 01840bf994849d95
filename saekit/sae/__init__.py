"""The SAE module, its mathematics, its kernels and its folder on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports
from saekit.config import SAEConfig

if TYPE_CHECKING:
    from saekit.sae.auxk import add_auxk
    from saekit.sae.hooks import HookPoint
    from saekit.sae.init import geometric_median
    from saekit.sae.kernels import Encoder, Features, active_groups, dense_above
    from saekit.sae.largest import batch_top, top_groups
    from saekit.sae.maths import auxk_loss, ghost_loss, sparsity_penalty, spread, squared_errors, variance_ratio
    from saekit.sae.module import SAE
    from saekit.sae.penalty import SparsityPenalty
    from saekit.sae.records import SAEInfo, StepInput, StepOutput
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
    "add_auxk",
    "auxk_loss",
    "batch_top",
    "dense_above",
    "geometric_median",
    "ghost_loss",
    "screen_for",
    "sparsity_penalty",
    "spread",
    "squared_errors",
    "top_groups",
    "variance_ratio",
    "why_no_screen",
]

_MODULES = {
    "auxk": ["add_auxk"],
    "hooks": ["HookPoint"],
    "init": ["geometric_median"],
    "kernels": ["Encoder", "Features", "active_groups", "dense_above"],
    "largest": ["batch_top", "top_groups"],
    "maths": ["auxk_loss", "ghost_loss", "sparsity_penalty", "spread", "squared_errors", "variance_ratio"],
    "module": ["SAE"],
    "records": ["SAEInfo", "StepInput", "StepOutput"],
    "penalty": ["SparsityPenalty"],
    "screen": ["screen_for", "why_no_screen"],
    "sparse": ["SparseFeatures"],
    "step": ["FastStep"],
}

__getattr__, __dir__ = lazy_exports(
    __name__, {name: f"saekit.sae.{module}" for module, names in _MODULES.items() for name in names}
)
