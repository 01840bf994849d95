"""Moments of the rows of a product of two matrices, in blocks, so that the product is never there as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient

__all__ = ["Moments", "row_moments"]

_ROWS, _COLUMNS = 512, 4096
"""Of a block of the product: 8 MiB, so that what is made of it stays near the processor."""


@attrs.frozen(eq=False)
class Moments:
    """Of each row, over the columns; float64 ``[n]``."""

    mean: Tensor
    std: Tensor
    """Of the population: divided by the number of columns."""
    skewness: Tensor
    """``E z³`` with ``z = (x − mean) / std``; NaN for a row whose values are all the same."""
    kurtosis: Tensor
    """``E z⁴``, which is 3 of a normal distribution: not the excess."""


@ambient()
@torch.no_grad()
def row_moments(
    rows: Callable[[slice], Tensor], n: int, columns: Tensor, *, report: Callable[[int], None] | None = None
) -> Moments:
    """Those of ``R C``, for ``R [n, d]``, of which ``rows`` gives a slice at a time, and ``columns`` ``C [d, m]``.

    The product is made of columns less their mean, so that nothing is lost where the mean of a row is large beside its
    spread; sums over blocks are in float64.  ``report`` is told of rows that are done.
    """
    center = _mean(columns)
    found: dict[str, list[Tensor]] = {name: [] for name in ("mean", "std", "skewness", "kurtosis")}
    for begin in range(0, n, _ROWS):
        part = rows(slice(begin, min(begin + _ROWS, n))).to(columns.device, center.dtype)
        sums = torch.zeros(4, len(part), dtype=torch.float64, device=part.device)
        for block in _centered(columns, center):
            product = part @ block
            square = product * product
            sums[0] += product.sum(1).double()
            sums[1] += square.sum(1).double()
            sums[2] += product.mul_(square).sum(1).double()
            sums[3] += square.mul_(square).sum(1).double()
        first, second, third, fourth = sums / columns.shape[1]  # about the mean, but for rounding, which `first` is
        variance = (second - first**2).clamp(min=0)
        std = variance.sqrt()
        skew = third - 3 * first * second + 2 * first**3
        kurtosis = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        middle = part.double() @ center.double()
        flat = variance <= 1e-12 * middle.square()
        found["mean"].append(middle + first)
        found["std"].append(std)
        found["skewness"].append((skew / std**3).masked_fill(flat, torch.nan))
        found["kurtosis"].append((kurtosis / variance**2).masked_fill(flat, torch.nan))
        if report is not None:
            report(len(part))
    whole = {name: torch.cat(parts).cpu() if parts else torch.empty(0).double() for name, parts in found.items()}
    return Moments(**whole)


def _mean(columns: Tensor) -> Tensor:
    """``[d]``: of all columns, in float32 at least.  What rounding leaves of it is seen in the sums, and taken off."""
    kind = torch.promote_types(columns.dtype, torch.float32)
    total = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    for block in columns.split(_COLUMNS, dim=1):
        total += (block.to(kind) @ torch.ones(block.shape[1], dtype=kind, device=block.device)).double()
    return (total / columns.shape[1]).to(kind)


def _centered(columns: Tensor, center: Tensor) -> Iterator[Tensor]:
    """In one memory, which the next block takes: what is asked for anew each time would stay in pieces."""
    whole = torch.empty(len(columns) * min(_COLUMNS, columns.shape[1]), dtype=center.dtype, device=columns.device)
    for block in columns.split(_COLUMNS, dim=1):
        yield torch.sub(block, center[:, None], out=whole[: block.numel()].view(block.shape))
