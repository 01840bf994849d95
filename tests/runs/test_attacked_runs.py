"""What attacks on runs and their folders found: each of these went wrong once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support import caches
from support.runs import contents, fake_config, manager, resume, stopped, train
from support.trackers import Recorder, Uploader, raises

from saekit.errors import ConfigError, DataError, StorageError
from saekit.runs import keeping
from saekit.runs import saving as saving_module
from saekit.runs import trackers as trackers_module
from saekit.runs.checkpoints import newest_checkpoint
from saekit.testing import fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """What hangs is an error, not a suite that hangs."""

    def hangs(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- run folders that somebody has changed


@pytest.mark.parametrize("what", ["the folder", "all that is in it"])
def test_checkpoints_that_were_removed_are_not_begun_without(tmp_path: Path, what: str) -> None:
    stopped(fake_config(tmp_path), 5)
    run = tmp_path / "run"
    kept = tmp_path / "kept"
    shutil.copytree(run / "checkpoints", kept)
    shutil.rmtree(run / "checkpoints")
    if what != "the folder":
        (run / "checkpoints").mkdir()
    before = contents(run)
    with pytest.raises(StorageError, match=r"had written checkpoints, and there is none in .*run/checkpoints any more"):
        resume(run)
    assert contents(run) == before
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    kept.rename(run / "checkpoints")
    resume(run)


@pytest.mark.parametrize("name", ["run.json", "config.toml", "checkpoints"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_in_a_run_folder(tmp_path: Path, name: str, kind: str) -> None:
    stopped(fake_config(tmp_path), 3)
    place = tmp_path / "run" / name
    if name == "checkpoints":
        shutil.rmtree(place)
    else:
        place.unlink()
    if kind == "folder" and name == "checkpoints":
        place.write_text("a file")
    elif kind == "folder":
        place.mkdir()
    else:
        os.mkfifo(place)
    with within(10), pytest.raises(StorageError, match=rf"run/{name} (is not a file|cannot be read|is not a folder)"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoint.json", "stream.json", "stream.safetensors", "sae/training.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_in_a_checkpoint(tmp_path: Path, name: str, kind: str) -> None:
    stopped(fake_config(tmp_path), 3)
    place = tmp_path / "run/checkpoints/step-3" / name
    place.unlink()
    place.mkdir() if kind == "folder" else os.mkfifo(place)
    with within(10), pytest.raises(StorageError, match=rf"step-3/{name} cannot be read: .*it is a (folder|pipe)"):
        resume(tmp_path / "run")


def test_the_records_may_be_no_pipe(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    (tmp_path / "run/metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "run/metrics.jsonl")
    with within(10), pytest.raises(ConfigError, match=r"the file 'metrics.jsonl' in the run folder is a pipe or a dev"):
        resume(tmp_path / "run")


def test_a_file_that_is_called_as_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    mine = tmp_path / "run/checkpoints/step-11"
    mine.write_text("mine")
    with pytest.warns(RuntimeWarning, match=r"step-11 is not a folder of saekit's, and is left alone; move it away"):
        resume(tmp_path / "run")
    assert mine.read_text() == "mine"
    assert not list((tmp_path / "run").rglob(".*"))
    mine.unlink()
    resume(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run").facts["finished"]


@pytest.mark.parametrize("seconds", ["x", None, [], 1e400, "absent", -3, True])
def test_a_bad_time_in_the_records_blocks_nothing(tmp_path: Path, seconds: Any) -> None:
    stopped(fake_config(tmp_path), 3)
    path = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["seconds"] = seconds
    if seconds == "absent":
        del lines[-1]["seconds"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    resume(tmp_path / "run")
    assert len(path.read_text().splitlines()) >= 11


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_a_folder_that_is_no_run_is_not_touched(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
        locking = SimpleNamespace(locking=lambda *arguments: None, LK_NBLCK=2)
        monkeypatch.setitem(sys.modules, "msvcrt", locking)
    with pytest.raises(StorageError, match=r"is not a run folder: there is no run.json in it"):
        resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- a cache that is another one


def test_a_cache_that_was_written_anew_is_noticed(tmp_path: Path) -> None:
    caches.write(tmp_path / "c", 13)
    read = caches.source(tmp_path / "c")
    next(read)
    state = read.state_dict()
    read.close()
    again = caches.source(tmp_path / "c")
    again.load_state_dict(state)
    again.load_state_dict({name: value for name, value in state.items() if name != "contents"})  # an older saekit's
    again.close()
    caches.write(tmp_path / "c", 20)  # more of it is no other one
    longer = caches.source(tmp_path / "c")
    longer.load_state_dict(state)
    longer.close()
    shutil.rmtree(tmp_path / "c")

    def other(start: int, contexts: int, size: int = 8) -> Any:
        return numbered(start + 1, contexts, size)

    numbered = caches.numbered
    with mock.patch.object(caches, "numbered", other):
        caches.write(tmp_path / "c", 13)
    changed = caches.source(tmp_path / "c")
    with pytest.raises(DataError, match="was written anew since the run was saved, and holds other rows: restore it"):
        changed.load_state_dict(state)
    changed.close()


# ---- trackers


def test_a_finished_run_hands_over_what_a_tracker_that_failed_is_owed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Recorder(on_log=raises(OSError("no network"))), Recorder()
    made = [first, second]
    own = manager(None, fake_plugin("trackers", "mine", build=lambda config, run: made.pop(0)))
    config = fake_config(tmp_path, training={"verbose": True}) | {"trackers": ["mine"]}
    with pytest.warns(RuntimeWarning, match="tracker test:mine failed at step 1 and is off now"):
        train(config, plugins=own)
    said = " ".join(capsys.readouterr().err.split())
    assert "records for the tracker test:mine wait; saekit train --resume" in said
    before = contents(tmp_path / "run")["metrics.jsonl"]
    resume(tmp_path / "run", plugins=own)
    said = " ".join(capsys.readouterr().err.split())
    assert "records that the tracker test:mine had not taken are handed over" in said
    assert list(dict.fromkeys(second.steps)) == list(range(1, 12))
    assert contents(tmp_path / "run")["metrics.jsonl"] == before
    with pytest.raises(ConfigError, match="is finished"):
        resume(tmp_path / "run", plugins=own)


def test_a_tracker_that_hangs_keeps_few_checkpoints(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving_module, "_SECONDS_FOR_TRACKERS", 0.05)
    monkeypatch.setattr(keeping, "_KEPT_FOR_TRACKERS", 2)
    close = trackers_module.close_all
    monkeypatch.setattr("saekit.runs.run.close_all", lambda groups, timeout=0.1: close(groups, 0.1))

    class Hangs(Uploader):
        def log_checkpoint(self, folder: Path, step: int) -> None:
            gate.wait(60)

    slow = Hangs()
    own = manager(None, fake_plugin("trackers", "slow", build=lambda config, run: slow))
    options = {"name": "run", "every_minutes": 1e-9, "keep_last": 1}
    with pytest.warns(RuntimeWarning) as caught:
        train(fake_config(tmp_path, checkpoints=options) | {"trackers": ["slow"]}, plugins=own)
    told = [str(one.message) for one in caught if "trackers are more than 2 checkpoints behind" in str(one.message)]
    assert len(told) == 1
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [1, 9, 10, 11], "the one that is being read, two that wait, and the newest"
