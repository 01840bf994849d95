"""The picture of SAEs that were compared: named points with bars in both directions."""

from __future__ import annotations

from typing import Any

import pytest

from saekit.reports.comparison import comparison_figure, comparison_page
from saekit.reports.figures import styled


def row(name: str, l0: float | None, ev: float | None, ce: float | None, reach: float = 0.01) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    for key, value in (("l0", l0), ("explained_variance", ev), ("ce_recovered", ce)):
        known = value is not None
        size = reach * (100 if key == "l0" else 1)
        found |= {
            key: value,
            f"{key}_low": value - size if known else None,
            f"{key}_high": value + size if known else None,
        }
    return found


ROWS = [row("topk", 32, 0.71, 0.9), row("jumprelu", 38, 0.72, 0.92), row("a $dollar$ <b>", 120, 0.8, 0.95)]


@pytest.fixture(scope="module")
def figure() -> Any:
    with styled():
        return comparison_figure([*ROWS, row("broken", None, None, None)], "3 SAEs", ["model at hook", "contexts"])


def test_every_sae_is_a_named_point_with_bars_in_both_directions(figure: Any) -> None:
    upper, lower = figure.axes
    for axes, key in ((upper, "explained_variance"), (lower, "ce_recovered")):
        assert len(axes.containers) == 3
        for container, one in zip(axes.containers, ROWS, strict=True):
            (point, _, (across, along)) = container.lines
            assert (*point.get_xdata(), *point.get_ydata()) == (one["l0"], one[key])
            ((left, _), (right, _)) = across.get_segments()[0]
            ((_, low), (_, high)) = along.get_segments()[0]
            assert (left, right) == pytest.approx((one["l0_low"], one["l0_high"]))
            assert (low, high) == pytest.approx((one[f"{key}_low"], one[f"{key}_high"]))
        assert [text.get_text() for text in axes.texts] == [one["name"] for one in ROWS]
        assert axes.get_xscale() == "log"
    said = [text.get_text() for text in figure.texts]
    assert said[:3] == ["3 SAEs", "model at hook", "contexts"]
    assert "Without numbers, and not drawn: broken" in said
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*(one["name"] for one in ROWS), "broken"]
    assert len({handle.get_color() for handle in legend.legend_handles}) == 4


def test_bars_that_are_not_known_are_left_out() -> None:
    with styled():
        figure = comparison_figure([row("a", 30, 0.5, None), {**row("b", 40, 0.6, None), "l0_low": None}], "two", [])
    (axes,) = figure.axes
    assert [len(container.lines[2]) for container in axes.containers] == [2, 1]
    page = comparison_page([{**row("b", 40, 0.6, None), "l0_low": None}], "one", [], [])
    assert page is not None
    assert '"bars"' not in page.split('id="data">')[1].split("</script>")[0]


def test_nothing_to_draw() -> None:
    assert comparison_figure([row("broken", None, None, None)], "none", []) is None
    assert comparison_page([row("broken", None, None, None)], "none", [], []) is None


def test_names_are_texts() -> None:
    page = comparison_page(ROWS, "<i>3 SAEs</i>", ["a & b"], [{"title": "t", "head": ["SAE"], "rows": [["<script>"]]}])
    assert page is not None
    assert "<i>3" not in page
    assert "a &amp; b" in page
    assert page.count("<script>") == 1
