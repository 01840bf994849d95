"""The mathematics of ``groupmax``: those of ``topk`` with another selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from saekit.kernels import StepKernel
from saekit.sae import check_width
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from saekit_plugins.architectures.topk.module import TopKSAE

__all__ = ["GroupMaxSAE"]


class GroupMaxSAE(TopKSAE):
    """``f = relu(z)`` where ``z`` is the largest of its group, else 0; the first one where several are.

    :class:`ConfigError` when ``k`` does not divide the number of features.
    """

    step_kernels: ClassVar[Sequence[StepKernel[Any]]] = ()
    spreads_over = frozenset({"data", "features", "inference"})
    competes_over = None
    config: GroupMaxConfig
    _name: ClassVar[str] = "groupmax"

    def _largest(self, pre: Tensor, k: int) -> Tensor:
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        norms = self.feature_norms()
        compared, own = (pre if norms is None else pre * norms).relu(), k // self.share.parts
        values, places = compared.unflatten(-1, (own, -1)).max(dim=-1)
        first = torch.arange(0, self.d_sae, self.d_sae // own, device=pre.device)
        return torch.zeros_like(pre).scatter(-1, places + first, values)

    def why_not_split(self, parts: int) -> str | None:
        k = self.config.k
        return f"its {k} groups of features (sae.k) are not as many in each part" if k % parts else None

    def public_config(self) -> dict[str, Any]:
        return {"architecture": self.info.architecture}
