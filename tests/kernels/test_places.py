"""Places of a few numbers among many are those that plain torch finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import seeded

from saekit.kernels import places
from saekit.kernels.places import at_least, count_where, not_above, not_zero, places_where

KINDS = ["not above", "at least", "not zero"]


@given(
    n=st.integers(0, 40), m=st.sampled_from([1, 7, 8, 600, 4096]),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_places_are_those_of_torch(n: int, m: int, density: float, kind: str, dtype: torch.dtype, seed: int) -> None:
    active = torch.rand(n, m, generator=seeded(seed)) < density
    numbers = torch.randn(n, m, generator=seeded(seed + 1), dtype=dtype).abs().add(0.1).where(active, 0)
    numbers[torch.rand(n, m, generator=seeded(seed + 2)) < 0.001] = torch.nan
    columns, rows = torch.rand(m, dtype=dtype) * 0.2, torch.rand(n, 1, dtype=dtype) * 0.2
    test, expected = {
        "not above": (not_above(columns), ~(numbers <= columns)),
        "at least": (at_least(rows), numbers >= rows),
        "not zero": (not_zero, numbers != 0),
    }[kind]
    found, number = places_where(numbers, test), int(expected.sum())
    assert found is not None
    assert torch.equal(found, expected.flatten().nonzero().squeeze(1))
    assert count_where(numbers, test) == number
    within = places_where(numbers, test, limit=number)
    assert within is not None
    assert torch.equal(within, found)
    assert number == 0 or places_where(numbers, test, limit=number - 1) is None


def test_the_rows_of_a_second_block_have_their_own_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_BLOCK", 16)
    numbers, bounds = torch.randn(9, 8, generator=seeded()), torch.randn(9, 1, generator=seeded(1))
    found = places_where(numbers, at_least(bounds))
    assert found is not None
    assert torch.equal(found, (numbers >= bounds).flatten().nonzero().squeeze(1))


def test_rows_with_twice_their_part_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the rows at least: one of many may have all of its features active."""
    monkeypatch.setattr(places, "_BLOCK", 16)
    numbers, asked = torch.zeros(20, 8), []
    numbers[1] = 1  # 8 of 16 in the first block, and of 32 in the first eighth
    numbers[2, :2] = 1

    def test(numbers: object, rows: slice, out: object) -> None:
        asked.append(rows.start)
        not_zero(numbers, rows, out)  # type: ignore[arg-type]

    assert places_where(numbers, test, limit=24) is None
    assert asked == [0, 2], "the others need not be looked at"
    found = places_where(numbers, test, limit=25)
    assert found is not None
    assert len(found) == 10
