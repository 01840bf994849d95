"""Parts of numbers that are drawn for a whole, by whoever has no room for that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["drawn_part"]

_PIECE = 1 << 22  # numbers that are drawn together, a multiple of those of normal ones
_NORMALS = 16  # normal numbers that torch makes together


def drawn_part(
    draw: Callable[[Tensor], object],
    shape: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    like: torch.dtype = torch.float32,
) -> Tensor:
    """Of a matrix of ``shape``, the ``rows`` and ``columns`` from the first numbers on, as many as the second say.

    ``draw`` fills memory of the CPU in its order, from one generator alone.  It is asked for some numbers of the whole
    at a time, so that nobody has all of it; torch draws the same numbers so, and leaves the generator the same.
    """
    (height, width), (row, n), (column, own) = shape, rows, columns
    total = height * width
    kept = torch.empty(n, own, dtype=like, device="cpu")
    memory = torch.empty(min(total, _PIECE + _NORMALS), dtype=like, device="cpu")
    at = 0
    while at < total:
        end = at + _PIECE if total - at >= _PIECE + _NORMALS else total
        draw(piece := memory[: end - at])
        first, last = max(at // width, row), min(-(-end // width), row + n)
        whole, behind = max(-(-at // width), first), min(end // width, last)
        if whole < behind:  # rows that are in the piece from end to end, all at a time
            rows_of_piece = piece[whole * width - at : behind * width - at].view(-1, width)
            kept[whole - row : behind - row] = rows_of_piece[:, column : column + own]
        else:
            whole = behind = last
        for place in (*range(first, min(whole, last)), *range(behind, last)):
            mine = place * width + column
            begin, stop = max(at, mine), min(end, mine + own)
            if begin < stop:
                kept[place - row, begin - mine : stop - mine] = piece[begin - at : stop - at]
        at = end
    return kept
