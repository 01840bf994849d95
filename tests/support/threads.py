"""Processes that are threads here, which meet where they tell each other something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from saekit.distributed.group import Group

T = TypeVar("T")


class Threads(Group):
    """One of several threads that wait for each other."""

    def __init__(self, rank: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._table = rank, len(table), barrier, table

    def gather(self, value: Tensor) -> list[Tensor]:
        self._table[self.rank] = value.clone()
        self._barrier.wait(30)
        found = [one.clone() for one in self._table]
        self._barrier.wait(30)
        return found

    def objects(self, value: T) -> list[T]:
        self._table[self.rank] = value
        self._barrier.wait(30)
        found = list(self._table)
        self._barrier.wait(30)
        return found

    def same(self, number: int) -> bool:
        return len({*self.objects(number)}) == 1

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        every = self.objects([value.clone() for value in values])
        return [torch.stack(parts).sum(0).to(parts[0].dtype) for parts in zip(*every, strict=True)]

    def sum(self, value: Tensor) -> Tensor:
        return self.sums([value])[0]

    def sum_(self, value: Tensor) -> Tensor:
        return value.copy_(self.sum(value))

    def sum_parts_(self, value: Tensor, memory: Tensor) -> None:
        own = self.sum(value).view(self.size, -1)[self.rank]
        value.view(self.size, -1).fill_(torch.nan)[self.rank].copy_(own)

    def spread_parts_(self, value: Tensor) -> None:
        parts = value.view(self.size, -1)
        parts.copy_(torch.stack(self.gather(parts[self.rank])))

    def gather_rows(self, value: Tensor, counts: Any) -> list[Tensor]:
        assert len(value) == counts[self.rank]
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: len(value)] = value
        return [one[:n] for one, n in zip(self.gather(padded), counts, strict=True)]


def by_all(size: int, work: Callable[[Group], T]) -> list[T]:
    """What ``size`` threads make of ``work``."""
    barrier, table = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, barrier, table)), range(size)))
