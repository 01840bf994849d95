"""A step that is cut short, by Ctrl-C or an error, is not half saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import contents, fake_config, manager, pressing, resume, train
from torch import Tensor

import saekit
from saekit.errors import TrainingInterrupted
from saekit.runs.checkpoints import all_checkpoints, newest_checkpoint
from saekit.runs.state_files import StateFiles
from saekit.testing import fake_plugin
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")

MARKS = {"name": "run", "n_checkpoints": 5}  # after steps 2 and 4, and so on


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, which hangs; the SAEs are saved to look at, and nothing is claimed of going on."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 5})
    work, began = SAETrainer.train_on, []

    def hangs(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        found = work(trainer, rows, *rest)
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the first one is only noted
            began.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        return found

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(SAETrainer, "train_on", hangs)
        train(config)
    assert time.monotonic() - began[0] < 10
    run = tmp_path / "run"
    assert caught.value.checkpoint == run / "checkpoints/step-3"
    assert str(caught.value) == (
        f"interrupted after 3 steps (1,024 tokens); the SAEs are saved in {run}/checkpoints/step-3, without what "
        f"training needs; go on from {run}/checkpoints/step-2 with: saekit train --resume {run}"
    )
    assert saekit.SAE.load(caught.value.checkpoint, plugins=manager()).d_sae == 64
    (tmp_path / "other").mkdir()
    resume(run)
    whole = train(config | {"checkpoints": {"folder": str(tmp_path / "other"), "name": "run", "n_checkpoints": 5}})
    ours, theirs = contents(run), contents(whole.folder)
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors"):
        assert ours[path] == theirs[path]


def test_a_second_ctrl_c_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 2 is whole, and what goes on from it ends as if nobody had pressed anything."""
    config = fake_config(tmp_path, checkpoints=MARKS)
    write, seen = StateFiles.write, [0]

    def pressed(files: StateFiles, folder: Path, go_on: Any) -> Any:
        found = write(files, folder, go_on)
        if "step-3." in str(folder) and files.stem == "training":
            seen[0] += 1
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return found

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(StateFiles, "write", pressed)
        with pressing(3):
            train(config)
    run = tmp_path / "run"
    assert seen == [1]
    assert str(caught.value) == (
        "interrupted after 3 steps (768 tokens); and a checkpoint could not be saved: that was "
        f"interrupted, too; go on from {run}/checkpoints/step-2 with: saekit train --resume {run}"
    )
    newest_checkpoint(run).verify()
    assert [path.name for path in all_checkpoints(run)] == ["step-2"]
    assert not list(run.rglob(".*")), "nothing half written is left"
    goes_on_as_if_nothing_had_been(run, config)


