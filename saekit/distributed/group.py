"""Processes that work together on something, and what they tell each other."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from saekit.compiling import not_compiled
from saekit.distributed.patience import Meeting
from saekit.errors import LostProcessError, SaekitError
from saekit.reasons import error_text

__all__ = ["ONE", "Group", "JoinedGroup", "MetGroup"]

T = TypeVar("T")


class Group:
    """A group of one: it has nobody to ask, so nothing here costs anything, and no tensor is copied."""

    rank: int = 0
    """The number of this process among those of the group."""
    size: int = 1
    """How many there are."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes of their ``value``, which are of one shape; without a gradient."""
        return value

    def sum_(self, value: Tensor) -> Tensor:
        """The same, in the memory of ``value``."""
        return value

    def sum_parts_(self, value: Tensor, memory: Tensor) -> None:
        """:meth:`sum_` of that part of ``value [n, ...]``, in one piece, that is this process's: of ``size`` parts of
        as many rows that of its number.  The others hold anything then.

        ``memory``, as long as the others together and of the same type, is what is received in.
        """

    def spread_parts_(self, value: Tensor) -> None:
        """Fill ``value [n, ...]``, in one piece, with every process's own part."""

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`sum` of each of several small ``values``, of whatever types, in one message."""
        return [*values]

    def same(self, number: int) -> bool | None:
        """Whether every process gives the same whole ``number``; None: to ask them, this one would have to wait for its
        device."""
        return True

    def gather(self, value: Tensor) -> list[Tensor]:
        """The ``value`` of every process, in their order; of one shape and type."""
        return [value]

    def gather_rows(self, value: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The ``value [n, ...]`` of every process, in their order, where ``counts`` are the ``n`` of all."""
        return [value]

    def words(self, word: str = "") -> list[str] | None:
        """Wait until all have come, as long as all are there; what each says: nothing, or why it cannot go on.

        None, where this one cannot, and the others do not come soon.
        """
        return [word]

    def objects(self, value: T) -> list[T]:
        """The plain objects of every process, in their order; however late one of them comes."""
        return [value]

    def hand(self, value: Tensor, to: int) -> None:
        """Send ``value``, on the CPU, to the process of this number, which is in :meth:`taken` for it."""
        raise RuntimeError("there is no other process")

    def taken(self, shape: Sequence[int], dtype: torch.dtype, of: int) -> Tensor:
        """What the process of this number hands to this one."""
        raise RuntimeError("there is no other process")

    def say(self, word: int, to: int) -> None:
        """A word, below 256, to the process of this number."""
        raise RuntimeError("there is no other process")

    def heard(self, of: int) -> int:
        """The next word of the process of this number to this one; however late it comes."""
        raise RuntimeError("there is no other process")

    def at_first(self, value: T) -> list[T] | None:
        """The same in the first process; None in the others."""
        return [value]

    def close(self) -> None:
        """The world that it is of has ended: it holds nothing of the engine's any more, and nobody is asked again."""

    def __deepcopy__(self, memo: object) -> Group:
        """There is one of each."""
        return self

    def once(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, which the first process does for all; what it raises is raised in all."""
        return work()


ONE = Group()
"""Of this process alone."""


def _said(word: str) -> str:
    """What a word says, for people: in it, :func:`saekit.distributed.agreement.done_by_all` has a text last."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(word), list) and found:
            return str(found[-1])
    return word


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """:class:`LostProcessError` where the others do not take part."""
    try:
        yield
    except RuntimeError as error:
        # Of what the engine says, neither the line of its own code nor whose logs to look at.
        text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()) or type(error).__name__
        told = text.splitlines()[0].split(". ")[0]
        raise LostProcessError(f"another process of the run has gone, or does not answer: {told}") from error


