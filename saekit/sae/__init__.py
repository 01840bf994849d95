"""The SAE module, its mathematics and its folder on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports
from saekit.config import SAEConfig

if TYPE_CHECKING:
    from saekit.sae.hooks import HookPoint
    from saekit.sae.init import geometric_median
    from saekit.sae.maths import ghost_loss, sparsity_penalty, squared_errors
    from saekit.sae.module import SAE, SAEInfo, StepInput, StepOutput

__all__ = [
    "SAE",
    "HookPoint",
    "SAEConfig",
    "SAEInfo",
    "StepInput",
    "StepOutput",
    "geometric_median",
    "ghost_loss",
    "sparsity_penalty",
    "squared_errors",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "HookPoint": "saekit.sae.hooks",
        "SAE": "saekit.sae.module",
        "SAEInfo": "saekit.sae.module",
        "StepInput": "saekit.sae.module",
        "StepOutput": "saekit.sae.module",
        "geometric_median": "saekit.sae.init",
        "ghost_loss": "saekit.sae.maths",
        "sparsity_penalty": "saekit.sae.maths",
        "squared_errors": "saekit.sae.maths",
    },
)
