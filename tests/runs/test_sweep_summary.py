"""What is said of a sweep at its end: file, table, command line."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from support import warm
from support.summaries import DIVERGED, GRID, row
from support.sweeps import as_csv, fake, manager, train
from support.tiny import run_config

import saekit
from saekit.config.files import dump_config
from saekit.reports.table import summary_table

pytestmark = pytest.mark.usefixtures("one_thread")


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
    return warm.python("-m", "saekit.cli", *arguments, cwd=cwd)


@pytest.mark.slow
def test_a_grid_on_the_command_line(tmp_path: Path) -> None:
    config = run_config(Path("runs"), training={"training_tokens": 1000}, sae={"normalize_sae_decoder": False})
    (tmp_path / "run.toml").write_text(dump_config(saekit.load_config(config)))
    axes = ["--grid", "sae.l1_coefficient=1,5", "--grid", "training.lr=[4e-4, 1e30]"]
    found = cli("train", "run.toml", "checkpoints.name=s", *axes, cwd=tmp_path)
    assert found.returncode == 1, found.stderr
    lines = found.stdout.splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.split()[:1] == ["SAE"]) :]
    assert lines[0].split()[:4] == ["SAE", "l1_coefficient", "lr", "L0"]
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["0", "1", "0.0004"], ["1", "1", "1e+30"], ["2", "5", "0.0004"], ["3", "5", "1e+30"]
    ]  # fmt: skip
    assert [line.split()[3] == "diverged" for line in lines[2:6]] == [False, True, False, True]
    assert "sweep folder: runs/s" in lines
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
