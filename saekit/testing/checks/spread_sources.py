"""What an activation source promises of two processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.testing.checks.check import must
from saekit.testing.checks.numbers import must_be_equal
from saekit.testing.checks.two_processes import DATA, on_two

if TYPE_CHECKING:
    from saekit.data import ContextStream, StreamContext
    from saekit.distributed import World

__all__ = ["Opens", "must_share"]

Opens = Callable[..., Any]
"""``opens(stream)``: the source, as a context."""
_MOST = 60
"""Batches that are read; the text has fewer."""
_STATE_AFTER = 2


@attrs.frozen(eq=False)
class _Read:
    """What one process got of all batches."""

    shares: bool
    batches: list[dict[str, Any]]
    sizes: list[int]
    """Rows of each batch of the source itself."""
    ended: bool
    reads_text: bool


def must_share(
    opens: Opens,
    stream: Callable[..., StreamContext],
    contexts: Callable[[tuple[int, int]], ContextStream],
    plain: Callable[[Any], dict[str, Any]],
    place: Path,
) -> None:
    """Two processes read what one reads.  ``contexts(part)`` is a part of the text, once; ``plain`` is a batch to
    compare."""

    def opened(number: int, processes: int) -> Any:
        options: dict[str, Any] = {"open_contexts": lambda: contexts((0, 1))}
        if processes > 1:
            options["open_own"] = lambda: contexts((number, processes))
        made = stream(repeat=False, process=number, processes=processes, **options)
        return made, opens(made)

    def read(world: World) -> _Read:
        from saekit.distributed.batches import SpreadSource, shares_rows

        made, source_of = opened(world.rank, world.size)
        with source_of as source:
            shares = shares_rows(source)
            sizes: list[int] = []
            spread = SpreadSource(_Counted(source, sizes), world, shares=shares)
            batches = [plain(batch) for batch in islice(spread, _MOST)]
            found = _Read(shares, batches, sizes, len(batches) < _MOST, made.position is not None)
        _must_go_on(lambda: opened(world.rank, world.size)[1], plain, world)
        return found

    parts = on_two({DATA: read}, place)[DATA]
    made, source_of = opened(0, 1)
    with source_of as source:
        alone = [plain(batch) for batch in islice(source, _MOST)]
    if not parts[0].shares:
        _must_be_parts(alone, parts)
        return
    must(parts[1].shares, "it says shares_rows in one process and not in another")
    size = made.batch_size
    both = sum(len(_rows(one.batches[0])) for one in parts)
    must(both == size, f"the first batch of two processes has {both} rows together, expected {size} (stream.own)")
    _must_be_other_rows(parts)
    if parts[0].ended and len(alone) < _MOST:
        _must_be_all(alone, parts, contexts)


class _Counted:
    """A source, of which it is noted how many rows each batch had."""

    def __init__(self, source: Any, sizes: list[int]) -> None:
        self._source, self._sizes = source, sizes

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        batch = next(self._source)
        self._sizes.append(len(batch))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _rows(batch: Mapping[str, Any]) -> Any:
    """Those of its first site."""
    return next(iter(batch.values()))


def _must_go_on(opened: Callable[[], Any], plain: Callable[[Any], dict[str, Any]], world: World) -> None:
    """From its state, in a process of two as in one alone."""
    with opened() as source:
        for _ in islice(source, _STATE_AFTER):
            pass
        state = source.state_dict()
        expected = [plain(batch) for batch in islice(source, 2)]
    with opened() as fresh:
        fresh.load_state_dict(state)
        found = [plain(batch) for batch in islice(fresh, 2)]
    must_be_equal(f"batches of process {world.rank} of two from a state after {_STATE_AFTER}", found, expected)


def _must_be_parts(alone: list[dict[str, Any]], parts: list[_Read]) -> None:
    """One that knows nothing of other processes gives each the whole batches, which are cut."""
    import torch

    for number, whole in enumerate(alone):
        cut = [_rows(one.batches[number]) for one in parts if number < len(one.batches)]
        must(cut, f"two processes get {number} batches, and one alone more")
        must_be_equal(f"the rows of both processes of batch {number}", torch.cat(cut), _rows(whole))


def _must_be_other_rows(parts: list[_Read]) -> None:
    import torch

    for number, (one, other) in enumerate(zip(*(part.batches for part in parts), strict=True)):
        same = torch.equal(_rows(one), _rows(other))
        must(
            not same,
            f"it says shares_rows, and batch {number} has the same rows in both processes: read stream.own, or deal "
            "out rows by stream.process and stream.processes",
        )


def _must_be_all(
    alone: list[dict[str, Any]], parts: list[_Read], contexts: Callable[[tuple[int, int]], ContextStream]
) -> None:
    """No row is lost, and none is there twice."""
    found = sum((_counted(one.batches) for one in parts), Counter())
    expected = _counted(alone)
    if parts[0].reads_text and alone[0].get("documents") is not None:
        # Parts are packed by themselves; and what one process alone leaves out, two may.
        left_out = (_of_text(contexts, 1) - expected).total()
        expected = _of_text(contexts, len(parts))
    else:
        left_out = 0
        if parts[0].reads_text:  # of which tokens rows are is not told: their number is
            expected, found = (Counter({"rows": n.total()}) for n in (_of_text(contexts, len(parts)), found))
    lost, twice = (expected - found).total(), (found - expected).total()
    must(
        lost <= 2 * left_out and not twice,
        f"it says shares_rows, and of {expected.total()} rows {lost} are in no process, and {twice} are there more "
        "often than in the text: each process reads stream.own.contexts, all of it",
    )


def _of_text(contexts: Callable[[tuple[int, int]], ContextStream], parts: int) -> Counter[Any]:
    """Document and token of every row."""
    found: Counter[Any] = Counter()
    for number in range(parts):
        read = contexts((number, parts)).take(10**6)
        found.update(zip(read.documents.ravel().tolist(), read.tokens.ravel().tolist(), strict=True))
    return found


def _counted(batches: list[dict[str, Any]]) -> Counter[Any]:
    """Document and token of every row, or the rows themselves where that is not told."""
    found: Counter[Any] = Counter()
    for batch in batches:
        if batch.get("documents") is not None and batch.get("tokens") is not None:
            found.update(zip(batch["documents"].tolist(), batch["tokens"].tolist(), strict=True))
        else:
            found.update(map(tuple, _rows(batch).tolist()))
    return found
