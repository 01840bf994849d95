"""What is in the picture of a run: axes, limits, texts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from support.written import EVALS, record_of, records, write_run

from saekit.reports.curves import curves_figure
from saekit.reports.figures import as_png, styled
from saekit.reports.folder import read_run


def drawn(folder: Path) -> Any:
    run = read_run(folder)
    with styled():
        figure = curves_figure(run.alone, run.state)
        if figure is not None:
            assert as_png(figure).startswith(b"\x89PNG")
    return figure


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def ends(axes: Any) -> list[str]:
    """What is written at the ends of curves, from below."""
    texts = [text for text in axes.texts if text.get_text() != "fine-tuning "]
    return [text.get_text() for text in sorted(texts, key=lambda text: text.get_window_extent().y0)]


def head(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


def line(axes: Any, marker: str = "None") -> Any:
    (found,) = [line for line in axes.lines if line.get_marker() == marker and line.get_linestyle() in ("-", "None")]
    return found


def test_the_panels_of_a_run(tmp_path: Path) -> None:
    figure = drawn(write_run(tmp_path / "run", records(100, evals=20)))
    shown = panels(figure)
    assert list(shown) == [
        "Loss (dashed: mse)", "Explained variance", "L0, features per token", "Dead features, of 1,024",
        "λ, l1_coefficient", "Learning rate",
    ]  # fmt: skip
    assert head(figure)[:2] == [
        "run", "standard, 1,024 features · blocks.1.hook_resid_post of saekit/tiny-python · 100k tokens"
    ]  # fmt: skip
    explained = shown["Explained variance"]
    assert explained.get_ylim() == (0, 1)
    assert ends(explained) == ["0.812", "0.900", "0.943"]
    dots, diamonds = line(explained, "o"), line(explained, "D")
    assert list(dots.get_xdata()) == [20_000, 40_000, 60_000, 80_000, 100_000, 100_000]
    assert list(diamonds.get_ydata()) == [EVALS["evals/ce_recovered"]] * 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["in training", "held out", "CE recovered"]
    assert ends(shown["L0, features per token"]) == ["30", "31.5"]
    assert ends(shown["Dead features, of 1,024"]) == ["80"]
    assert ends(shown["Learning rate"]) == ["0.001"]
    assert ends(shown["Loss (dashed: mse)"]) == ["40.01", "100"]
    for axes in figure.axes:
        assert axes.get_xlim() == pytest.approx((0, 101_500))
        texts = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert not [text for text in texts if "e" in text], "plain numbers"
        assert not axes.xaxis.get_offset_text().get_text()
        assert not axes.yaxis.get_offset_text().get_text()
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks[:2] == ["0", "50k"]


def test_nothing_overlaps_or_is_cut_off(tmp_path: Path) -> None:
    long = "a-run-whose-name-is-much-longer-than-any-picture-is-wide-as-some-are-that-scripts-have-made"
    options = {
        "model": {"name": "/models/of/somebody/WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW"},
        "sae": {"name": "saekit:topk", "d_sae": 131_072},
    }
    runs = [
        write_run(
            tmp_path / long, records(300, noise=1.0, evals=30), options=options, end="failed", reason="why " * 60
        ),
        write_run(tmp_path / "short", records(3)),
        write_run(tmp_path / "close", [record_of(1, 1, 9, **dict.fromkeys(EVALS, 0.88))]),
        write_run(tmp_path / "high", [record_of(9, 9, 9, **dict.fromkeys(EVALS, 1.0))]),
    ]
    for run in runs:
        figure = drawn(run)
        width, height = figure.canvas.get_width_height()
        boxes = [text.get_window_extent() for text in figure.texts]
        boxes += [text.get_window_extent() for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            boxes += [text.get_window_extent() for text in axes.texts if text.get_text()]
            boxes.append(axes._left_title.get_window_extent())
            low, high = axes.get_ylim()
            boxes += [
                label.get_window_extent()
                for at, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
                if low <= at <= high
            ]
        for box in boxes:
            assert 0 <= box.x0 <= box.x1 <= width + 1, run
            assert 0 <= box.y0 <= box.y1 <= height + 1, run
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other) or min(one.width, other.width) == 0, run


def test_it_can_be_read_at_400_pixels(tmp_path: Path) -> None:
    figure = drawn(write_run(tmp_path / "run"))
    smallest = min(text.get_fontsize() for axes in figure.axes for text in (*axes.texts, *axes.get_xticklabels()))
    pixels = smallest / 72 * figure.dpi * 400 / figure.canvas.get_width_height()[0]
    assert pixels >= 8


@pytest.mark.parametrize("steps", [1, 5, 5000])
def test_short_and_long_runs(tmp_path: Path, steps: int) -> None:
    figure = drawn(write_run(tmp_path / "run", records(steps, noise=1.0, evals=-1)))
    explained = panels(figure)["Explained variance"]
    curve = next(line for line in explained.lines if len(line.get_xdata()))
    assert curve.get_marker() == ("o" if steps <= 12 else "None"), "points, where a line would hardly be seen"
    assert len(curve.get_xdata()) <= 800
    assert curve.get_xdata()[-1] == steps * 1000
    assert bool(explained.collections) == (steps == 5000), "a band from the least to the largest"
    assert not figure.legends


def test_without_a_number(tmp_path: Path) -> None:
    lost = records(60, of=100, evals=-1)
    for record in lost[40:]:
        record |= dict.fromkeys(("losses/overall_loss", "losses/mse_loss", "metrics/explained_variance"))
    why = "the loss of sae is nan at step 61 (learning rate 1e30)"
    figure = drawn(write_run(tmp_path / "run", lost, end="diverged", reason=why))
    assert head(figure)[-2] == f"diverged: {why}, at 60k of 100k tokens"
    assert head(figure)[-1] == "below 0 until 6k"
    assert ends(panels(figure)["Explained variance"]) == ["nan"]
    curve = line(panels(figure)["Explained variance"])
    assert math.isnan(curve.get_ydata()[-1])
    nothing = [{"step": n, "details/n_training_tokens": n, "metrics/l0": None} for n in range(1, 9)]
    assert drawn(write_run(tmp_path / "nothing", nothing)) is None
    assert drawn(write_run(tmp_path / "empty", [])) is None


def test_below_zero(tmp_path: Path) -> None:
    low = records(20)
    for record in low:
        record |= {name: -0.27 for name in record if name.endswith("/explained_variance")}
    figure = drawn(write_run(tmp_path / "run", low))
    assert head(figure)[-1] == "still below 0"
    assert ends(panels(figure)["Explained variance"])[:2] == ["-0.270", "-0.270"]
    dots = line(panels(figure)["Explained variance"], "o")
    assert all(math.isnan(y) for y in dots.get_ydata()), "no point lies outside of the axes"
    late = records(30)
    late[-1] |= {"evals/explained_variance": -1.0}
    assert head(drawn(write_run(tmp_path / "late", late)))[-1] == "held out below 0"


def test_what_has_no_lambda(tmp_path: Path) -> None:
    made = records(30)
    for record in made:
        record.pop("details/current_l1_coefficient", None)
    run = write_run(
        tmp_path / "run",
        made,
        options={
            "sae": {"name": "saekit:topk_transcoder"},
            "site": {},
            "inputs": [{"hook_name": "blocks.1.ln2.hook_normalized"}],
            "targets": [{"hook_name": "blocks.1.hook_mlp_out", "hook_head_index": 3}],
        },
    )
    figure = drawn(run)
    assert len(figure.axes) == 5
    assert head(figure)[1:4] == [
        "topk_transcoder, 1,024 features",
        "blocks.1.ln2.hook_normalized to blocks.1.hook_mlp_out.head3 of saekit/tiny-python",
        "30k tokens",
    ]
    jump = records(30)
    for record in jump:
        record["details/current_l0_coefficient"] = record.pop("details/current_l1_coefficient", None)
    assert "λ, l0_coefficient" in panels(drawn(write_run(tmp_path / "jump", jump)))


@pytest.mark.parametrize(("metric", "title"), [("k", "k"), ("topk_threshold", "Threshold")])
def test_only_a_penalty_has_a_lambda(tmp_path: Path, metric: str, title: str) -> None:
    rows = records(30)
    for record in rows:
        record[f"details/current_{metric}"] = record.pop("details/current_l1_coefficient", None)
    shown = list(panels(drawn(write_run(tmp_path / "run", rows))))
    assert shown[-2:] == [title, "Learning rate"]


def test_where_fine_tuning_begins(tmp_path: Path) -> None:
    options = {"training": {"training_tokens": 80_000, "finetuning_tokens": 20_000}}
    figure = drawn(write_run(tmp_path / "run", options=options))
    for axes in figure.axes:
        assert [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"] == [[80_000, 80_000]]
    assert "fine-tuning " in [text.get_text() for text in figure.axes[0].texts]


def test_dead_features_are_whole_numbers(tmp_path: Path) -> None:
    made = records(30)
    for record in made:
        record["sparsity/dead_features"] = 0.0 if record["step"] < 20 else 2.0
    axes = panels(drawn(write_run(tmp_path / "run", made)))["Dead features, of 1,024"]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["0", "1", "2"]
    assert axes.get_ylim()[0] == 0


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    options = {"model": {"name": "a/$x^2$"}, "site": {"hook_name": "$\\alpha_\x1b[31m"}}
    figure = drawn(write_run(tmp_path / "$run_1$", options=options))
    assert head(figure)[0] == "$run_1$"
    assert "$\\alpha_\\x1b[31m of a/$x^2$" in head(figure)[1]
    assert not any(text.get_parse_math() for text in figure.texts)


def test_the_settings_of_the_process_do_not_matter(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    read = read_run(run)

    def png() -> bytes:
        with styled():
            return as_png(curves_figure(read.alone, read.state))

    plain = png()
    own = {"font.size": 30, "axes.facecolor": "black", "text.usetex": True, "savefig.dpi": 17, "lines.linewidth": 9}
    with matplotlib.rc_context(own):
        assert png() == plain, "and the same metrics give the same bytes"
        assert matplotlib.rcParams["font.size"] == 30
