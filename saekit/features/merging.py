"""Parts, which are in the order of the text, put into the order of features, with little of them in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.features.feature import BINS, binned
from saekit.features.subject import by_number
from saekit.files.mapped import mapped_tensors
from saekit.files.tensors import SummedFile, header

__all__ = ["Bound", "ByFeature", "PartRows", "merge"]

_ENTRIES = 1 << 22  # that are put in order at once, if no single feature has more
_PIECE = 1 << 23
_SOUGHT = 16  # entries of a part, of which one is sought as fast as the rows of all are listed


@attrs.frozen
class Bound:
    """How much is stored of a feature at most."""

    per_feature: int
    """Activations; of a feature with more, those of a fair sample of its contexts, about so many, and the largest."""
    top: int
    """How many of the largest are there in any case, with all else in their contexts."""
    seed: int


class PartRows:
    """A part of an SAE, as it lies on the disk."""

    def __init__(self, path: Path) -> None:
        tensors = mapped_tensors(path)
        self.places, self.starts, self.by_feature = (tensors[name] for name in ("places", "starts", "by_feature"))
        self.features, self.values, self.order = (tensors[name] for name in ("features", "values", "order"))
        self.lengths = self.starts.diff()

    def entries(self, first: int, last: int) -> Tensor:
        """The numbers of the entries of the features at places ``first`` to ``last``, feature by feature."""
        return self.order[int(self.by_feature[first]) : int(self.by_feature[last])].long()

    def rows(self, entries: Tensor) -> Tensor:
        """The rows that entries are in."""
        if len(entries) * _SOUGHT < len(self.features):
            return torch.searchsorted(self.starts, entries, right=True) - 1
        return torch.repeat_interleave(self.lengths, output_size=len(self.features))[entries]

    def owners(self, first: int, last: int) -> Tensor:
        """Which of the features ``first`` to ``last`` each of :meth:`entries` is of, from 0."""
        counts = self.by_feature[first : last + 1].diff()
        return torch.repeat_interleave(torch.arange(last - first), counts)


@attrs.define(eq=False)
class ByFeature:
    """What is found of each feature while they are put in order."""

    starts: list[int]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    fired_contexts: NDArray[np.int64]
    histogram: NDArray[np.int64]
    complete_above: NDArray[np.float64]

    @classmethod
    def of(cls, n: int) -> ByFeature:
        """Nothing yet, for ``n`` features."""
        low, high, total, squares = (np.zeros(n) for _ in range(4))
        counts, histogram = np.zeros(n, np.int64), np.zeros((n, BINS), np.int64)
        return cls([0], low, high, total, squares, counts, histogram, np.full(n, -np.inf))

    def tensors(self) -> dict[str, Tensor]:
        """As they are saved."""
        tables = attrs.asdict(self, recurse=False)
        return {name: torch.from_numpy(np.asarray(value)) for name, value in tables.items()}


def merge(
    paths: Sequence[Path],
    target: Path,
    *,
    fired: NDArray[np.int64],
    features: NDArray[np.int64],
    context_size: int,
    dtype: torch.dtype,
    bound: Bound,
    report: Callable[[int], Any] = lambda entries: None,
) -> tuple[ByFeature, str]:
    """Write the activations of ``features`` to ``target``; what is found of each, and the file's sha256.

    ``fired`` says on how many tokens each is active.
    """
    parts, found = [PartRows(path) for path in paths], ByFeature.of(len(features))
    sampled = bool((fired > bound.per_feature).any())
    position = torch.int16 if context_size <= 1 << 15 else torch.int32
    forms = {"contexts": torch.int32, "values": dtype, "positions": position}
    if sampled:
        forms["sampled"] = torch.bool
    forms = dict(sorted(forms.items(), key=lambda item: -item[1].itemsize))
    raw = {name: target.with_name(f"{name}.raw") for name in forms}
    files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in raw.items()}
    try:
        for first, last in _blocks(fired):
            for row, places, values in _of_block(parts, first, last):
                kept, chosen = _taken(found, row, places, values, context_size, bound, int(features[row]))
                columns = {"contexts": places // context_size, "positions": places % context_size, "values": values}
                columns |= {"sampled": chosen}
                found.starts.append(found.starts[-1] + int(kept.sum()))
                for name, form in forms.items():
                    data = columns[name][kept].to(form).contiguous()
                    files[name].write(data.view(torch.uint8).numpy().data)
            report(int(fired[first:last].sum()))
    finally:
        for file in files.values():
            file.close()
    digest = _joined(target, raw, {name: (form, [found.starts[-1]]) for name, form in forms.items()})
    return found, digest


def _blocks(fired: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Features that together have few enough entries."""
    first, entries = 0, 0
    for number, count in enumerate(fired.tolist()):
        if number > first and entries + count > _ENTRIES:
            yield first, number
            first, entries = number, 0
        entries += count
    if len(fired):
        yield first, len(fired)


def _of_block(parts: Sequence[PartRows], first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each feature's place among all, and its places in the text, which rise, with the values."""
    owners, places, values = [], [], []
    for part in parts:
        entries = part.entries(first, last)
        owners.append(part.owners(first, last))
        places.append(part.places[part.rows(entries)])
        values.append(part.values[entries])
    if not parts:
        return
    whose = torch.cat(owners)
    order = by_number(whose, last - first)
    ordered = torch.cat(places)[order], torch.cat(values)[order]
    counts = torch.bincount(whose, minlength=last - first).tolist()
    for row, (at, value) in enumerate(zip(*(one.split(counts) for one in ordered), strict=True)):
        yield first + row, at, value


def _taken(
    found: ByFeature, row: int, places: Tensor, values: Tensor, context_size: int, bound: Bound, feature: int
) -> tuple[Tensor, Tensor]:
    """Which of a feature's activations are stored, and which are of the sample; its numbers are noted."""
    everything = torch.ones(len(values), dtype=torch.bool)
    if not len(values):
        return everything, everything
    contexts = (places // context_size).numpy()
    begins = np.diff(contexts, prepend=-1) != 0  # they rise
    exact = values.double().numpy()
    low, high = float(exact.min()), float(exact.max())
    found.minimum[row], found.maximum[row] = low, high
    found.total[row], found.squares[row] = exact.sum(), np.square(exact).sum()
    found.histogram[row] = binned(exact, np.linspace(low, high, BINS + 1))
    found.fired_contexts[row] = n_contexts = int(begins.sum())
    if len(values) <= bound.per_feature:
        return everything, everything
    which = begins.cumsum() - 1
    order = np.random.default_rng([bound.seed, feature]).permutation(n_contexts)
    n_sampled = max(int(np.searchsorted(np.bincount(which)[order].cumsum(), bound.per_feature, side="right")), 1)
    in_sample = np.zeros(n_contexts, np.bool_)
    in_sample[order[:n_sampled]] = True
    strongest = np.argsort(-exact, kind="stable")[: bound.top]
    with_top = in_sample.copy()
    with_top[which[strongest]] = True
    found.complete_above[row] = exact[strongest[-1]] if len(strongest) else np.inf
    return torch.from_numpy(with_top[which]), torch.from_numpy(in_sample[which])


def _joined(target: Path, raw: Mapping[str, Path], tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> str:
    """One safetensors file of columns that lie in files of their own, which go; its sha256."""
    with ThreadPoolExecutor(1, thread_name_prefix="saekit-sha256") as hasher, SummedFile(target, hasher) as file:
        file.put(header(tensors))
        for name in tensors:
            with raw[name].open("rb") as column:
                while piece := column.read(_PIECE):
                    file.put(piece)
            raw[name].unlink()
        return file.sha256()
