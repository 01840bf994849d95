"""What is said of a sweep at its end: table, picture, command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console
from support.sweeps import as_csv, fake, manager, train
from support.tiny import run_config

import saekit
from saekit.analysis.sweep import plot_sweep
from saekit.config.files import dump_config
from saekit.runs.summary import summary_table
from saekit.runs.sweep import short_names

pytestmark = pytest.mark.usefixtures("one_thread")


def row(number: int, options: Mapping[str, Any], l0: float | None, ev: float | None, **more: Any) -> dict[str, Any]:
    name = "_".join([str(number), *(f"{path.rpartition('.')[2]}={value}" for path, value in options.items())])
    return {
        "name": name, **options, "l0": l0, "explained_variance": ev, "ce_recovered": ev, "mse": 12.5,
        "dead_features": 3.0, "tokens": 2000, "status": "trained", **more,
    }  # fmt: skip


GRID = [
    row(n, {"sae.l1_coefficient": l1, "training.lr": lr}, 100 / l1 + n, 0.9 - l1 / 20)
    for n, (l1, lr) in enumerate((l1, lr) for l1 in (0.5, 1.0, 2.0, 5.0) for lr in (1e-4, 3e-4))
]
DIVERGED = dict.fromkeys(("l0", "explained_variance", "ce_recovered", "mse", "dead_features")) | {"status": "diverged"}


def test_the_summary_is_a_table_for_programs(tmp_path: Path) -> None:
    result = train(
        saekit.grid(fake(tmp_path), {"sae.d_sae": [8, 12], "sae.activation": ["relu", "tanh-relu"]}, plugins=manager())
    )
    rows = as_csv(result.folder)
    options = ["sae.d_sae", "sae.activation"]
    numbers = ["l0", "explained_variance", "ce_recovered", "mse", "dead_features"]
    assert list(rows[0]) == ["name", *options, *numbers, "tokens", "status"]
    frame = pd.read_csv(result.folder / "summary.csv")
    assert list(frame["sae.d_sae"]) == [8, 8, 12, 12]
    assert list(frame["sae.activation"]) == ["saekit:relu", "saekit:tanh-relu"] * 2
    assert (frame["tokens"] == 1500).all()
    assert (frame["status"] == "trained").all()
    for number, (name, found) in enumerate(result.results.items()):
        assert result.summary[number]["name"] == rows[number]["name"] == frame["name"][number] == name
        for column in numbers:
            source = "sparsity/dead_features" if column == "dead_features" else f"evals/{column}"
            source = source if source in found.metrics else "losses/mse_loss"
            assert result.summary[number][column] == found.metrics[source] == frame[column][number]


def test_sites_and_lists_in_the_table(tmp_path: Path) -> None:
    """Sites by their names, other lists as JSON; in code both are lists."""
    one, other = (
        fake(tmp_path, evals={"run": run}, sae={"name": "standard", "d_sae": 8, "apply_b_dec_to_input": False})
        for run in ([], ["reconstruction"])
    )
    del other["site"]
    sites = [{"hook_name": "hook_embed"}, {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}]
    result = train([one, other | {"inputs": sites}])
    rows = as_csv(result.folder)
    assert [row["inputs"] for row in rows] == ["[]", "hook_embed+blocks.0.attn.hook_z.head1"]
    assert [row["evals.run"] for row in rows] == ["[]", '["saekit:reconstruction"]']
    assert [row["site.hook_name"] for row in rows] == ["blocks.0.hook_resid_post", ""]
    assert result.summary[1]["evals.run"] == ["saekit:reconstruction"]
    assert result.summary[1]["name"].startswith("1_inputs=hook_embed+blocks.0.attn.hook_z.head1")


def test_the_summary_without_evals(tmp_path: Path) -> None:
    result = train(saekit.grid(fake(tmp_path, evals={"run": []}), {"sae.d_sae": [8, 12]}, plugins=manager()))
    for line, found in zip(result.summary, result.results.values(), strict=True):
        assert line["ce_recovered"] is None
        assert line["l0"] == found.metrics["metrics/l0"]
        assert line["explained_variance"] == found.metrics["metrics/explained_variance"]


def drawn(rows: Sequence[Mapping[str, Any]], to: Path) -> Any:
    """The figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    options = list(rows[0])[1 : list(rows[0]).index("l0")]
    with mock.patch.object(Figure, "savefig", keep):
        plot_sweep(rows, short_names(options), to)
    return figures[0] if figures else None


