"""The largest of numbers that lie on many processes, found without telling each other the numbers.

Numbers become whole ones in the same order, and their digits are found from the first to the last, as a radix selection
does (Knuth 1998, "The Art of Computer Programming 3", section 5.2.5): for each digit all add up how many of the numbers
that are left have it, or a larger one.  What is sent does not depend on how many numbers there are, and no device is
waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saekit.distributed.sizes import digit_ends

__all__ = ["keys_bits", "sorted_keys", "threshold"]


def keys_bits(dtype: torch.dtype) -> int:
    """Bits of the keys of numbers of a type: float64 has 64, what is shorter is compared in float32."""
    return 64 if dtype == torch.float64 else 32


def sorted_keys(values: Tensor) -> Tensor:
    """int64 ``[..., m]`` in the order of ``values [..., m]``; what is no number is above all, as in topk."""
    bits = keys_bits(values.dtype)
    wide, whole = (torch.float64, torch.int64) if bits == 64 else (torch.float32, torch.int32)
    values = values.to(wide) + 0.0  # zero has two signs
    keys = values.contiguous().view(whole)
    keys = torch.where(keys < 0, keys ^ torch.iinfo(whole).max, keys)  # below zero, a larger size is less
    return keys.masked_fill_(values.isnan(), torch.iinfo(whole).max).to(torch.int64)


def threshold(
    keys: Tensor, wanted: int, bits: int, digit: int, sum_of_all: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of each row of the ``keys [..., m]`` of all processes the ``wanted``-th largest, and how many of those equal to
    it are wanted: int64 ``[...]`` both.

    Where there are fewer, the least key that there may be.  ``digit`` are the bits of a digit, and ``sum_of_all`` adds
    up what every process gives.
    """
    left = torch.full(keys.shape[:-1], wanted, dtype=torch.int64, device=keys.device)
    prefix = torch.zeros_like(left)
    above = bits  # of the prefix
    for below in digit_ends(bits, digit):
        first, size = above == bits, 1 << (above - below)
        found = (keys >> below) + size // 2 if first else (keys >> below) & (size - 1)  # the first has the sign
        there = torch.ones_like(keys) if first else (keys >> above == prefix.unsqueeze(-1)).to(torch.int64)
        counts = torch.zeros(*left.shape, size, dtype=torch.int64, device=keys.device).scatter_add_(-1, found, there)
        counts = sum_of_all(counts[..., 1:].to(torch.int64 if left.dim() == 0 else torch.int32).contiguous()).long()
        least = counts.flip(-1).cumsum(-1).flip(-1)  # as many have this digit or a larger one, from 1 on
        chosen = (least >= left.unsqueeze(-1)).sum(-1)
        larger = torch.cat([least, torch.zeros_like(least[..., :1])], -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        left = left - larger
        prefix = chosen - size // 2 if first else (prefix << (above - below)) + chosen
        above = below
    return prefix, left
