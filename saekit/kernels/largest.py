"""The largest of rows of numbers, by way of the largest of groups of them."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.kernels.sparse import SparseFeatures

__all__ = ["largest_of_each_row", "largest_of_groups", "number_of_groups"]


def number_of_groups(d_sae: int, k: int) -> int | None:
    """In how many groups of features the ``k`` largest are looked for; None: there are too few features."""
    groups = next((d_sae // width for width in (32, 8) if d_sae // width >= 2 * k), 0)
    return groups or None


def largest_of_groups(numbers: Tensor, groups: int) -> Tensor:
    """``[..., groups]``: the largest of each group of ``numbers [..., d_sae]``, of which a few may be left over."""
    width = numbers.shape[-1] // groups
    largest: Tensor = numbers[..., : groups * width].unflatten(-1, (width, groups)).amax(-2)
    return largest


def largest_of_each_row(entries: SparseFeatures, k: int) -> SparseFeatures:
    """The ``k`` entries of each row with the largest values, in the order of their features."""
    values, numbers = entries.padded()
    if values.shape[1] <= k:
        return entries
    values, places = values.topk(k, dim=1, sorted=False)
    chosen = numbers.gather(1, places).view(-1)
    if entries.n * k > len(entries) or bool((values == -torch.inf).any()):
        chosen = chosen[values.view(-1) != -torch.inf]
    keep = torch.zeros(len(entries), dtype=torch.bool, device=values.device).index_fill_(0, chosen, True)
    return entries.kept(keep)
