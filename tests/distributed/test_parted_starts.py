"""Starting weights of which each process makes its part: the very numbers of the whole, and nobody has that."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from support.parted import OF_EVERY_ARCHITECTURE
from support.processes import Case
from support.spread_cases import CASES
from torch import Tensor

from saekit.distributed import ALONE, Share, World, drawing
from saekit.distributed.group import Group
from saekit.sae import init, splitting
from saekit.sae.init import starts_by_parts
from saekit.sae.module import SAEModule
from saekit.sae.parameters import Start

STARTS: dict[str, dict[str, Any]] = {
    "kaiming": {"decoder_heuristic_init": False},
    "heuristic": {"decoder_heuristic_init": True, "normalize_sae_decoder": False},
    "orthogonal": {"decoder_orthogonal_init": True, "decoder_heuristic_init": False},
    "transposed": {"init_encoder_as_decoder_transpose": True, "decoder_heuristic_init": False},
    "transposed heuristic": {"init_encoder_as_decoder_transpose": True, "normalize_sae_decoder": False,
                             "decoder_heuristic_init": True},
}  # fmt: skip


class Part(Group):
    """One of a group whose others are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def world(rank: int, parts: int) -> World:
    return attrs.evolve(ALONE, all=Part(rank, parts), features=Part(rank, parts))


def parts_of(case: Case, parts: int) -> list[SAEModule]:
    return [case.trainer(world(rank, parts)).sae for rank in range(parts)]


def check(case: Case, parts: int) -> None:
    whole = case.trainer(ALONE).sae
    split = parts_of(case, parts)
    for entry in whole.table:
        value, own = getattr(whole, entry.name), [getattr(part, entry.name) for part in split]
        if value is None or entry.split is None:
            for part in own:
                assert part is value is None or torch.equal(part, value), entry.name
            continue
        assert torch.equal(torch.cat(own, dim=entry.dims.index("d_sae")), value), entry.name


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_PIECE", 48)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", OF_EVERY_ARCHITECTURE)
def test_parts_of_every_architecture_are_those_of_the_whole(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saekit.runs.setup.whole_like", None)  # nobody makes the whole
    case = attrs.evolve(CASES[name], dtype=dtype)
    assert starts_by_parts(case.trainer(ALONE).sae.table)
    check(case, 4)


@pytest.mark.parametrize("piece", [16, 48, 1 << 22])
@pytest.mark.parametrize("d_sae", [3, 30, 36])
@pytest.mark.parametrize("start", STARTS)
def test_however_they_start(start: str, d_sae: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_PIECE", piece)
    if start.startswith("orthogonal") and d_sae == 3:
        d_sae = 6
    check(Case({"name": "standard", **STARTS[start]}, widths=(7,), d_sae=d_sae, dtype="float32"), 3)


@pytest.mark.parametrize("piece", [16, 48, 1 << 22])
@pytest.mark.parametrize(("counts", "features"), [((3, 3, 2), 1), ((8,), 2), ((5, 3), 3), ((1, 1), 1)], ids=str)
def test_noise_is_that_of_the_whole(
    counts: tuple[int, ...], features: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_PIECE", piece)
    whole = torch.Generator().manual_seed(1)
    expected = torch.randn(sum(counts), 7 * features, generator=whole)
    rows = [part for row in expected.split(counts) for part in row.split(7, dim=1)]
    for number, one in enumerate(rows):
        data, feature = divmod(number, features)
        share = Share(Part(data, len(counts)), Part(feature, features), counts if len(counts) > 1 else ())
        generator = torch.Generator().manual_seed(1)
        monkeypatch.setattr(torch, "randn", lambda *rest, **more: pytest.fail("all of it is drawn at once"))
        assert torch.equal(share.noise(counts[data], 7, generator), one)
        assert torch.equal(generator.get_state(), whole.get_state()), "the next draw is that of the whole, too"
        monkeypatch.undo()
        monkeypatch.setattr(drawing, "_PIECE", piece)


def test_numbers_of_the_whole_are_drawn_in_pieces_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_PIECE", 64)
    asked: list[int] = []
    part = attrs.evolve(_start(parts=2, part=1), parts=2)

    def draw(memory: Tensor) -> None:
        asked.append(memory.numel())
        memory.uniform_(generator=part.generator)

    found = init.drawn(part, (5, 50), 1, draw)
    whole = torch.empty(5, 100).uniform_(generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, whole[:, 50:])
    assert sum(asked) == 500
    assert max(asked) < 64 + 16


def _start(**parts: int) -> Start:
    sae = CASES["standard"].trainer(ALONE).sae
    return Start(sae.config, torch.Generator().manual_seed(1), torch.float32, sae.table, **parts)


def test_a_strangers_start_is_made_whole_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks at all features, as only the whole has them."""
    case = CASES["standard"]
    kind = type(case.trainer(ALONE).sae)
    stated, made = kind.parameters_of, list[tuple[int, ...]]()

    def ranked(start: Start, shape: tuple[int, ...]) -> Tensor:
        made.append(shape)
        return start["W_enc"].norm(dim=0).argsort().float()

    def parameters_of(config: Any) -> Any:
        return tuple(attrs.evolve(entry, init=ranked) if entry.name == "b_enc" else entry for entry in stated(config))

    monkeypatch.setattr(kind, "parameters_of", parameters_of)
    assert not starts_by_parts(case.trainer(ALONE).sae.table)
    check(case, 2)
    assert {*made} == {(32,)}
    assert splitting.is_saved_by_parts(kind)
