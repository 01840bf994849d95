"""Batches of several processes: from what each process's source gives to the rows that it trains on.

With sources that share rows, each of the ``data × features`` processes runs the model on its part of the text, and a
feature group, whose processes must see the same rows, gathers them.  A batch may be smaller where the text of one
process has ended before that of another, so that no row is left out; all make the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.abilities import CopiesState, Pauses, SharesRows, TakesStates
from saekit.distributed.agreement import done_by_all
from saekit.distributed.group import Group
from saekit.distributed.world import World
from saekit.errors import DataError, SaekitError
from saekit.protocols import ActivationSource
from saekit.site import Site
from saekit.values import Batch

__all__ = ["SpreadSource", "shares_rows", "taken_over", "takes_over", "thinned"]

_ORIGINS = ("tokens", "documents", "positions")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SpreadSource:
    """What this process trains on of the batches of all; every process must ask for each of them."""

    pause: Callable[[], None]

    def __init__(self, source: ActivationSource, world: World, *, shares: bool) -> None:
        """``shares``: each process's ``source`` gives rows of its own; else all give the same whole batches.

        Where SAEs are laid out over processes, those that have the same rows have the same source.
        """
        self._source, self._world, self._shares = source, world.column, shares
        self._asked = world.column.all if shares else world.all
        self._form: _Form | None = None
        self.copies_state = isinstance(source, CopiesState) and source.copies_state
        if isinstance(source, Pauses):
            self.pause = source.pause

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        own = next(self._source, None)
        if own is not None:
            self._form = _Form.of(own)
        counts = self._counts(0 if own is None else len(own))
        if not any(counts):
            raise StopIteration
        return self._gathered(own, counts) if self._shares else self._cut(own, counts)

    def _counts(self, rows: int) -> list[int]:
        """Rows of each process."""
        return [int(count) for count in self._asked.gather(torch.tensor(rows))]

    def _gathered(self, own: Batch | None, counts: Sequence[int]) -> Batch:
        """The rows of the feature group; all rows, anew shared out, where one has none left."""
        world = self._world
        if own is None or 0 in counts:  # so that those who have nothing know what it would be like
            self._form = next(form for form in world.all.objects(self._form) if form is not None)
            own = self._form.empty() if own is None else own
        width = world.features.size
        by_data = tuple(sum(counts[first : first + width]) for first in range(0, world.size, width))
        if all(by_data):
            first = world.data.rank * width
            rows = _joined(own, world.features, counts[first : first + width])
            return attrs.evolve(rows, counts=by_data if len(by_data) > 1 else ())
        return _shared_out(_joined(own, world.all, counts), world)

    def _cut(self, own: Batch | None, counts: Sequence[int]) -> Batch:
        """The part of this process of a batch that all have; :class:`DataError` where they have not."""
        sums = self._asked.gather(torch.zeros(2, dtype=torch.int64) if own is None else _summed(own))
        if own is None or len({*counts}) > 1 or any(not torch.equal(one, sums[0]) for one in sums):
            raise DataError(
                "the activation source gave other rows in this process than in another: one that does not share rows "
                "(saekit.abilities.SharesRows) must depend on its seed alone. Train in one process, or with a source "
                "that shares rows"
            )
        return _shared_out(own, self._world)

    def peek(self) -> Mapping[Site, Tensor]:
        """Rows of all processes, in their order, so that what is estimated on them is the same for all.

        Where each has the same batches, those of the first.
        """
        if not self._shares:
            return self._world.all.once(lambda: {site: rows.cpu() for site, rows in self._source.peek().items()})
        own = done_by_all(
            self._world.all,
            lambda: {site: rows.cpu() for site, rows in self._source.peek().items()},
            kinds=(SaekitError,),
        )
        counts = self._world.all.objects([len(rows) for rows in own.values()])
        return {
            site: torch.cat(self._world.all.gather_rows(rows, [each[number] for each in counts]))
            for number, (site, rows) in enumerate(own.items())
        }

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)

    @property
    def own(self) -> ActivationSource:
        """The source of this process."""
        return self._source

    def close(self) -> None:
        self._source.close()


@attrs.frozen(eq=False)
class _Form:
    """What batches are like: of each site width and type, and which origins there are."""

    sites: Mapping[Site, tuple[int, torch.dtype, str]]
    origins: tuple[str, ...]

    @classmethod
    def of(cls, batch: Batch) -> _Form:
        sites = {site: (rows.shape[1], rows.dtype, str(rows.device)) for site, rows in batch.activations.items()}
        return cls(sites, tuple(name for name in _ORIGINS if getattr(batch, name) is not None))

    def empty(self) -> Batch:
        rows = {
            site: torch.empty(0, width, dtype=dtype, device=torch.device(device).type)
            for site, (width, dtype, device) in self.sites.items()
        }
        return Batch(rows, **{name: torch.empty(0, dtype=torch.int64) for name in self.origins})  # type: ignore[arg-type]


def _summed(batch: Batch) -> Tensor:
    """int64 ``[2]``, on the CPU: the bits of all rows added up, and so with each row as often as its number says.

    Sums of whole numbers, so that they tell rows in another order, and what is no number is like itself.
    """
    sums = torch.zeros(2, dtype=torch.int64)
    for rows in batch.activations.values():
        bits = rows.contiguous().view(_BITS[rows.element_size()]).sum(1, dtype=torch.int64)
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        sums = 3 * sums + torch.stack([bits.sum(), (bits * places).sum()]).cpu()
    return sums


def _joined(own: Batch, group: Group, counts: Sequence[int]) -> Batch:
    """The rows of all processes of ``group``, which have so many each."""
    if group.size == 1:
        return own
    rows = {site: torch.cat(group.gather_rows(values, counts)) for site, values in own.activations.items()}
    origins = {
        name: None if (origin := getattr(own, name)) is None else torch.cat(group.gather_rows(origin, counts))
        for name in _ORIGINS
    }
    return Batch(rows, **origins)  # type: ignore[arg-type]


def _shared_out(whole: Batch, world: World) -> Batch:
    """This process's part of a batch that all have; all of it, where there are too few rows for every data group."""
    n, parts = len(whole), world.data.size
    if parts == 1 or n < parts:
        return whole
    ends = [(part + 1) * n // parts for part in range(parts)]
    starts = [0, *ends[:-1]]
    rank = world.data.rank
    counts = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return attrs.evolve(whole.at(list(range(starts[rank], ends[rank]))), counts=counts)


def thinned(batch: Batch, n: int, world: World) -> Batch:
    """:meth:`saekit.Batch.thinned` of the whole batch, of which ``batch`` is the part of this process."""
    whole = batch.whole
    if n >= whole:
        return batch
    kept, ends = [row * whole // n for row in range(n)], list(accumulate(batch.counts))
    by_part = [
        [row - start for row in kept if start <= row < end] for start, end in zip([0, *ends], ends, strict=False)
    ]
    counts = tuple(map(len, by_part))
    if not all(counts):
        return _joined(batch, world.data, batch.counts).thinned(n)
    return attrs.evolve(batch.at(by_part[world.data.rank]), counts=counts)


def shares_rows(source: object) -> bool:
    """Whether each process's ``source`` gives rows of its own."""
    return isinstance(source, SharesRows) and bool(source.shares_rows)


def takes_over(source: ActivationSource) -> bool:
    """Whether ``source`` can go on where sources of more or fewer processes were."""
    own = source.own if isinstance(source, SpreadSource) else source
    return not shares_rows(own) or isinstance(own, TakesStates)


def taken_over(source: ActivationSource, state: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()) -> None:
    """Have ``source`` go on from its own ``state``, or else from those of the processes ``before``."""
    own = source.own if isinstance(source, SpreadSource) else source
    if before and shares_rows(own):
        assert isinstance(own, TakesStates)
        own.load_states(before)
    else:  # of sources that share no rows, all gave the same batches
        source.load_state_dict(state)
