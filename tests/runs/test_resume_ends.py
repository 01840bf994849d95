"""Runs that were stopped in their last evals, are finished, or are to be trained longer; and the command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.runs import EVERYTHING, contents, fake_config, manager, on_cache, resume, train, without
from support.tiny import run_config

import saekit
from saekit.errors import ConfigError, TrainingInterrupted
from saekit.runs.saving import Saving
from saekit.testing import fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the end of a run


def test_stopped_between_the_last_eval_and_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line is there already, and comes again when the run is resumed: no line twice."""
    sections = {"evals": {"every_n_steps": 0, "n_contexts": 4}}
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    with contextlib.chdir(tmp_path / "whole"):
        train(fake_config(Path("runs"), **sections))

    def killed(self: Saving, **options: Any) -> None:
        if options.get("finished"):
            raise RuntimeError("as good as killed")

    with contextlib.chdir(tmp_path / "part"):
        with monkeypatch.context() as patch:
            patch.setattr(Saving, "save_if_possible", killed)
            with pytest.raises(RuntimeError, match="as good as killed"):
                train(fake_config(Path("runs"), **sections))
        lines = Path("runs/run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, 12), 11]
        resume(Path("runs/run"))
        assert Path("runs/run/metrics.jsonl").read_text().splitlines() == lines
    assert contents(tmp_path / "part/runs/run") == contents(tmp_path / "whole/runs/run")


def test_a_signal_in_the_last_evals_acts_at_once(tmp_path: Path) -> None:
    pressed = [True, False, False]

    def build(config: object, *, run: object) -> object:
        def measure(sae: object, **services: object) -> dict[str, float]:
            if pressed.pop(0):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                raise AssertionError("not at once")
            return {"x": 1.0}

        return measure

    plugins = manager(None, fake_plugin("evals", "slow", build=build))
    config = fake_config(tmp_path, evals={"run": ["slow"], "every_n_steps": 0})
    with pytest.raises(TrainingInterrupted, match="interrupted after 11 steps") as caught:
        train(config, plugins=plugins)
    assert caught.value.signal == signal.SIGTERM, "which the command exits with 143 for"
    assert resume(tmp_path / "run", plugins=plugins).metrics["evals/x"] == 1


def test_a_finished_run(tmp_path: Path) -> None:
    result = train(fake_config(tmp_path))
    before = contents(result.folder)
    with pytest.raises(ConfigError) as caught:
        resume(result.folder)
    assert str(caught.value) == (
        f"the run in {result.folder} is finished. To train it longer, raise training.training_tokens and allow it: "
        f"saekit train --resume {result.folder} training.training_tokens=... --allow training.training_tokens"
    )
    assert contents(result.folder) == before


@pytest.mark.parametrize("source", ["live, ahead", "cached"])
def test_longer_training_is_as_if_it_had_been_so_from_the_start(tmp_path: Path, cache: Path, source: str) -> None:
    short: dict[str, Any] = {
        "training_tokens": 1024, "finetuning_tokens": 0, "finetuning_method": None, "lr_decay_steps": 0
    }  # fmt: skip
    sections = {"training": short, "evals": {"run": []}}
    config = fake_config(tmp_path, on_cache(source, cache), **sections) | {"lr_schedule": "constant"}
    run = train(config).folder
    longer = {"overrides": ["training.training_tokens=3000"], "allow": ["training.training_tokens"]}
    with pytest.raises(ConfigError, match="training.training_tokens: was 1024 when the run was saved, and is 3000 now"):
        resume(run, overrides=longer["overrides"])
    assert resume(run, **longer).metrics["details/n_training_tokens"] == 3000
    assert saekit.load_config(run / "config.toml", plugins=manager()).training.training_tokens == 3000
    config["checkpoints"]["name"] = "other"
    config["training"]["training_tokens"] = 3000
    whole = train(config).folder
    ours, theirs = contents(run), contents(whole)
    for path in ("metrics.jsonl", "sae/cfg.json", "sae/sae_weights.safetensors", "sae/probe.safetensors"):
        assert ours[path] == theirs[path]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)), "no line twice"
    with pytest.raises(ConfigError, match="is finished"):
        resume(run)


# ---- the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["saekit", "train", *map(str, arguments)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)  # of click's, in typer
        from saekit import cli

        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM, as a cluster sends it, ends with 143, and a resumed run with what an uninterrupted one leaves."""
    monkeypatch.chdir(tmp_path)
    sections = {section: dict(options) for section, options in EVERYTHING.items()}
    config = run_config(Path("runs"), **sections, checkpoints={"name": "run"})
    Path("run.toml").write_text(saekit.dump_config(saekit.load_config(config)))
    assert command(monkeypatch, "run.toml", "checkpoints.name=whole", "training.training_tokens=12000") == 0
    process = warm.Popen("-m", "saekit.cli", "train", "run.toml", "training.training_tokens=12000")
    metrics, deadline = Path("runs/run/metrics.jsonl"), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 5:
            break
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143, err
    found = re.fullmatch(
        r"interrupted after (\d+) steps \([\d,]+ tokens\); saved in (runs/run/checkpoints/step-\d+)\. "
        r"Go on with: saekit train --resume runs/run\n", err
    )  # fmt: skip
    assert found, err
    assert Path(found[2]).name == f"step-{found[1]}"
    capsys.readouterr()

    assert command(monkeypatch, "--resume", "runs") == 2
    assert (
        "error: runs is not a run folder: there is no run.json in it. It holds the runs run, whole."
        in capsys.readouterr().err
    )
    assert command(monkeypatch, "--resume", "runs/run", "training.lr=1") == 2
    assert "error: training.lr: was 0.0004 when the run was saved, and is 1.0 now;" in capsys.readouterr().err
    assert command(monkeypatch, "--resume", "runs/run", "--allow", "training.lr") == 2
    assert "error: allowed to change, but the same as before: training.lr" in capsys.readouterr().err
    assert command(monkeypatch, "--allow", "training.lr", "run.toml") == 2
    assert "--allow goes with --resume" in capsys.readouterr().err
    assert command(monkeypatch, "--resume", "runs/run") == 0
    assert "run folder: runs/run" in capsys.readouterr().out
    same = ("config.toml", f"checkpoints/step-{found[1]}/")
    assert without(contents(Path("runs/run")), *same) == without(contents(Path("runs/whole")), *same)
    assert command(monkeypatch, "--resume", "runs/run") == 2
    assert "error: the run in runs/run is finished. To train it longer," in capsys.readouterr().err
    longer = ("training.training_tokens=12500", "--allow", "training.training_tokens")
    assert command(monkeypatch, "--resume", "runs/run", *longer) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines[-1]["step"] == 52
    told = [(line["step"], "losses/mse_loss" in line) for line in lines]
    assert len(set(told)) == len(told), "no line twice"
