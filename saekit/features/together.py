"""What is active together with what, from sums that need no more than some rows of the whole matrix at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.features.merging import PartRows
from saekit.features.subject import Sums

__all__ = ["neuron_partners", "strongest", "together"]

_BYTES = 1 << 22  # of the sums of a block of features with all others: few enough for a cache
_PAIRS = 1 << 21  # that are worked on at once
_ROWS = 1024  # likewise, where rows are made dense
_DENSE = 500  # how many products of a dense matrix take as long as one of a pair that is looked up


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
    d_sae, size = len(sums.fired), max(_BYTES // (16 * len(sums.fired)), 1)
    found: dict[str, list[Tensor]] = {}
    for first in range(0, len(features), size):
        last = min(first + size, len(features))
        own = torch.from_numpy(features[first:last])
        found_sums = torch.zeros(last - first, d_sae, 2, dtype=torch.float64)
        for part in parts:
            _add(part, first, last, found_sums)
        products, both = found_sums.unbind(-1)
        measures = _measures(own, products, both, sums)
        measures["none"] = (both == 0).index_put((torch.arange(len(own)), own), torch.tensor(True))
        for by in ("pearson", "jaccard"):
            columns = {name: measures[name] for name in ("pearson", "cos", "jaccard")}
            for name, table in strongest(by, columns, k, measures["none"]).items():
                found.setdefault(f"features_by_{by}_{name}", []).append(table)
        report(last - first)
    return {name: torch.cat(tables) for name, tables in found.items()}


def _measures(own: Tensor, products: Tensor, both: Tensor, sums: Sums) -> dict[str, Tensor]:
    """``[b, d_sae]`` each; numbers that are none, of what never varies, are 0."""
    n = max(sums.tokens, 1)
    fired = sums.fired.double()
    covariance = products - sums.total[own][:, None] * (sums.total / n)
    variance = (sums.squares - sums.total.square() / n).clamp_min(0)
    pearson = covariance / (variance[own][:, None] * variance).sqrt()
    cosine = products / (sums.squares[own][:, None] * sums.squares).sqrt()
    jaccard = both / (fired[own][:, None] + fired - both)
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
    k = min(k, values.shape[1])
    least = values.topk(k, dim=1).values[:, -1:] if k else values.new_full((len(values), 1), torch.inf)
    rows, numbers = ((values >= least) & (values > -torch.inf)).nonzero(as_tuple=True)
    order = np.lexsort((numbers.numpy(), -values[rows, numbers].numpy(), rows.numpy()))
    rows, numbers = rows[order], numbers[order]
    starts = torch.searchsorted(rows, torch.arange(len(values)))
    place = torch.arange(len(rows)) - starts[rows]
    kept = place < k
    rows, numbers, place = rows[kept], numbers[kept], place[kept]
    index = torch.full((len(values), k), -1, dtype=torch.int32)
    index[rows, place] = numbers.int()
    found = {"index": index}
    for name, column in columns.items():
        found[name] = torch.zeros(len(values), k, dtype=torch.float32)
        found[name][rows, place] = column[rows, numbers].float()
    return found


@attrs.frozen(eq=False)
class _Block:
    """The entries of a block of features in a part, and the rows that they are in."""

    owners: Tensor
    rows: Tensor
    values: Tensor


def _add(part: PartRows, first: int, last: int, sums: Tensor) -> None:
    """Add ``Σ x_f x_g`` and the number of tokens with both to ``sums [b, d_sae, 2]``, for the features ``first`` to
    ``last``, of one part."""
    entries = part.entries(first, last)
    if not len(entries):
        return
    block = _Block(part.owners(first, last), part.rows(entries), part.values[entries].double())
    lengths = part.lengths[block.rows]
    if int(lengths.sum()) * _DENSE > len(part.places) * sums[..., 0].numel():
        _add_dense(part, block, sums)
    else:
        _add_pairs(part, block, lengths, sums)


def _add_pairs(part: PartRows, block: _Block, lengths: Tensor, sums: Tensor) -> None:
    """Each entry with each of its row."""
    ends = lengths.cumsum(0)
    cuts = torch.searchsorted(ends, torch.arange(0, int(ends[-1]), _PAIRS), right=True).unique().tolist()
    targets, offsets = sums.view(-1, 2), block.owners * sums.shape[1]
    first_other = part.starts[block.rows] - (ends - lengths)  # minus the pairs before, which the numbers below count
    for start, stop in zip(cuts, [*cuts[1:], len(lengths)], strict=True):
        before, after = int(ends[start] - lengths[start]), int(ends[stop - 1])
        mine = torch.repeat_interleave(torch.arange(start, stop), lengths[start:stop], output_size=after - before)
        others = first_other[mine].add_(torch.arange(before, after))
        terms = torch.ones(after - before, 2, dtype=torch.float64)
        torch.mul(block.values[mine], part.values[others], out=terms[:, 0])
        targets.index_add_(0, offsets[mine].add_(part.features[others]), terms)


def _add_dense(part: PartRows, block: _Block, sums: Tensor) -> None:
    """As products of matrices, where most features are active on most tokens."""
    order = torch.sort(block.rows, stable=True).indices
    owners, rows, values = block.owners[order], block.rows[order], block.values[order]
    for start in range(0, len(part.places), _ROWS):
        stop = min(start + _ROWS, len(part.places))
        mine = slice(*torch.searchsorted(rows, torch.tensor([start, stop])).tolist())
        own = torch.zeros(stop - start, len(sums), dtype=torch.float64)
        own[rows[mine] - start, owners[mine]] = values[mine]
        first, last = int(part.starts[start]), int(part.starts[stop])
        where = torch.repeat_interleave(torch.arange(stop - start), part.lengths[start:stop])
        everything = torch.zeros(stop - start, sums.shape[1], dtype=torch.float64)
        everything[where, part.features[first:last].long()] = part.values[first:last].double()
        sums[..., 0] += own.T @ everything
        sums[..., 1] += (own != 0).float().T @ (everything != 0).float()
