"""The table of a run, of a sweep, and of one SAE of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.written import records, write_run, write_sweep

import saekit
from saekit.errors import PlaceError
from saekit.reports import run_table
from saekit.reports.folder import read_run
from saekit.reports.sweep import summary_of
from saekit.runs.record import RunRecord


def shown(folder: Path, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(run_table(folder, console))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_table_of_a_run(tmp_path: Path) -> None:
    lines = shown(write_run(tmp_path / "run"))
    assert lines[:2] == [
        "standard, 1,024 features on blocks.1.hook_resid_post of saekit/tiny-python",
        "100,000 tokens of saekit/python-stdlib, 100 steps, 6.0 s",
    ]
    assert [line.split("  ")[0] for line in lines[4:]] == [
        "explained variance", "L0, features per token", "CE recovered", "CE clean | with SAE | ablated", "loss",
        "dead features",
    ]  # fmt: skip
    assert lines[2].split() == ["held", "out", "in", "training"]
    assert lines[4].split()[-2:] == ["0.812", "0.900"]
    assert lines[6].split()[-1] == "0.943"
    assert lines[7].endswith("3.500 | 4.100 | 13.700")
    assert lines[9].endswith("80 of 1,024")


def test_without_evals_and_before_its_end(tmp_path: Path) -> None:
    lines = shown(write_run(tmp_path / "run", records(40, of=100, evals=-1), end="interrupted", sae=False))
    assert lines[1] == "40,000 of 100,000 tokens of saekit/python-stdlib, 40 steps, 2.0 s"
    assert lines[2].split() == ["in", "training"]
    assert not [line for line in lines if "CE" in line]


def test_what_other_evals_have_measured_and_what_is_no_number(tmp_path: Path) -> None:
    made = records(10)
    made[-1] |= {"evals/absorption": 0.25, "evals/ce_recovered": None, "evals/\x1b[31m": 1.0}
    made[-2] |= {"metrics/l0": None}
    lines = shown(write_run(tmp_path / "run", made))
    told = [line.split("  ")[-1].strip() for line in lines if line.startswith(("CE recovered", "absorption"))]
    assert told == ["not finite", "0.25"], "of an infinite one, too, a file of JSON has null"
    assert next(line for line in lines if line.startswith("L0")).endswith("  not finite")
    assert next(line for line in lines if "[31m" in line).startswith("\\x1b[31m")


def test_the_table_of_a_sweep(tmp_path: Path) -> None:
    points = {
        f"{n}_l1={l1:g}_lr={lr:g}": {"sae": {"l1_coefficient": l1}, "training": {"lr": lr}}
        for n, (l1, lr) in enumerate((l1, lr) for l1 in (1.0, 9.0) for lr in (1e-4, 1e-3))
    }
    folder = write_sweep(tmp_path / "sweep", points, diverged={"3_l1=9_lr=0.001": "why"})
    lines = shown(folder)
    assert lines[0].split() == ["SAE", "l1_coefficient", "lr", "L0", "EV", "CE", "rec.", "mse", "dead"]
    assert lines[2].split()[:3] == ["0", "1", "0.0001"]
    assert lines[5].split()[3:5] == ["diverged", "-"]
    (one,) = [line for line in shown(folder / "0_l1=1_lr=0.0001") if line.startswith("standard")]
    assert one.startswith("standard, 1,024 features")
    with pytest.raises(PlaceError):
        run_table(tmp_path / "nothing")


def test_in_what_saes_differ_is_told_by_their_files(tmp_path: Path) -> None:
    points = {
        "a": {"sae": {"name": "saekit:topk", "k": 32}, "site": {"hook_name": "blocks.0.hook_resid_post"}},
        "b": {"sae": {"name": "saekit:jumprelu"}},
        "c": {"evals": {"run": []}, "checkpoints": {"name": "c"}},
    }
    folder = write_sweep(tmp_path / "sweep", points, end=None)
    summary = summary_of(read_run(folder))
    assert dict(summary.options) == {
        "site.hook_name": "hook_name", "sae": "sae", "sae.k": "k", "evals.run": "run"
    }  # fmt: skip
    assert [row["sae"] for row in summary.rows] == ["saekit:topk", "saekit:jumprelu", "saekit:standard"]
    assert [row["sae.k"] for row in summary.rows] == [32, None, None]
    assert [row["status"] for row in summary.rows] == ["trained"] * 3
    (folder / "summary.csv").write_text("name,sae.k,training.lr,l0,status\na,32,0.001,5,trained\nb,,True,,\nc,x,1,,\n")
    written = summary_of(read_run(folder))
    assert dict(written.options) == {"sae.k": "k", "training.lr": "lr"}, "which a finished sweep has written itself"
    assert [(row["sae.k"], row["training.lr"]) for row in written.rows] == [(32, 0.001), (None, True), ("x", 1)]
    for strange in ("name,x\na,1\n", "\0", "", "name,x\nother,1\nb,2\nc,3\n"):
        (folder / "summary.csv").write_text(strange)
        assert list(summary_of(read_run(folder)).options) == list(summary.options), "it is not of this sweep"


def test_the_record_tells_in_what_the_saes_of_a_sweep_at_work_differ(tmp_path: Path) -> None:
    plugins = saekit.default_manager()
    saes = {"a": {"name": "topk"}, "b": {"name": "batchtopk", "k": 16}, "c": {"name": "jumprelu"}}
    configs = {name: saekit.load_config({"sae": sae}, plugins=plugins) for name, sae in saes.items()}
    RunRecord(tmp_path, {name: name for name in saes}).write(configs, plugins)
    summary = summary_of(read_run(tmp_path))
    assert dict(summary.options) == {"sae": "sae", "sae.k": "k"}
    assert [row["sae.k"] for row in summary.rows] == [32, 16, None]
    assert RunRecord.read(tmp_path).changed == ("sae", "sae.k")
    RunRecord.note_checkpoint(tmp_path)
    assert RunRecord.read(tmp_path).changed == ("sae", "sae.k")


def test_a_checkpoint_knows_more_steps_than_were_logged(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", records(40, of=100, evals=-1), end="interrupted", sae=False))
    run.alone.facts = {"step": 45, "tokens": 45_000}
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(run_table(run, console))
    told = console.export_text().splitlines()[1]
    assert told.startswith("45,000 of 100,000 tokens of saekit/python-stdlib, 45 steps, ")
    run.alone.facts = {"step": 39, "tokens": 39_000}
    assert (run.alone.step, run.alone.tokens) == (40, 40_000), "an older one"
