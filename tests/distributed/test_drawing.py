"""Numbers that are drawn for a whole, of which each process keeps a part: those of the whole."""

from __future__ import annotations

import pytest
import torch

from saekit.distributed import drawing
from saekit.distributed.drawing import drawn_part


@pytest.mark.parametrize("piece", [16, 48, 112, 1 << 22])
@pytest.mark.parametrize("shape", [(13, 24), (3, 100), (40, 8), (1, 64)])
def test_a_part_is_that_of_the_whole(shape: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_PIECE", piece)
    (height, width), one, other = shape, torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for rows in ((0, height), (height // 2, height - height // 2), (height // 3, 1)):
        for columns in ((0, width), (width // 4, width // 2), (width - 1, 1)):
            whole = torch.empty(shape).normal_(generator=one)
            part = drawn_part(lambda memory: memory.normal_(generator=other), shape, rows, columns)
            assert torch.equal(part, whole[rows[0] : sum(rows), columns[0] : sum(columns)])
            assert torch.equal(one.get_state(), other.get_state())