@pytest.mark.parametrize("presses", [1, 2])
def test_a_ctrl_c_waits_for_a_checkpoint_that_is_written_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    """Of step 4, in the middle of step 5, which is made to its end after one Ctrl-C and not after two."""
    config = fake_config(tmp_path, checkpoints=MARKS)
    write, work, held = StateFiles.write, SAETrainer.train_on, threading.Event()

    def slow(files: StateFiles, folder: Path, go_on: Any) -> Any:
        if "step-4." in str(folder) and files.stem == "training":
            assert held.wait(20)
            time.sleep(0.1)
        return write(files, folder, go_on)

    def hangs(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        if trainer.step == 4:
            assert not (tmp_path / "run/checkpoints/step-4").exists()
            held.set()
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        return work(trainer, rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(StateFiles, "write", slow)
        patch.setattr(SAETrainer, "train_on", hangs)
        train(config)
    run, step = tmp_path / "run", 6 - presses
    assert str(caught.value) == (
        f"interrupted after {step} steps ({256 * step:,} tokens); saved in {run}/checkpoints/step-{step}. Go on with: "
        f"saekit train --resume {run}"
    )
    newest_checkpoint(run).verify()
    assert [path.name for path in all_checkpoints(run)][:2] == [["step-5", "step-4"], ["step-4", "step-2"]][presses - 1]
    goes_on_as_if_nothing_had_been(run, config)


def goes_on_as_if_nothing_had_been(run: Path, config: dict[str, Any]) -> None:
    resume(run)
    whole = train(config | {"checkpoints": {"folder": str(run.parent / "other"), **MARKS}})
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors"):
        assert contents(run)[path] == contents(whole.folder)[path]


def test_an_interrupt_while_the_source_works_is_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C may take a batch from the source that nobody trained on."""
    from saekit.data import ShuffleBuffer

    take = ShuffleBuffer.take
    taken = [0]

    def interrupted(buffer: ShuffleBuffer, n: int) -> Any:
        batch = take(buffer, n)
        taken[0] += 1
        if taken[0] == 6:
            raise KeyboardInterrupt
        return batch

    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 5})
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(ShuffleBuffer, "take", interrupted)
        train(config)
    assert caught.value.step == 5
    run = tmp_path / "run"
    assert caught.value.checkpoint in (None, run / "checkpoints/step-5")
    resume(run)
    whole = train(config | {"checkpoints": {"folder": str(tmp_path / "other"), "name": "run", "n_checkpoints": 5}})
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors"):
        assert contents(run)[path] == contents(whole.folder)[path]


@pytest.mark.parametrize("sweep", [False, True])
def test_an_error_in_the_middle_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: bool) -> None:
    """Some SAEs of a sweep have made it, others not: their SAEs are saved, and the run goes on from before."""
    config: Any = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 5})
    if sweep:
        config = saekit.grid(config, {"sae.l1_coefficient": [1.0, 2.0]}, plugins=manager())
    work = SAETrainer.train_on

    def fails(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        if trainer.step == 3 and (not sweep or "=2" in trainer.name):
            raise RuntimeError("an architecture's fault")
        return work(trainer, rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="an architecture's fault") as caught:
        patch.setattr(SAETrainer, "train_on", fails)
        train(config)
    run = tmp_path / "run"
    assert caught.value.__notes__ == [
        f"the SAEs are saved in {run}/checkpoints/step-3, without what training needs; saekit train --resume {run} "
        f"goes on from {run}/checkpoints/step-2"
    ]
    for path in (run / "checkpoints/step-3").iterdir():
        assert saekit.SAE.load(path, plugins=manager()).d_sae == 64
    assert [path.name for path in all_checkpoints(run)] == ["step-2"]
    resume(run)
    assert newest_checkpoint(run).facts["finished"]


def test_an_error_right_after_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one is the run as it was before, and stays as it is."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9})
    work = SAETrainer.train_on

    def fails(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        if trainer.step == 3:
            raise RuntimeError("a fault")
        return work(trainer, rows, *rest)

    monkeypatch.setattr(SAETrainer, "train_on", fails)
    with pytest.raises(RuntimeError, match="a fault") as caught:
        train(config)
    run = tmp_path / "run"
    assert caught.value.__notes__ == [
        f"the run as it was before is in {run}/checkpoints/step-3; saekit train --resume {run} goes on from it"
    ]
    newest_checkpoint(run).verify()


def test_trackers_that_still_need_a_checkpoint(tmp_path: Path) -> None:
    """What one uploads is not removed under its hands."""
    seen: dict[str, bool] = {}

    class Slow:
        def __init__(self, config: object, run: saekit.RunInfo) -> None: ...

        def log(self, metrics: object, step: int) -> None: ...

        def log_checkpoint(self, folder: Path, step: int) -> None:
            time.sleep(0.05)
            seen[str(folder.relative_to(tmp_path / "run/checkpoints"))] = (folder / "cfg.json").is_file()

        def close(self) -> None: ...

    plugins = manager(None, fake_plugin("trackers", "slow", build=Slow))
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9}) | {"trackers": ["slow"]}
    train(config, plugins=plugins)
    assert seen == {f"step-{step}/sae": True for step in range(1, 12)}


def test_signals_outside_the_main_thread_are_left_alone(tmp_path: Path) -> None:
    import threading

    results: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: results.append(train(fake_config(tmp_path))))
    thread.start()
    thread.join()
    assert results[0].metrics["evals/l0"] > 0
    assert signal.getsignal(signal.SIGTERM) == before
    train(fake_config(tmp_path, checkpoints={"name": "other"}))
    assert signal.getsignal(signal.SIGTERM) == before, "and in it, they are given back"
