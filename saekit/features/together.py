"""What is active together with what, from sums that need no more than some rows of the whole matrix at once."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.features.merging import PartRows
from saekit.features.subject import Sums, by_number

__all__ = ["neuron_partners", "strongest", "together"]

_BYTES = 1 << 26  # of one number of each pair of features that is worked on at once
_MEASURED = 1 << 22  # likewise, where measures are made of sums
_ROWS = 1024  # likewise, where rows are made dense
_DENSE = 40  # how many products of dense matrices take as long as one of a pair that is looked up
_WIDTH = 4096  # of an SAE, for which sums are gone through once for every part: of a wider one, for several parts
_MKL = torch.backends.mkl.is_available()  # whose product of sparse matrices is the fast one


def together(
    paths: Sequence[Path],
    features: NDArray[np.int64],
    sums: Sums,
    k: int,
    report: Callable[[int], Any] = lambda features: None,
) -> dict[str, Tensor]:
    """The ``k`` features that go with each of ``features`` most, by correlation and by Jaccard index, as tables.

    Only those that fire together with it at least once.  Correlations are Pearson's over all tokens that count, zeros
    included, from ``Σx``, ``Σx²``, ``Σxy`` and ``n``.
    """
    parts = [PartRows(path) for path in paths]
    workers = torch.get_num_threads()
    size = max(min(_BYTES // (8 * workers * len(sums.fired)), -(-len(features) // workers)), 1)
    blocks = [(first, min(first + size, len(features))) for first in range(0, len(features), size)]
    found: dict[str, list[Tensor]] = {}
    with ThreadPoolExecutor(workers, "saekit-together") as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")  # that torch may change them
        for (first, last), tables in zip(
            blocks, pool.map(partial(_of_block, parts, features, sums, k), blocks), strict=True
        ):
            for name, table in tables.items():
                found.setdefault(name, []).append(table)
            report(last - first)
    return {name: torch.cat(tables) for name, tables in found.items()}


def _of_block(
    parts: Sequence[PartRows], features: NDArray[np.int64], sums: Sums, k: int, block: tuple[int, int]
) -> dict[str, Tensor]:
    """The tables of the features at the places ``block``."""
    first, last = block
    d_sae = len(sums.fired)
    exact = torch.float32 if sums.tokens < 1 << 24 else torch.float64  # numbers of tokens are
    products, both = (torch.zeros(last - first, d_sae, dtype=dtype) for dtype in (torch.float64, exact))
    together = max(d_sae // _WIDTH, 1)  # of the parts: it hangs on no block, so that sums do not, either
    for start in range(0, len(parts), together):
        _add(parts[start : start + together], first, last, products, both)
    found: dict[str, list[Tensor]] = {}
    step = max(_MEASURED // (8 * d_sae), 1)
    split = (x.split(step) for x in (torch.from_numpy(features[first:last]), products, both))
    for own, some_products, some_both in zip(*split, strict=True):
        some_both[torch.arange(len(own)), own] = 0
        rows, numbers = some_both.nonzero(as_tuple=True)
        columns = _measures(own[rows], numbers, some_products[rows, numbers], some_both[rows, numbers], sums)
        for by in ("pearson", "jaccard"):
            values = torch.full(some_products.shape, -torch.inf, dtype=torch.float64)
            values[rows, numbers] = columns[by]
            high = columns[by] >= _least(values, k)[rows]
            some = {name: column[high] for name, column in columns.items()}
            for name, table in _picked(by, rows[high], numbers[high], some, k, values.shape).items():
                found.setdefault(f"features_by_{by}_{name}", []).append(table)
    return {name: torch.cat(tables) for name, tables in found.items()}


def _measures(own: Tensor, others: Tensor, products: Tensor, both: Tensor, sums: Sums) -> dict[str, Tensor]:
    """``[pairs]`` each; numbers that are none, of what never varies, are 0."""
    n, both = max(sums.tokens, 1), both.double()
    fired = sums.fired.double()
    covariance = products - sums.total[own] * (sums.total / n)[others]
    variance = (sums.squares - sums.total.square() / n).clamp_min(0)
    pearson = covariance / (variance[own] * variance[others]).sqrt()
    cosine = products / (sums.squares[own] * sums.squares[others]).sqrt()
    jaccard = both / (fired[own] + fired[others] - both)
    named = {"pearson": pearson, "cos": cosine, "jaccard": jaccard}
    return {name: value.nan_to_num_(0, 0, 0).clamp_(-1, 1) for name, value in named.items()}


def neuron_partners(sums: Sums, features: NDArray[np.int64], k: int) -> dict[str, Tensor]:
    """The ``k`` neurons that correlate most with each of ``features``, as tables."""
    n, found = max(sums.tokens, 1), dict[str, list[Tensor]]()
    variance = (sums.neuron_squares - sums.neuron_total.square() / n).clamp_min(0)
    for own, products in zip(torch.from_numpy(features).split(4096), sums.products.split(4096), strict=True):
        squares, total = sums.squares[own][:, None], sums.total[own][:, None]
        of_feature = (squares - total.square() / n).clamp_min(0)
        columns = {
            "pearson": (products - total * (sums.neuron_total / n)) / (of_feature * variance).sqrt(),
            "cos": products / (squares * sums.neuron_squares).sqrt(),
        }
        columns = {name: value.nan_to_num_(0, 0, 0).clamp_(-1, 1) for name, value in columns.items()}
        never = (sums.fired[own] == 0)[:, None].expand_as(products)
        for name, table in strongest("pearson", columns, k, never).items():
            found.setdefault(f"neurons_{name}", []).append(table)
    return {name: torch.cat(tables) for name, tables in found.items()}


def strongest(by: str, columns: dict[str, Tensor], k: int, none: Tensor) -> dict[str, Tensor]:
    """Of ``columns [b, n]`` the ``k`` largest of each row by one of them, with their numbers as ``index``.

    Of equal ones those with the lowest numbers.  Where ``none [b, n]`` is true there is nothing; a row with fewer is
    filled with -1 and zeros.
    """
    values = columns[by].masked_fill(none, -torch.inf)
    rows, numbers = ((values >= _least(values, k)[:, None]) & (values > -torch.inf)).nonzero(as_tuple=True)
    some = {name: column[rows, numbers] for name, column in columns.items()}
    return _picked(by, rows, numbers, some, k, values.shape)


def _least(values: Tensor, k: int) -> Tensor:
    """``[b]``: the least of the ``k`` largest of each row of ``values [b, n]``."""
    k = min(k, values.shape[1])
    return values.topk(k, dim=1).values[:, -1] if k else values.new_full((len(values),), torch.inf)


def _picked(
    by: str, rows: Tensor, numbers: Tensor, columns: dict[str, Tensor], k: int, shape: Sequence[int]
) -> dict[str, Tensor]:
    """The tables of :func:`strongest`, of numbers ``[entries]`` in a matrix of this shape, the ``k`` largest of each
    row among them."""
    length, k = shape[0], min(k, shape[1])
    order = torch.from_numpy(np.lexsort((numbers.numpy(), -columns[by].numpy(), rows.numpy())))
    rows, numbers = rows[order], numbers[order]
    starts = torch.searchsorted(rows, torch.arange(length))
    place = torch.arange(len(rows)) - starts[rows]
    kept = place < k
    rows, numbers, place, order = rows[kept], numbers[kept], place[kept], order[kept]
    index = torch.full((length, k), -1, dtype=torch.int32)
    index[rows, place] = numbers.int()
    found = {"index": index}
    for name, column in columns.items():
        found[name] = torch.zeros(length, k, dtype=torch.float32)
        found[name][rows, place] = column[order].float()
    return found


@attrs.frozen(eq=False)
class _Block:
    """The entries of a block of features in a part, and all entries of the rows that they are in."""

    owners: Tensor
    places: Tensor
    """Which of the rows each is in."""
    values: Tensor
    lengths: Tensor
    """Of the rows."""
    features: Tensor
    others: Tensor
    """Values of all entries of the rows."""


def _add(parts: Sequence[PartRows], first: int, last: int, products: Tensor, both: Tensor) -> None:
    """Add ``Σ x_f x_g`` to ``products`` and the number of tokens with both to ``both [b, d_sae]``, for the features
    ``first`` to ``last``, of some parts.

    Each sum goes through them in the order of the text.
    """
    blocks = []
    for part in parts:
        entries = part.entries(first, last)
        if not len(entries):
            continue
        owners, rows, values = part.owners(first, last), part.rows(entries), part.values[entries]
        if int(part.lengths[rows].sum()) * _DENSE > len(part.places) * products.numel():
            _add_dense(part, rows, owners, values, products, both)
        else:
            some, lengths, inside = _rows_with(part, rows)
            places = torch.searchsorted(some, rows)
            blocks.append(_Block(owners, places, values, lengths, part.features[inside], part.values[inside]))
    if blocks:
        _add_sparse(blocks, products, both)


def _rows_with(part: PartRows, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | slice]:
    """Which ``rows`` those are, each once, their lengths, and the entries that are in them."""
    has = torch.zeros(len(part.places), dtype=torch.bool)
    has[rows] = True
    some = has.nonzero()[:, 0]
    lengths = part.lengths[some]
    if len(some) == len(has):
        return some, lengths, slice(None)
    total = int(lengths.sum())
    before = lengths.cumsum(0) - lengths
    inside = torch.repeat_interleave(part.starts[some] - before, lengths, output_size=total)
    return some, lengths, inside.add_(torch.arange(total))


def _add_sparse(blocks: Sequence[_Block], products: Tensor, both: Tensor) -> None:
    owners, values, features, others, lengths = (
        torch.cat([getattr(one, name) for one in blocks])
        for name in ("owners", "values", "features", "others", "lengths")
    )
    firsts = [0, *itertools.accumulate(len(one.lengths) for one in blocks)]
    places = torch.cat([one.places + begin for one, begin in zip(blocks, firsts, strict=False)])
    if len(blocks) > 1:
        order = by_number(owners, len(products))
        owners, values, places = owners[order], values[order], places[order]
    starts, other_starts = (_starts(x) for x in (torch.bincount(owners, minlength=len(products)), lengths))
    shapes = (len(products), len(lengths)), (len(lengths), products.shape[1])
    for own, all_of_them, out in (
        (values.double(), others.double(), products),
        (both.new_ones(len(values)), both.new_ones(len(others)), both),
    ):
        _add_product((starts, places, own, shapes[0]), (other_starts, features, all_of_them, shapes[1]), out)


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


_Sparse = tuple[Tensor, Tensor, Tensor, tuple[int, int]]
"""Starts of rows, columns, values, and the shape."""


def _add_product(one: _Sparse, other: _Sparse, out: Tensor) -> None:
    """``out += one other``."""
    if _MKL:
        left, right = (
            torch.sparse_csr_tensor(starts.int(), columns.int(), values, shape)
            for starts, columns, values, shape in (one, other)
        )
        torch.addmm(out, left, right, out=out)
        return
    left, right = (
        torch.sparse_coo_tensor(
            torch.stack([torch.repeat_interleave(torch.arange(shape[0]), starts.diff()), columns.long()]), values, shape
        ).coalesce()
        for starts, columns, values, shape in (one, other)
    )
    out += torch.sparse.mm(left, right)


def _add_dense(part: PartRows, rows: Tensor, owners: Tensor, values: Tensor, products: Tensor, both: Tensor) -> None:
    """As products of matrices, where most features are active on most tokens."""
    order = torch.sort(rows, stable=True).indices
    owners, rows, values = owners[order], rows[order], values[order].double()
    for start in range(0, len(part.places), _ROWS):
        stop = min(start + _ROWS, len(part.places))
        mine = slice(*torch.searchsorted(rows, torch.tensor([start, stop])).tolist())
        own = torch.zeros(stop - start, len(products), dtype=torch.float64)
        own[rows[mine] - start, owners[mine]] = values[mine]
        first, last = int(part.starts[start]), int(part.starts[stop])
        where = torch.repeat_interleave(torch.arange(stop - start), part.lengths[start:stop])
        everything = torch.zeros(stop - start, products.shape[1], dtype=torch.float64)
        everything[where, part.features[first:last].long()] = part.values[first:last].double()
        products += own.T @ everything
        both += (own != 0).float().T @ (everything != 0).float()
