"""Dense products in the precision that torch is asked for.

``torch.set_float32_matmul_precision("medium")`` allows products of bfloat16, summed in float32.  CPUs that multiply
bfloat16 do so in torch; on CUDA torch makes TF32 of it, at half of the speed.  There operands are rounded here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.precision import current_precision

__all__ = ["Operands", "add_product_", "product", "rounds"]

_ROUNDED_HERE = frozenset({"cuda"})


@attrs.define(eq=False)
class Operands:
    """Matrices that do not change meanwhile: each is rounded once."""

    _rounded: dict[int, tuple[Tensor, Tensor]] = attrs.field(factory=dict, init=False)

    def rounded(self, matrix: Tensor) -> Tensor:
        """``matrix`` in bfloat16, in the memory order that it has."""
        known = self._rounded.get(id(matrix))
        if known is None:
            known = self._rounded[id(matrix)] = matrix, matrix.bfloat16()  # kept, so that the number stays its own
        return known[1]


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None, standing: Operands | None = None) -> Tensor:
    """``left @ right``; written to ``out`` where that is given.  ``standing`` is where ``right`` is remembered."""
    if not rounds(left):
        return torch.mm(left, right, out=out) if out is not None else torch.mm(left, right)
    short, other = left.bfloat16(), right.bfloat16() if standing is None else standing.rounded(right)
    if _has_wide_sums(left.device.type):
        return _wide(short, other, out)
    return torch.mm(short.float(), other.float(), out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total += left @ right``."""
    return total.add_(product(left, right)) if rounds(left) else total.addmm_(left, right)


def rounds(left: Tensor) -> bool:
    """Whether the operands of a product with ``left`` are rounded here."""
    return left.device.type in _ROUNDED_HERE and left.dtype == torch.float32 and current_precision() == "medium"


def _wide(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """Of bfloat16, in float32."""
    multiply: Any = torch.mm  # which type checkers do not know with a type of what comes out
    found: Tensor = (
        multiply(left, right, torch.float32, out=out) if out is not None else multiply(left, right, torch.float32)
    )
    return found


@cache
def _has_wide_sums(device: str) -> bool:
    """Whether torch (from 2.8 on, on CUDA) gives float32 for a product of bfloat16."""
    with torch.inference_mode(False), torch.no_grad():
        one = torch.eye(16, device=device, dtype=torch.bfloat16)
        try:
            return _wide(one, one, torch.empty(16, 16, device=device)).dtype == torch.float32
        except (NotImplementedError, RuntimeError, TypeError):
            return False