def labels(axes: Any) -> list[Any]:
    return [text for text in axes.texts if text.get_text()]


def test_the_picture(tmp_path: Path) -> None:
    figure = drawn(GRID, tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == [
        "Explained variance against L0",
        "CE recovered against L0",
    ]
    lines = [line for line in left.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[r["l0"] for r in GRID[n::2]] for n in (0, 1)], (
        "along the penalty"
    )
    assert len({line.get_color() for line in lines}) == 2, "colored by learning rate"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lr = 0.0001", "lr = 0.0003"]
    assert figure.get_suptitle() == "8 SAEs    numbers at the points and lines: l1_coefficient    colors: lr"
    assert left.get_xscale() == "log"
    ticks = [t.get_text() for t, x in zip(left.get_xticklabels(), left.get_xticks(), strict=True) if 15 < x < 250]
    assert ticks == ["20", "50", "100", "200"]


def test_labels_neither_overlap_nor_are_cut_off(tmp_path: Path) -> None:
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
    for rows, least in ((GRID, 8), (crowded, 12)):
        figure = drawn(rows, tmp_path / "x.png")
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in labels(axes)]
            assert least <= len(boxes) <= len(rows)
            for number, box in enumerate(boxes):
                assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
                assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
                assert not any(box.overlaps(other) for other in boxes[:number])
    assert {text.get_text() for text in labels(figure.axes[0])} <= {"0.5", "1", "2", "4"}
    assert [text.get_text() for text in figure.legends[0].get_texts()][3:] == [
        "lr = 0.0001", "lr = 0.0002", "lr = 0.001"
    ] or len(figure.legends[0].get_texts()) == 6  # fmt: skip
    width, height = figure.canvas.get_width_height()
    for text in [*figure.legends[0].get_texts(), figure._suptitle]:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_what_is_not_in_the_picture_is_named(tmp_path: Path) -> None:
    rows = [*GRID[:5], GRID[5] | DIVERGED, GRID[6] | {"l0": 0.0}, GRID[7] | {"ce_recovered": float("nan")}]
    figure = drawn(rows, tmp_path / "x.png")
    note = figure.get_supxlabel()
    assert note == (
        "Not drawn, diverged: 5_l1_coefficient=2.0_lr=0.0003\n"
        "Not drawn, without a feature that fires, or without numbers: 6_l1_coefficient=5.0_lr=0.0001"
    )
    points = [sum(len(line.get_xdata()) == 1 for line in axes.lines) for axes in figure.axes]
    assert points == [6, 5]
    many = drawn([GRID[0], *(one | DIVERGED for one in GRID[1:])], tmp_path / "x.png")
    assert many.get_supxlabel().endswith("4 more")


