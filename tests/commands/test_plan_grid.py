"""`saekit plan --grid`: what it says of a sweep on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from support.command import cli
from support.tiny import run_config

import saekit


def test_a_grid_is_planned_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run_config(tmp_path / "runs"))))
    grid = ("--grid", "sae.l1_coefficient=1,5", "--grid", "training.lr=1e-3,2e-3,3e-3", "--no-load")
    shown = cli("plan", "run.toml", *grid, cwd=tmp_path).stdout
    assert "SAEs                   6, 64 features, 16,576 parameters each\n" in shown
    assert "0_l1_coefficient=1_lr=0.001, 1_l1_coefficient=1_lr=0.002, " in shown
    assert shown.splitlines()[-1].startswith("It fits: it needs about ")
    data = json.loads(cli("plan", "run.toml", *grid, "--json", cwd=tmp_path).stdout)
    assert (data["numbers"]["saes"], data["numbers"]["steps"]) == (6, 8)
    assert data["numbers"]["sae_bytes"] == 6 * 16 * 16_576


def test_problems_of_a_grid_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run_config(tmp_path / "runs"))))
    grid = (
        "--grid",
        "model.dtype=float32,bfloat16",
        "--grid",
        "evals.run=[[], ['reconstruction', 'saekit:reconstruction']]",
    )
    shown = cli("plan", "run.toml", *grid, "--no-load", cwd=tmp_path, check=2).stdout.splitlines()
    problems = [line for line in shown if line.startswith("problem: ")]
    assert len(problems) == 2, problems
    assert "model.dtype: differs between SAEs that are to be trained together" in problems[0]
    assert "evals.run: names a plugin twice" in problems[1]
    assert problems[1].count("_dtype=") == 2, "which two of the four"
    assert shown[-1] == "It cannot run: 2 problems."
    both = cli("plan", "run.toml", "--grid", "sae.l1_coefficient", cwd=tmp_path, check=2)
    assert "'sae.l1_coefficient' is not an axis of a grid" in both.stderr
