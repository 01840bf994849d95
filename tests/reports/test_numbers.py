"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.reports.history import Piece
from saekit.reports.numbers import count, duration, fraction, number, short_count, size
from saekit.reports.sparkline import sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.7, "1k"), (60_000, "60k"), (12_345, "12.3k"), (1_200_000, "1.2M"),
     (999_999, "1M"), (2.5e9, "2.5B"), (1e12, "1T"), (-1500, "-1.5k"), (0.25, "0.25"), (math.inf, "inf")],
)  # fmt: skip
def test_short_counts(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0004, "0.0004"), (1e-5, "1e-5"), (3.14159, "3.142"), (1234.5, "1,234"), (999.96, "1,000"),
     (12_345.6, "12,346"), (1_234_567, "1.23M"), (1e18, "1e18"), (-0.5, "-0.5"), (5.0, "5"),
     (0.000123449, "0.0001234")],
)  # fmt: skip
def test_plain_numbers(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-4, 9e14) | st.floats(-9e14, -1e-4))
def test_no_plain_number_has_an_exponent(value: float) -> None:
    assert "e" not in number(value)
    assert "e" not in short_count(value) or abs(value) >= 1e15


def test_others() -> None:
    assert [fraction(v) for v in (0.81249, -0.27, 0.9991, 1.0)] == ["0.812", "-0.270", "0.9991", "1.000"]
    assert count(1_300_000) == "1,300,000"
    assert [duration(s) for s in (0.42, 58, 99.4, 100, 3599, 3 * 3600 + 300, 52 * 3600 * 1.0, math.nan)] == [
        "0.4 s", "58 s", "99 s", "2 min", "1 h 00 min", "3 h 05 min", "2 d 4 h", "?"
    ]  # fmt: skip
    assert [size(n) for n in (12, 84_300, 1_900_000)] == ["1 kB", "84 kB", "1.9 MB"]


def pieces(values: list[float]) -> list[Piece]:
    return [Piece(float(n + 1), value, value, value) for n, value in enumerate(values)]


def test_sparklines() -> None:
    assert sparkline(pieces([0, 1, 2, 3, 4, 5, 6, 7]), 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(pieces([1.0] * 100), 20)) == 20
    assert sparkline(pieces([0.5]), 4, lower=0, upper=1) == "   ▅"
    assert sparkline(pieces([math.nan, math.nan]), 4) == "    "
    assert sparkline([], 5) == ""
    assert sparkline(pieces([-9.0, 2.0]), 2, lower=0, upper=1)[-1] == "█", "what is beyond is at the edge"
    assert sparkline(pieces([1, 10, 100]), 4, log=True)[-1] == "█"
    assert sparkline(pieces([3.0, 3.0]), 2) == "▁▁"
