"""A run that was stopped and resumed cannot be told from one that never was."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.runs import (
    HOOKS,
    LIVE,
    SOURCES,
    contents,
    fake_config,
    manager,
    on_cache,
    pressing,
    resume,
    stopped,
    train,
    without,
)
from torch import Tensor

import saekit
from saekit import Forward
from saekit.errors import TrainingInterrupted
from saekit.files import storage
from saekit.testing import FakeBackend
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")


MOMENTS = {
    "in warm-up, mid-buffer": 1,
    "in warm-up, before a window's edge": 2,
    "at the end of warm-up, on a window's edge": 3,
    "at an eval, after a window's edge": 4,
    "mid-buffer": 5,
    "on the next window's edge": 6,
    "before the last step of training": 7,
    "before fine-tuning": 8,
    "in fine-tuning, on a window's edge": 9,
    "in fine-tuning, in decay": 10,
    "at the last step": 11,
}


MATTERING = {"live, ahead": [*MOMENTS], "cached, ahead": [*MOMENTS][::2], "live": [*MOMENTS][1::3]}
"""The moments that a run on a source is stopped at: the state of an SAE does not depend on the source."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[str], Any]:
    """The run that was never stopped, once for each source."""
    made: dict[str, Any] = {}

    def of(source: str) -> Any:
        if source not in made:
            folder = tmp_path_factory.mktemp("whole")
            with contextlib.chdir(folder):
                made[source] = train(fake_config(Path("runs"), on_cache(source, cache)))
            made[source] = attrs.evolve(made[source], folder=folder / "runs/run")
        return made[source]

    return of


@pytest.mark.parametrize(
    ("source", "moment"),
    [(source, moment) for source in SOURCES for moment in MATTERING.get(source, [*MOMENTS][::4])],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Any], cache: Path, source: str, moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, step = uninterrupted(source), MOMENTS[moment]
    monkeypatch.chdir(tmp_path)
    error = stopped(fake_config(Path("runs"), on_cache(source, cache)), step)
    assert error.step == step
    assert error.checkpoint == Path(f"runs/run/checkpoints/step-{step}")
    assert str(error).endswith(f"saved in {error.checkpoint}. Go on with: saekit train --resume runs/run")
    resumed = resume(Path("runs/run"))
    assert resumed.metrics == whole.metrics
    assert all(torch.equal(a, b) for a, b in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True))
    own = () if step == 11 else (f"checkpoints/step-{step}/",)
    assert without(contents(tmp_path / "runs/run"), *own) == contents(whole.folder)


@pytest.mark.parametrize(
    ("batch", "half"),
    [
        (1, "first"),
        (8, "second"),
        (17, "first"),
        (22, "second"),
    ],
)
def test_a_sweep_is_resumed(tmp_path: Path, sweep: Callable[[], Any], batch: int, half: str) -> None:
    """Two seeds, so two lanes, which take turns, with two hooks each: stopped at the first or second SAE of a batch."""
    configs, whole = sweep()
    with contextlib.chdir(tmp_path):
        error = stopped(configs, 2 * batch - (half == "first"))
        assert error.step == batch
        resumed = resume(Path("runs/run"))
    assert without(contents(tmp_path / "runs/run"), f"checkpoints/step-{batch}/" if batch < 22 else "-") == contents(
        whole.folder
    )
    for name, result in whole.results.items():
        assert resumed.results[name].metrics == result.metrics
    assert resumed.summary == whole.summary


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    folder = tmp_path_factory.mktemp("sweep")
    axes = {"training.seed": [1, 2], "site.hook_name": HOOKS}
    configs = saekit.grid(fake_config(Path("runs")), axes, plugins=manager())
    made: list[Any] = []

    def of() -> Any:
        if not made:
            with contextlib.chdir(folder):
                made.append(attrs.evolve(train(configs), folder=folder / "runs/run"))
        return configs, made[0]

    return of


def test_resumed_again_and_again(tmp_path: Path, uninterrupted: Callable[[str], Any]) -> None:
    whole = uninterrupted("live, ahead")
    with contextlib.chdir(tmp_path):
        assert stopped(fake_config(Path("runs"), SOURCES["live, ahead"]), 2).step == 2
        for at, step in ((1, 3), (3, 6), (3, 9)):
            with pressing(at), pytest.raises(TrainingInterrupted, match=f"interrupted after {step} steps"):
                resume(Path("runs/run"))
        resume(Path("runs/run"))
    assert without(contents(tmp_path / "runs/run"), "checkpoints/step-9/") == contents(whole.folder)


@pytest.mark.parametrize("operation", [1, 5, 9, 11])
def test_interrupted_during_a_checkpoint(
    tmp_path: Path, uninterrupted: Callable[[str], Any], operation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and once more while it is being saved: at once, and the checkpoint before it is what there is."""
    whole, touched = uninterrupted("live"), [0]

    def impatient(path: Path) -> None:
        mine = "step-3" in str(path)
        touched[0] += mine
        if mine and touched[0] == operation:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        sync(path)

    sync = storage._sync
    with contextlib.chdir(tmp_path):
        config = fake_config(Path("runs"), SOURCES["live"], checkpoints={"n_checkpoints": 10, "name": "run"})
        with monkeypatch.context() as patch, pressing(3), pytest.raises(TrainingInterrupted) as caught:
            patch.setattr(storage, "_sync", impatient)
            train(config)
        assert touched[0] >= operation
        assert caught.value.checkpoint is None, "at once: it is not begun again"
        assert str(caught.value) == (
            "interrupted after 3 steps (768 tokens); and a checkpoint could not be saved: that was interrupted, too; "
            "go on from runs/run/checkpoints/step-2 with: saekit train --resume runs/run"
        )
        assert not list(Path("runs/run").rglob(".*")), "nothing half written is left"
        resume(Path("runs/run"))
    ends = ("config.toml", "checkpoints/")
    assert without(contents(tmp_path / "runs/run"), *ends) == without(contents(whole.folder), *ends)


def test_a_step_has_one_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the thread that runs the model ahead has gone: two runs with one seed leave the same checkpoint."""

    class Slow(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            time.sleep(0.02)
            return super().run(tokens, **options)

    work, pause = SAETrainer.train_on, [0.0]

    def train_on(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        time.sleep(pause[0])
        return work(trainer, rows, *rest)

    monkeypatch.setattr(SAETrainer, "train_on", train_on)
    found = []
    for name, pause[0], backend in (("ahead", 0.05, FakeBackend()), ("behind", 0.0, Slow())):
        folder = tmp_path / name
        folder.mkdir()
        with contextlib.chdir(folder):
            # A large buffer, of which less than half is used: the thread fills what was served meanwhile, or not.
            source = LIVE | {"prefetch": True, "n_batches_in_buffer": 24}
            stopped(fake_config(Path("runs"), source), 3, plugins=manager(backend))
        found.append(contents(folder))
    assert found[0] == found[1]
