"""The mathematics of ``abstopk``: those of ``topk`` with another selection, and without ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from saekit.kernels import StepKernel
from saekit.sae import check_width
from saekit_plugins.architectures.abstopk import AbsTopKConfig
from saekit_plugins.architectures.topk.module import TopKSAE

__all__ = ["AbsTopKSAE"]


class AbsTopKSAE(TopKSAE):
    """``f = z`` where ``|z|`` is among the ``k`` largest of the row, else 0.

    Dead features are chosen by size for AuxK, too, as sae-lens does.
    """

    step_kernels: ClassVar[Sequence[StepKernel[Any]]] = ()
    spreads_over = frozenset({"data", "features", "inference"})
    config: AbsTopKConfig
    _name: ClassVar[str] = "abstopk"
    aux_by_size = True

    def _largest(self, pre: Tensor, k: int) -> Tensor:
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        norms = self.feature_norms()
        compared = pre if norms is None else pre * norms
        _, features, among = self.share.largest(compared.abs(), k)
        values = compared.gather(-1, features)
        return torch.zeros_like(pre).scatter(-1, features, values if among is None else values.where(among, 0))

    def public_config(self) -> dict[str, Any]:
        return super().public_config() | {"architecture": "abstopk"}
