"""Parts that are handed to the first process in pieces, by threads that stand for processes."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit.distributed import handing
from saekit.distributed.agreement import OthersFailedError, agreed
from saekit.distributed.group import Group
from saekit.distributed.handing import Parted, collecting, hand_over, own_pieces
from saekit.errors import StorageError
from saekit.files.tensors import save_tensors


class Threads(Group):
    """One of several that tell each other by queues; what is left in them was meant for nobody."""

    def __init__(self, rank: int, size: int, lines: dict[Any, queue.Queue[Any]]) -> None:
        self.rank, self.size, self.lines = rank, size, lines
        self.handed = 0

    def hand(self, value: Tensor, to: int) -> None:
        self.handed = max(self.handed, value.nbytes)
        self.lines[self.rank, to].put(value.contiguous().clone())

    def taken(self, shape: Sequence[int], dtype: torch.dtype, of: int) -> Tensor:
        found: Tensor = self.lines[of, self.rank].get(timeout=20)
        assert found.dtype == dtype
        return found.reshape(tuple(shape))

    def say(self, word: int, to: int) -> None:
        self.lines[self.rank, to].put(word)

    def heard(self, of: int) -> int:
        found: int = self.lines[of, self.rank].get(timeout=20)
        return found

    def words(self, word: str = "") -> list[str]:
        return self.objects(word)

    def objects(self, value: Any) -> list[Any]:
        for other in range(self.size):
            self.lines["told", self.rank, other].put(value)
        return [self.lines["told", other, self.rank].get(timeout=20) for other in range(self.size)]


def together(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What each makes of it: a result, or its error."""
    ends = [(a, b) for a in range(size) for b in range(size)]
    lines: dict[Any, queue.Queue[Any]] = {key: queue.Queue() for a, b in ends for key in ((a, b), ("told", a, b))}

    def tried(rank: int) -> Any:
        try:
            return work(Threads(rank, size, lines))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(tried, range(size)))
    assert all(line.empty() for line in lines.values()), "a word for nobody"
    return found


@pytest.mark.parametrize("piece", [4, 64, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "along"), [((12, 5), 0), ((5, 12), 1), ((12,), 0), ((3, 12, 2), 1), ((40, 12), 1), ((0, 12), 1)]
)
def test_what_is_written_is_the_whole(
    shape: tuple[int, ...], along: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handing, "_PIECE", piece)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = whole.split(shape[along] // 3, dim=along)

    def work(group: Threads) -> int:
        if group.rank:
            hand_over(group, own_pieces([(parts[group.rank], along)], group.rank, 3), lambda: None)
            return group.handed
        with collecting(group, 3) as others:
            save_tensors(tmp_path / "parts", {"x": Parted(parts[0], along, 3, others), "y": torch.ones(2)})
        return 0

    handed = together(3, work)
    save_tensors(tmp_path / "one", {"x": whole, "y": torch.ones(2)})
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "one").read_bytes()
    row = whole.nbytes // shape[0] if shape[0] else 0
    assert max(handed) <= max(piece, row if along == 0 or piece >= row else 8)


def failing(rank: int, after: int) -> list[Any]:
    """The process of that number fails when so many pieces have been written, or handed over."""
    whole = torch.arange(600.0).view(100, 6)
    done = [0] * 3

    def work(group: Threads) -> None:
        def go_on() -> None:
            done[group.rank] += 1
            if group.rank == rank and done[group.rank] > after:
                raise OSError(28, "No space left on device")

        def write() -> None:
            own = whole[:, group.rank * 2 : group.rank * 2 + 2]
            if group.rank:
                hand_over(group, own_pieces([(own, 1)], group.rank, 3), go_on)
                return
            with collecting(group, 3) as others:
                for _ in Parted(own, 1, 3, others):
                    go_on()

        agreed(group, write)

    return together(3, work)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_where_one_fails_all_end_with_its_message(rank: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "_PIECE", 64)
    ends = failing(rank, after)
    said = "cannot write a checkpoint: No space left on device. What was there before is kept"
    for number, error in enumerate(ends):
        assert isinstance(error, StorageError)
        assert not isinstance(error, OthersFailedError)
        assert str(error) == (said if number == rank else f"of process {rank}: {said}")
