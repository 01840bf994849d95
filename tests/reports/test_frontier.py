"""The picture of a sweep: which SAE is where, and what cannot be seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from support.summaries import DIVERGED, GRID, row

from saekit.reports.colors import colors_of
from saekit.reports.figures import as_png, styled
from saekit.reports.frontier_figure import frontier_figure
from saekit.runs.sweep import short_names


def drawn(rows: Sequence[Mapping[str, Any]]) -> Any:
    options = list(rows[0])[1 : list(rows[0]).index("l0")]
    with styled():
        figure = frontier_figure(rows, short_names(options), "sweep")
        if figure is not None:
            assert as_png(figure).startswith(b"\x89PNG")
    return figure


def labels(axes: Any) -> list[Any]:
    return [text for text in axes.texts if text.get_text()]


def head(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_the_picture() -> None:
    figure = drawn(GRID)
    assert figure.canvas.get_width_height()[0] > 1000
    upper, lower = figure.axes
    assert [axes.get_title(loc="left") for axes in (upper, lower)] == ["Explained variance", "CE recovered"]
    assert lower.get_xlabel() == "L0, features per token"
    lines = [line for line in upper.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[r["l0"] for r in GRID[n::2]] for n in (0, 1)], (
        "along the penalty"
    )
    assert len({line.get_color() for line in lines}) == 2, "colored by learning rate"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lr = 0.0001", "lr = 0.0003"]
    assert head(figure) == ["sweep", "8 SAEs · at the points and along lines: l1_coefficient"]
    assert upper.get_xscale() == "log"
    ticks = [t.get_text() for t, x in zip(upper.get_xticklabels(), upper.get_xticks(), strict=True) if 15 < x < 250]
    assert ticks == ["20", "50", "100", "200"]


def test_every_point_has_a_label_or_a_neighbor_that_says_the_same() -> None:
    for axes in drawn(GRID).axes:
        places = [(text.get_text(), axes.transData.transform(text.xy)) for text in labels(axes)]
        for one in GRID:
            at = axes.transData.transform((one["l0"], one["explained_variance"]))
            said = [words for words, place in places if math.dist(place, at) < 40]
            assert said == [f"{one['sae.l1_coefficient']:g}"]


def test_colors_differ_on_both_grounds() -> None:
    for values, ordered in ((range(2), True), (range(8), False), (range(30), True), (range(30), False)):
        found = colors_of(list(values), ordered=ordered)
        for ground in (0, 1):
            assert len({colors[ground] for colors in found.values()}) == len(values)
            assert all(contrast(colors[ground], ("#ffffff", "#1b1e23")[ground]) > 1.7 for colors in found.values())


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it: from 1, of a color with itself, to 21."""
    light = sorted(luminance(color) for color in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(color: str) -> float:
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_labels_neither_overlap_nor_are_cut_off() -> None:
    crowded = [
        row(
            n,
            {"sae.l1_coefficient": l1, "training.lr": lr, "training.seed": seed},
            90 / l1 + seed / 9,
            0.9 - l1 / 20 - lr,
        )
        for n, (l1, lr, seed) in enumerate(
            (l1, lr, seed) for l1 in (0.5, 1.0, 2.0, 4.0) for lr in (1e-4, 2e-4, 1e-3) for seed in (1, 2, 3)
        )
    ]
    for rows in (GRID, crowded):
        figure = drawn(rows)
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in labels(axes)]
            assert 4 <= len(boxes) <= len(rows)
            for number, box in enumerate(boxes):
                assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
                assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
                assert not any(box.overlaps(other) for other in boxes[:number])
    assert {text.get_text() for text in labels(figure.axes[0])} <= {"0.5", "1", "2", "4"}
    assert [text.get_text() for text in figure.legends[0].get_texts()][3:] == [
        "lr = 0.0001", "lr = 0.0002", "lr = 0.001"
    ] or len(figure.legends[0].get_texts()) == 6  # fmt: skip
    width, height = figure.canvas.get_width_height()
    for text in [*figure.legends[0].get_texts(), *figure.texts]:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_what_is_not_in_the_picture_is_named() -> None:
    rows = [*GRID[:5], GRID[5] | DIVERGED, GRID[6] | {"l0": 0.0}, GRID[7] | {"ce_recovered": float("nan")}]
    figure = drawn(rows)
    assert head(figure)[2:] == [
        "Not drawn, without a feature that fires, or without numbers: 6_l1_coefficient=5.0_lr=0.0001",
        "Not drawn, diverged: 5_l1_coefficient=2.0_lr=0.0003",
    ]
    points = [sum(len(line.get_xdata()) == 1 for line in axes.lines) for axes in figure.axes]
    assert points == [6, 5]
    many = drawn([GRID[0], *(one | DIVERGED for one in GRID[1:])])
    assert head(many)[-1].endswith("and 5 more")


def test_pictures_of_other_sweeps() -> None:
    hooks = [f"blocks.{n}.hook_resid_post" for n in range(12)]
    by_hook = [row(n, {"site.hook_name": hook}, 10.0 + n, 0.5) for n, hook in enumerate(hooks)]
    figure = drawn(by_hook)
    assert len(figure.legends[0].get_texts()) == 12
    assert not labels(figure.axes[0])
    assert figure.axes[0].get_xscale() == "linear", "10 to 21 is not enough for a logarithmic axis"
    assert len({line.get_color() for line in figure.axes[0].lines}) == 12
    alone = drawn([row(0, {}, 10.0, 0.5)])
    assert [text.get_text() for text in labels(alone.axes[0])] == ["0"]
    long = [row(n, {}, 10.0 + n, 0.5, name=f"{n}_a_name_of_its_own_that_takes_much_room_{n}") for n in range(3)]
    axes = drawn(long).axes[0]
    for text in labels(axes):
        assert axes.bbox.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= axes.bbox.x1
    assert [text.get_text() for text in labels(axes)] == [f"{n}_a_name_of_its_own_tha…" for n in range(3)]
    listed = [
        row(n, {"sae": f"test:{n}", "site.hook_name": f"blocks.{n}", "training.seed": n}, 10.0 + n, 0.5)
        for n in range(3)
    ]
    assert [text.get_text() for text in labels(drawn(listed).axes[0])] == ["0", "1", "2"]
    without = drawn([one | {"ce_recovered": None} for one in GRID])
    assert len(without.axes) == 1
    assert drawn([one | DIVERGED for one in GRID]) is None
    mixed = [row(n, {"evals.run": value}, 10.0 + n, 0.5) for n, value in enumerate(([], ["x"], None))]
    assert len(drawn(mixed).legends[0].get_texts()) == 3
