"""Trackers that are told how their run ended, by whatever it ends; those that do not care are left in peace."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from saekit_plugins.trackers.wandb import WandbConfig, WandbTracker
from support import warm
from support.runs import HOOKS, fake_config, manager, poison, resume, stopped, train
from support.trackers import Recorder, raises
from support.wandb_runs import fake_wandb

import saekit
from saekit.errors import DivergedError, PluginFailedError
from saekit.runs.trackers import Trackers
from saekit.testing import FakeConfig, fake_plugin
from saekit.values import Metrics, RunEnd, RunInfo

pytestmark = pytest.mark.usefixtures("one_thread")


class Told:
    """Writes down how the run ended, and when it was told of it."""

    def __init__(self, config: FakeConfig, *, run: RunInfo) -> None:
        self._file, self._die_at = run.file("told.txt"), int(os.environ.get("TOLD_DIES_AT", "0"))

    def write(self, line: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log(self, metrics: Metrics, step: int) -> None:
        if step == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.last = step

    def conclude(self, end: RunEnd) -> None:
        self.write(f"{self.last} {end.status}: {end.reason}")

    def close(self) -> None:
        self.write("closed")


def failing(config: FakeConfig, **services: Any) -> Any:
    def measure(*arguments: Any, **options: Any) -> Any:
        raise ValueError("no such luck")

    return measure


def plugins() -> saekit.PluginManager:
    return manager(None, fake_plugin("trackers", "told", build=Told), fake_plugin("evals", "fails", build=failing))


def config(folder: Path, **sections: Any) -> Any:
    made = fake_config(folder, checkpoints={"name": "run", "n_checkpoints": 5}, **sections)
    return made | {"trackers": ["told"]}


def told(folder: Path) -> list[str]:
    return (folder / "told.txt").read_text(encoding="utf-8").splitlines()


def test_a_run_that_is_stopped_and_then_finished(tmp_path: Path) -> None:
    stopped(config(tmp_path), 5, plugins=plugins())
    first = told(tmp_path / "run")
    assert first[0].startswith("5 interrupted: "), first
    assert first[1:] == ["closed"]
    resume(tmp_path / "run", plugins=plugins())
    assert told(tmp_path / "run")[2:] == ["11 finished: ", "closed"]


def test_a_run_that_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "", 6)
    with pytest.raises(DivergedError):
        train(config(tmp_path), plugins=plugins())
    how, closed = told(tmp_path / "run")
    assert how.startswith("5 diverged: ")
    assert "the loss of blocks.0.hook_resid_post is nan at step 6" in how
    assert closed == "closed"


def test_a_run_that_fails(tmp_path: Path) -> None:
    with pytest.raises(PluginFailedError):
        train(config(tmp_path, evals={"run": ["fails"], "every_n_steps": 3}), plugins=plugins())
    how, closed = told(tmp_path / "run")
    assert how.startswith("2 failed: ")
    assert "no such luck" in how
    assert closed == "closed"


def test_each_of_several_has_its_own_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = saekit.grid(config(tmp_path), {"site.hook_name": HOOKS}, plugins=plugins())
    poison(monkeypatch, "blocks.1", 6)
    with pytest.warns(RuntimeWarning, match="is stopped"):
        result = train(configs, plugins=plugins())
    (stopped_one,) = result.diverged
    (other,) = result.results
    assert told(tmp_path / "run" / other) == ["11 finished: ", "closed"]
    how = told(tmp_path / "run" / stopped_one)[0]
    assert how == f"5 diverged: {result.diverged[stopped_one]}"


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/runs"]
import test_trackers_told as t
t.train(t.config(Path(sys.argv[2])), plugins=t.plugins())
"""


def test_a_run_that_is_killed_tells_nothing_until_it_goes_on(tmp_path: Path) -> None:
    killed = warm.python("-c", PROGRAM, Path(__file__).parents[1], tmp_path, env=os.environ | {"TOLD_DIES_AT": "8"})
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/told.txt").exists()
    resume(tmp_path / "run", plugins=plugins())
    assert told(tmp_path / "run") == ["11 finished: ", "closed"]


def test_one_of_two_methods_is_closed_as_ever() -> None:
    old = Recorder()
    trackers = Trackers({"old": old})
    trackers.log({"loss": 1.0}, 1)
    trackers.conclude(RunEnd("failed", "why"))
    trackers.close()
    assert old.steps == [1]
    assert old.closed.is_set()


def test_one_that_fails_to_conclude_is_told_of_and_closed() -> None:
    tracker: Any = Recorder()
    tracker.conclude = raises(SystemExit(3))
    trackers = Trackers({"bad": tracker})
    trackers.conclude(RunEnd("finished"))
    with pytest.warns(RuntimeWarning, match="tracker bad failed to conclude: SystemExit"):
        trackers.close()
    assert tracker.closed.is_set()


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("interrupted", 255), ("diverged", 1), ("failed", 1)])
def test_wandb_marks_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Any, code: int) -> None:
    fake = fake_wandb(monkeypatch, 0)
    ended: list[int | None] = []
    run = SimpleNamespace(starting_step=0, finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setattr(fake, "init", lambda **options: run)
    trackers = Trackers({"wandb": WandbTracker(WandbConfig(), RunInfo("run", tmp_path, {}))})
    trackers.conclude(RunEnd(status))
    trackers.close()
    assert ended == [code]