def test_pictures_of_other_sweeps(tmp_path: Path) -> None:
    hooks = [f"blocks.{n}.hook_resid_post" for n in range(12)]
    by_hook = [row(n, {"site.hook_name": hook}, 10.0 + n, 0.5) for n, hook in enumerate(hooks)]
    figure = drawn(by_hook, tmp_path / "x.png")
    assert len(figure.legends[0].get_texts()) == 12
    assert not labels(figure.axes[0])
    assert figure.axes[0].get_xscale() == "linear", "10 to 21 is not enough for a logarithmic axis"
    assert len({line.get_color() for line in figure.axes[0].lines}) == 12
    alone = drawn([row(0, {}, 10.0, 0.5)], tmp_path / "x.png")
    assert [text.get_text() for text in labels(alone.axes[0])] == ["0"]
    long = [row(n, {}, 10.0 + n, 0.5, name=f"{n}_a_name_of_its_own_that_takes_much_room_{n}") for n in range(3)]
    axes = drawn(long, tmp_path / "x.png").axes[0]
    for text in labels(axes):
        assert axes.bbox.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= axes.bbox.x1
    assert [text.get_text() for text in labels(axes)] == [f"{n}_a_name_of_its_own_tha…" for n in range(3)]
    listed = [
        row(n, {"sae": f"test:{n}", "site.hook_name": f"blocks.{n}", "training.seed": n}, 10.0 + n, 0.5)
        for n in range(3)
    ]
    assert [text.get_text() for text in labels(drawn(listed, tmp_path / "x.png").axes[0])] == ["0", "1", "2"]
    without = drawn([one | {"ce_recovered": None} for one in GRID], tmp_path / "x.png")
    assert len(without.axes) == 1
    assert drawn([one | DIVERGED for one in GRID], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    mixed = [row(n, {"evals.run": value}, 10.0 + n, 0.5) for n, value in enumerate(([], ["x"], None))]
    assert len(drawn(mixed, tmp_path / "x.png").legends[0].get_texts()) == 3


def shown(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(summary_table(rows, console))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_table_for_people() -> None:
    rows = [*GRID[:7], GRID[7] | DIVERGED]
    for width in (80, 200):
        lines = shown(rows, width)
        assert lines[0].split() == ["SAE", "l1_coefficient", "lr", "L0", "EV", "CE", "rec.", "mse", "dead"]
        assert lines[2].split() == ["0", "0.5", "0.0001", "200", "0.875", "0.875", "12.5", "3"]
        assert lines[9].split() == ["7", "5", "0.0003", "diverged", "-", "-", "-", "-"]
        assert len(lines) == 10, "one line for each"
        assert max(map(len, lines)) <= 80
    narrow = shown(rows, 64)
    assert [line.split()[0] for line in narrow[:2]] == ["l1_", "SAE"]
    assert len(narrow) == 11
    assert max(map(len, narrow)) <= 64


def test_the_table_of_many_options_in_a_narrow_terminal() -> None:
    options = {
        "site.hook_name": "blocks.10.attn.hook_z", "sae": "saekit:standard", "sae.activation": "saekit:tanh-relu",
        "training.lr": 3e-4, "sae.l1_coefficient": 5.0,
    }  # fmt: skip
    rows = [row(n, options | {"training.lr": n / 10}, 12.0, 0.5, tokens=2_000_000 + n) for n in range(3)]
    narrow, wide = shown(rows, 80), shown(rows, 200)
    assert max(map(len, narrow)) <= 80
    assert len(wide) == 5
    assert narrow[2].split() == ["0", "12", "0.500", "0.500", "12.5", "3", "2,000,000"]
    assert [line.strip() for line in narrow[3:8]] == [
        "hook_name=blocks.10.attn.hook_z", "sae=saekit:standard", "activation=saekit:tanh-relu", "lr=0",
        "l1_coefficient=5",
    ]  # fmt: skip
    named = [one | {"name": f"my_own_{n}"} for n, one in enumerate(rows)]
    assert shown(named, 200)[2].startswith("my_own_0 ")
    assert "tokens" not in shown([one | {"tokens": 5} for one in rows], 200)[0]


# ---- the command line


def cli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "saekit.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.slow
def test_a_grid_on_the_command_line(tmp_path: Path) -> None:
    config = run_config(Path("runs"), training={"training_tokens": 1000}, sae={"normalize_sae_decoder": False})
    (tmp_path / "run.toml").write_text(dump_config(saekit.load_config(config)))
    axes = ["--grid", "sae.l1_coefficient=1,5", "--grid", "training.lr=[4e-4, 1e30]"]
    found = cli("train", "run.toml", "checkpoints.name=s", *axes, cwd=tmp_path)
    assert found.returncode == 1, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].split()[:4] == ["SAE", "l1_coefficient", "lr", "L0"]
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["0", "1", "0.0004"], ["1", "1", "1e+30"], ["2", "5", "0.0004"], ["3", "5", "1e+30"]
    ]  # fmt: skip
    assert [line.split()[3] == "diverged" for line in lines[2:6]] == [False, True, False, True]
    assert lines[6] == "sweep folder: runs/s"
    for name in ("1_l1_coefficient=1_lr=1e+30", "3_l1_coefficient=5_lr=1e+30"):
        why = r"the loss of .* is (nan|inf) at step \d \(learning rate 1e\+30, 256 activations of mean norm"
        assert re.search(rf"(?m)^{name.replace('+', '[+]')} diverged: {why}", found.stderr)
        assert f"warning: {name} is stopped: the loss of" in found.stderr
    assert "Traceback" not in found.stderr
    assert {path.name for path in (tmp_path / "runs/s").glob("*/sae")} == {"sae"}
    assert len(list((tmp_path / "runs/s").glob("*/sae"))) == 2
    wrong = cli("train", "run.toml", "--grid", "sae.l1_coeficient=1,5", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Did you mean 'l1_coefficient'" in wrong.stderr
