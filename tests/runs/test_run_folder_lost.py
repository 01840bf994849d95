"""A run folder that goes while the run is at work: an error that says so, and what was trained is not lost."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import contents, fake_config, manager, pressing, resume, train
from torch import Tensor

import saekit
from saekit.errors import StorageError, TrainingInterrupted
from saekit.runs.folder import RunFolderLostError, Standing
from saekit.runs.saving import Saving
from saekit.runs.state_files import StateFiles
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def removed(run: Path) -> None:
    shutil.rmtree(run)


def renamed(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def replaced(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))
    shutil.copytree(run.with_name("elsewhere"), run)


def parent_removed(run: Path) -> None:
    shutil.rmtree(run.parent)


def at_step(step: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    train_on, done = SAETrainer.train_on, list[int]()

    def train_then(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        if trainer.step == step and not done:
            done.append(step)
            for thread in threading.enumerate():
                if thread.name == "saekit-checkpoint":  # else it is lost while something is written into it
                    thread.join()
            work()
        return train_on(trainer, rows, *rest)

    monkeypatch.setattr(SAETrainer, "train_on", train_then)


@pytest.mark.filterwarnings("ignore:tracker saekit.jsonl failed.*was removed while")
@pytest.mark.parametrize("n_checkpoints", [4, 0], ids=["at a checkpoint", "at the end"])
@pytest.mark.parametrize("how", [removed, renamed, replaced, parent_removed])
def test_a_lost_folder_is_an_error_and_the_run_is_saved_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], None], n_checkpoints: int
) -> None:
    runs = tmp_path / "runs"
    whole = train(fake_config(tmp_path, checkpoints={"name": "whole"}))
    with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
        at_step(5, lambda: how(runs / "run"), patch)
        train(fake_config(runs, checkpoints={"name": "run", "n_checkpoints": n_checkpoints}))
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        f"the folder {runs / 'run'} was removed, renamed or replaced while the run was training in it"
    )
    rescued = runs / "run-rescued-1"
    (saved,) = (rescued / "checkpoints").iterdir()
    assert caught.value.__notes__ == [
        f"the run as it was before is in {saved}; saekit train --resume {rescued} goes on from it"
    ]
    if how is removed:
        assert not (runs / "run").exists(), "half a run is not made anew"
    result = resume(rescued)
    weights = "sae/sae_weights.safetensors"
    assert (rescued / weights).read_bytes() == (whole.folder / weights).read_bytes()
    assert result.metrics == whole.metrics


def test_lost_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the error learns why nothing can be written, not only what."""
    write = StateFiles.write

    def lost(files: StateFiles, folder: Path, go_on: Any) -> Any:
        if "step-5." in str(folder) and files.stem == "training":
            renamed(tmp_path / "run")
        return write(files, folder, go_on)

    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match="was removed, renamed or replaced") as caught,
    ):
        patch.setattr(StateFiles, "write", lost)
        train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 4}))
    rescued = tmp_path / "run-rescued-1"
    assert f"--resume {rescued} goes on from it" in caught.value.__notes__[0]
    assert not list((tmp_path / "elsewhere/checkpoints").glob("step-5"))
    resume(rescued)


def test_interrupted_when_the_folder_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pressing(5), pytest.raises(TrainingInterrupted) as caught:
        at_step(4, lambda: renamed(tmp_path / "run"), patch)
        train(fake_config(tmp_path))
    rescued = tmp_path / "run-rescued-1"
    assert caught.value.checkpoint == rescued / "checkpoints/step-5"
    assert str(caught.value).endswith(f"Go on with: saekit train --resume {rescued}")
    resume(rescued)


def test_the_folder_of_one_sae_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = saekit.grid(
        fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 3}), {"training.seed": [1, 2]},
        plugins=manager(),
    )  # fmt: skip
    with pytest.raises(StorageError, match="the folder .*run/1_seed=2 was removed, renamed or replaced"):
        at_step(3, lambda: renamed(tmp_path / "run/1_seed=2"), monkeypatch)
        train(configs)
    assert (tmp_path / "run-rescued-1/1_seed=2/config.toml").exists()


def test_lost_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last look, before the last file: what is not there is not said to be there."""
    save = Saving.save_if_possible

    def late(saving: Saving, **options: Any) -> None:
        save(saving, **options)
        if options.get("finished"):
            renamed(tmp_path / "run")

    monkeypatch.setattr(Saving, "save_if_possible", late)
    with pytest.raises(StorageError, match="was removed, renamed or replaced"):
        train(fake_config(tmp_path))


def test_nothing_can_be_saved_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told."""

    def full(run: Path) -> Path:
        raise StorageError("No space left on device")

    monkeypatch.setattr("saekit.runs.run.rescue_folder", full)
    at_step(3, lambda: renamed(tmp_path / "run"), monkeypatch)
    with pytest.raises(StorageError, match="was removed, renamed") as caught:
        train(fake_config(tmp_path))
    assert caught.value.__notes__ == [
        "and the run as it was before could not be saved: No space left on device; there is no checkpoint to go on from"
    ]


def test_what_stands_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that come and go make no other folder of it, nor does a drive that does not answer for once."""
    with Standing([tmp_path]) as standing:
        (tmp_path / "x").mkdir()
        (tmp_path / "x").rmdir()
        standing.check()

        def deaf(path: Path, **options: Any) -> Any:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", deaf)
            standing.check()
        standing.check()
    folder = tmp_path / "y"
    folder.mkdir()
    with monkeypatch.context() as patch:  # as on Windows, which opens no folders
        patch.setattr("os.open", lambda *_: exec("raise PermissionError(13, 'Permission denied')"))
        with Standing([folder]) as standing:
            standing.check()
            renamed(folder)
            with pytest.raises(RunFolderLostError):
                standing.check()


def test_a_whole_run_is_as_it_was(tmp_path: Path) -> None:
    assert "run.json" in contents(train(fake_config(tmp_path)).folder)