class MetGroup(Group):
    """Processes that have no group of torch's: they wait for each other, and say why one of them cannot go on."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def words(self, word: str = "") -> list[str] | None:
        return self._meeting.words(word)


class JoinedGroup(Group):
    """A group of several processes, around one of torch's, and where they meet: without that, all is by collectives."""

    def __init__(self, group: Any, meeting: Meeting | None = None) -> None:
        import torch.distributed as dist

        self._dist, self._joined, self._meeting = dist, group, meeting
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Groups that saekit makes speak on CPUs, too; one of somebody else's may know GPUs alone.
        self._by_host = "cpu" in str(dist.get_backend_config(group))

    @property
    def _group(self) -> Any:
        if self._joined is None:
            raise SaekitError(
                "the processes of this run do not hear each other any more: what they share, such as an SAE whose "
                "features are split, works until open_world ends. Load the SAE that was saved"
            )
        return self._joined

    @property
    def _meets(self) -> Meeting | None:
        return None if self._group is None else self._meeting  # an error, where the world has ended

    def close(self) -> None:
        # The engine's threads run for as long as anybody has the group.
        self._joined = None

    @not_compiled
    def sum(self, value: Tensor) -> Tensor:
        # In float32 at least: not every engine adds shorter numbers, and sums of them would lose digits.
        wide = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
        own = value.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
        return self.sum_(own).to(value.dtype)

    @not_compiled
    def sum_(self, value: Tensor) -> Tensor:
        if value.is_contiguous():
            with _answered():
                self._dist.all_reduce(value, group=self._group)
        elif value.ndim == 2 and value.T.is_contiguous():
            with _answered():
                self._dist.all_reduce(value.T, group=self._group)
        else:
            value.copy_(self.sum(value))
        return value

    @not_compiled
    def sum_parts_(self, value: Tensor, memory: Tensor) -> None:
        # Each part goes straight to whose it is: gloo's own reduce_scatter takes five times as long.
        parts, others = value.view(self.size, -1), self._others()
        received = memory.view(-1)[: (self.size - 1) * parts.shape[1]].view(self.size - 1, -1)
        self._swap([(parts[other], one, other) for other, one in zip(others, received, strict=True)])
        for one in received:
            parts[self.rank].add_(one)

    @not_compiled
    def spread_parts_(self, value: Tensor) -> None:
        parts = value.view(self.size, -1)
        self._swap([(parts[self.rank], parts[other], other) for other in self._others()])

    def _others(self) -> list[int]:
        """From the next on, so that not all send to one at a time."""
        return [(self.rank + number) % self.size for number in range(1, self.size)]

    def _swap(self, parts: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        """Send the first of each to the process of that number, and have the second of it, all at a time."""
        dist, group = self._dist, self._group
        ways = [
            dist.P2POp(way, value, group=group, group_peer=other)
            for given, found, other in parts
            for way, value in ((dist.irecv, found), (dist.isend, given))
        ]
        with _answered():
            for work in dist.batch_isend_irecv(ways):
                work.wait()

    @not_compiled
    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        # In float64, which has all digits of float32, and of whole numbers up to 2^53.
        flat = self.sum_(torch.cat([value.detach().reshape(-1).double() for value in values]))
        parts = flat.split([value.numel() for value in values])
        return [part.to(value.dtype).view(value.shape) for part, value in zip(parts, values, strict=True)]

    @not_compiled
    def same(self, number: int) -> bool | None:
        if not self._by_host:
            return None
        total = self.sum_(torch.tensor(number, device="cpu"))
        return int(total) == number * self.size

    @not_compiled
    def gather(self, value: Tensor) -> list[Tensor]:
        # As bytes: not every engine has every type.
        own = value.detach().contiguous().reshape(-1).view(torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _answered():
            self._dist.all_gather(found, own, group=self._group)
        return [one.view(value.dtype).view(value.shape) for one in found]

    @not_compiled
    def gather_rows(self, value: Tensor, counts: Sequence[int]) -> list[Tensor]:
        most = max(counts)
        padded = value.new_zeros(most, *value.shape[1:])
        padded[: len(value)] = value
        return [one[:n] for one, n in zip(self.gather(padded), counts, strict=True)]

    def hand(self, value: Tensor, to: int) -> None:
        with _answered():
            self._dist.send(value.contiguous().reshape(-1).view(torch.uint8), group=self._group, group_dst=to)

    def taken(self, shape: Sequence[int], dtype: torch.dtype, of: int) -> Tensor:
        found = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device="cpu")
        with _answered():
            self._dist.recv(found, group=self._group, group_src=of)
        return found.view(dtype).view(*shape)

    def say(self, word: int, to: int) -> None:
        if (meeting := self._meets) is not None:
            meeting.say(word, to)
        else:
            self.hand(torch.tensor([word], dtype=torch.uint8, device="cpu"), to)

    def heard(self, of: int) -> int:
        return int(self.taken((1,), torch.uint8, of)) if (meeting := self._meets) is None else meeting.heard(of)

    @not_compiled
    def words(self, word: str = "") -> list[str] | None:
        return self._exchanged(word) if (meeting := self._meets) is None else meeting.words(word)

    @not_compiled
    def objects(self, value: T) -> list[T]:
        self._met()
        return self._exchanged(value)

    def _met(self) -> None:
        """Wait for the others in the store; what is told then is of those that have come.

        :class:`LostProcessError` where one of them cannot go on, and says so.
        """
        if (meeting := self._meets) is not None:
            for number, word in enumerate(meeting.words() or ()):
                if word:
                    raise LostProcessError(f"another process of the run has failed: process {number}: {_said(word)}")

    def _exchanged(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _answered():
            self._dist.all_gather_object(found, value, group=self._group)
        return found

    @not_compiled
    def at_first(self, value: T) -> list[T] | None:
        self._met()
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _answered():
            self._dist.gather_object(value, found, group=self._group, group_dst=0)
        return found

    @not_compiled
    def once(self, work: Callable[[], T]) -> T:
        told: list[Any] = [None]
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                told = [work()]
            except Exception as error:
                failure = error
        words = self.words("" if failure is None else error_text(failure))
        if failure is not None:
            raise failure
        if words is not None and words[0]:
            raise SaekitError(f"the first process failed: {words[0]}")
        with _answered():
            self._dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]  # type: ignore[no-any-return]
