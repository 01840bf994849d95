"""Damaged checkpoints are noticed, and a run goes on from the one before."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import caches
from support.runs import contents, fake_config, pressing, resume, stopped, train

from saekit.errors import StorageError, TrainingInterrupted
from saekit.files import storage
from saekit.runs import checkpoints as on_disk
from saekit.runs import saving
from saekit.runs.checkpoints import Checkpoint, newest_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        caches.flip(path, {"flipped": len(data) // 2, "flipped at the end": -2}[kind])


FILES = ["checkpoint.json", "stream.json", "stream.safetensors", "sae/training.json", "sae/training.safetensors",
         "sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors",
         "sae/probe.safetensors"]  # fmt: skip


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with contextlib.chdir(folder):
        train(fake_config(Path("whole")))
        stopped(fake_config(Path("runs")), 3)
        with pressing(2), pytest.raises(TrainingInterrupted):
            resume(Path("runs/run"))
    return folder


@pytest.mark.parametrize("kind", ["flipped", "flipped at the end", "truncated", "empty", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_noticed(tmp_path: Path, two_checkpoints: Path, name: str, kind: str) -> None:
    shutil.copytree(two_checkpoints / "runs/run", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-5"
    assert newest_checkpoint(tmp_path / "run").folder == newest
    damage(newest / name, kind)
    with pytest.warns(RuntimeWarning) as caught:
        assert newest_checkpoint(tmp_path / "run").folder.name == "step-3"
    (told,) = (str(w.message) for w in caught)
    assert told.startswith(f"a newer checkpoint is not used: {newest / name} ")
    assert told.endswith(". Going on from step-3 instead")
    damage(tmp_path / "run/checkpoints/step-3" / name, kind)
    with pytest.raises(StorageError, match=r"every checkpoint in .* is damaged: .*step-5.*; .*step-3"):
        newest_checkpoint(tmp_path / "run")


def test_every_byte_of_a_manifest_counts(tmp_path: Path, two_checkpoints: Path) -> None:
    """It decides what is trusted, so it has a checksum of its own: only white space may change."""
    shutil.copytree(two_checkpoints / "runs/run", tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-5/checkpoint.json"
    data = path.read_bytes()
    whole = json.loads(data)
    for offset in range(0, len(data), 7):
        caches.flip(path, offset)
        try:
            read = json.loads(path.read_bytes())
        except ValueError:
            read = None
        if read == whole:
            Checkpoint.open(path.parent)
        else:
            with pytest.raises(StorageError, match="checkpoint.json"):
                Checkpoint.open(path.parent)
        path.write_bytes(data)
    path.write_text(json.dumps(whole | {"format": 3}))
    with pytest.raises(StorageError, match="step-5 has format 3, and this saekit reads 2: update saekit to go on"):
        Checkpoint.open(path.parent)
    with pytest.raises(StorageError, match="step-5 has format 3"):  # going on from step-3 would lose what is there
        newest_checkpoint(path.parents[2])
    assert path.is_file()


def test_a_disk_that_cannot_read(tmp_path: Path, two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(two_checkpoints / "runs/run", tmp_path / "run")

    def unreadable(path: Path) -> str:
        if "step-5" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return storage.sha256(path)

    monkeypatch.setattr(on_disk, "sha256", unreadable)
    with pytest.warns(RuntimeWarning, match=r"step-5/\S+ cannot be read: Input/output error. Going on from step-3"):
        newest_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoint.json", "sae/training.safetensors"])
def test_a_run_goes_on_before_a_damaged_checkpoint(tmp_path: Path, two_checkpoints: Path, name: str) -> None:
    """Loudly, to the same end; and the damaged one is never in the way of a good one."""
    shutil.copytree(two_checkpoints / "runs", tmp_path / "runs")
    checkpoints = tmp_path / "runs/run/checkpoints"
    damage(checkpoints / "step-5" / name, "flipped")
    with contextlib.chdir(tmp_path):
        with (
            pytest.warns(RuntimeWarning, match="a newer checkpoint is not used: .* Going on from step-3 instead"),
            pressing(1), pytest.raises(TrainingInterrupted, match="after 4 steps"),
        ):  # fmt: skip
            resume(Path("runs/run"), overrides=["checkpoints.keep_last=1"], allow=["checkpoints.keep_last"])
        assert {path.name for path in checkpoints.iterdir()} == {"step-4", "step-5.damaged"}
        resume(Path("runs/run"))  # a warning would be an error
    ours, theirs = contents(tmp_path / "runs/run"), contents(two_checkpoints / "whole/run")
    for path in theirs:
        assert ours[path] == theirs[path] or path in ("config.toml", "checkpoints/step-11/checkpoint.json")


def test_a_checkpoint_of_another_run(tmp_path: Path, two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints / "runs", tmp_path / "runs")
    run = tmp_path / "runs/run"
    with pytest.raises(StorageError, match=r"checkpoint of sae holds weights .*, but this run's SAE has"):
        resume(run, overrides=["sae.d_sae=32"], allow=["sae.d_sae"])
    with pytest.raises(StorageError, match="does not fit the run as it is now: DataError: the saved buffer has"):
        resume(
            run,
            overrides=["activations.source.n_batches_in_buffer=9"],
            allow=["activations.source.n_batches_in_buffer"],
        )
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-5"}
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"saes": {"other": "."}}))
    with pytest.raises(StorageError, match="step-5 holds sae, but the run has other"):
        resume(run)


def test_another_version_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0.0")
        stopped(fake_config(tmp_path), 3)
    with pytest.warns(
        RuntimeWarning, match=f"written with torch 2.0.0, and this is {re.escape(torch.__version__)}: the"
    ):
        resume(tmp_path / "run")


def test_metrics_are_written_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that is killed right after it would go on without the lines before it."""
    from saekit_plugins.trackers.jsonl import JsonlTracker

    log, write, lines = JsonlTracker.log, saving.write_checkpoint, []

    def slow(tracker: JsonlTracker, metrics: Any, step: int) -> None:
        time.sleep(0.05)
        log(tracker, metrics, step)

    def counted(path: Path, *rest: Any) -> None:
        lines.append((path.name, len((tmp_path / "run/metrics.jsonl").read_text().splitlines())))
        write(path, *rest)

    monkeypatch.setattr(JsonlTracker, "log", slow)
    monkeypatch.setattr(saving, "write_checkpoint", counted)
    train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 3}))
    assert lines == [("step-3", 3), ("step-6", 6), ("step-8", 8), ("step-11", 12)]
