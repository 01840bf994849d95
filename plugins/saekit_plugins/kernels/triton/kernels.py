"""The steps of TopK and BatchTopK SAEs whose sparse products are made in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from saekit.kernels import Encoder, SparseFeatures
from saekit_plugins.architectures.batchtopk.module import BatchTopKKernel
from saekit_plugins.architectures.topk.module import TopKKernel
from saekit_plugins.kernels.triton.products import INTERPRETED, TritonFeatures

__all__ = ["TritonBatchTopKKernel", "TritonTopKKernel"]


class _InTriton:
    """What the kernels of several architectures have in common."""

    name = "Triton kernels"
    sparse: ClassVar[type[SparseFeatures]] = TritonFeatures

    def __init__(self, config: Any = None) -> None:
        """There are no options."""
        self.devices = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})

    def chosen(
        self, sae: Any, encoder: Encoder, centered: Tensor, norms: Tensor | None, wanted: int
    ) -> Iterator[tuple[int, SparseFeatures]]:
        groups = super().chosen(sae, encoder, centered, norms, wanted)  # type: ignore[misc]
        for start, found in groups:
            yield start, TritonFeatures.of(found)


class TritonTopKKernel(_InTriton, TopKKernel):
    """For ``topk``."""

    spreads_over = frozenset({"data", "features"})


class TritonBatchTopKKernel(_InTriton, BatchTopKKernel):
    """For ``batchtopk``."""

    spreads_over = frozenset({"data", "features"})
