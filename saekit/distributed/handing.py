"""Tensors of which each process has a part, handed to the first process in pieces, in the order of a file.

Only the first process writes: the parts of a matrix lie side by side in its rows, so that several writers would share
pages of one file, which network file systems (NFS) do not keep apart, and the checksum of what they wrote would be one
more reading.  It asks for each piece when there is room for it, so that no process holds more than its part and a few
pieces, and each is told how it ends, so that none waits for one that failed.  However slow the disk, they wait for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from saekit.distributed.agreement import OthersFailedError
from saekit.distributed.group import Group
from saekit.errors import LostProcessError

__all__ = ["Collecting", "Parted", "collecting", "hand_over", "own_pieces"]

_PIECE = 1 << 23
"""Bytes that are handed over together."""
_NEXT, _DONE, _FAILED, _HERE = range(4)


class Collecting:
    """What the first process has of it: it asks the others for their next pieces."""

    def __init__(self, group: Group, parts: int) -> None:
        self._group, self._others = group, range(1, parts)

    def piece(self, process: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next one of another process."""
        self._group.say(_NEXT, process)
        if self._group.heard(process) != _HERE:
            raise OthersFailedError(f"process {process} could not hand its part over")
        return self._group.taken(shape, dtype, process)

    def tell(self, word: int) -> None:
        """All others."""
        for process in self._others:
            self._group.say(word, process)


@contextlib.contextmanager
def collecting(group: Group, parts: int) -> Iterator[Collecting]:
    """In the first process of ``group``, while the first ``parts`` of it are in :func:`hand_over`.

    They leave that when this ends, and fail if this does.
    """
    found = Collecting(group, parts)
    try:
        yield found
    except LostProcessError:
        raise  # there may be nobody to tell
    except BaseException:
        with contextlib.suppress(LostProcessError):
            found.tell(_FAILED)
        raise
    found.tell(_DONE)


def hand_over(group: Group, pieces: Iterator[Tensor], go_on: Callable[[], None]) -> None:
    """Hand ``pieces`` to the first process as it asks for them; ``go_on`` is called before each, and may raise.

    :class:`OthersFailedError` where the first process, or another, fails.
    """
    failure: BaseException | None = None
    while (word := group.heard(0)) == _NEXT:
        try:
            go_on()
            piece = next(pieces)
        except BaseException as error:
            failure = error
            group.say(_FAILED, 0)
        else:
            group.say(_HERE, 0)
            group.hand(piece, 0)
    if failure is not None:
        raise failure
    if word == _FAILED:
        raise OthersFailedError("the first process could not write what all have parts of")


@attrs.frozen
class _Block:
    """Places of ``[outer, features, inner]`` of a part."""

    outer: slice
    features: slice
    part: int | None
    """Whose it is; None: all have one, and they lie side by side in each of ``outer``."""


def _blocks(shape: Sequence[int], along: int, itemsize: int, parts: int) -> Iterator[_Block]:
    """Those of all ``parts``, each of this ``shape``, in the order in which the whole lies in a file."""
    outer, own, inner = _folded(shape, along)
    row = own * parts * inner * itemsize
    if row <= _PIECE or own == 0:
        step = max(1, _PIECE // max(1, row))
        yield from (_Block(slice(at, min(at + step, outer)), slice(0, own), None) for at in range(0, outer, step))
        return
    step = max(1, _PIECE // max(1, inner * itemsize))
    for place in range(outer):
        for part in range(parts):
            for at in range(0, own, step):
                yield _Block(slice(place, place + 1), slice(at, min(at + step, own)), part)


def _folded(shape: Sequence[int], along: int) -> tuple[int, int, int]:
    return math.prod(shape[:along]), shape[along], math.prod(shape[along + 1 :])


def own_pieces(values: Iterable[tuple[Tensor, int]], part: int, parts: int) -> Iterator[Tensor]:
    """The pieces of this process's ``part``: of each of ``values``, which is split along a dimension."""
    for value, along in values:
        flat = value.reshape(_folded(value.shape, along))
        for block in _blocks(value.shape, along, value.itemsize, parts):
            if block.part in (None, part):
                yield flat[block.outer, block.features]


@attrs.frozen(eq=False)
class Parted:
    """In the first process: a tensor of which it has the first part, and asks the others for theirs."""

    own: Tensor
    along: int
    parts: int
    others: Collecting

    @property
    def dtype(self) -> torch.dtype:
        """Of all parts."""
        return self.own.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(n * self.parts if dim == self.along else n for dim, n in enumerate(self.own.shape))

    def __iter__(self) -> Iterator[Tensor]:
        """The whole in its order, a piece at a time."""
        flat = self.own.reshape(_folded(self.own.shape, self.along))
        for block in _blocks(self.own.shape, self.along, self.own.itemsize, self.parts):
            mine = flat[block.outer, block.features]
            if block.part is None:
                others = [self.others.piece(one, mine.shape, self.dtype) for one in range(1, self.parts)]
                yield torch.cat([mine, *others], dim=1)
            elif block.part == 0:
                yield mine
            else:
                yield self.others.piece(block.part, mine.shape, self.dtype)
