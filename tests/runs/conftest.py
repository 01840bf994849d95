"""Fixtures of the tests of runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import caches
from support.runs import HOOKS, fake_config, pressing, resume, stopped, train

from saekit.errors import (
    TrainingInterrupted,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    caches.cache(caches.config(folder), sites=[{"hook_name": HOOKS[1]}])
    return folder / "cache"


# ---- wandb


@pytest.fixture
def wandb_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where W&B keeps copies until they are sent."""
    folder = tmp_path_factory.mktemp("wandb-data")
    monkeypatch.setenv("WANDB_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Trackers wait for it; it opens at the test's end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and the same without a break: three steps of training after the first of them.

    Two of them are of fine-tuning.
    """
    folder = tmp_path_factory.mktemp("made")
    steps = {"training_tokens": 1000, "finetuning_tokens": 500}
    train(fake_config(folder, checkpoints={"name": "whole"}, training=steps))
    stopped(fake_config(folder, training=steps), 3)
    with pressing(2), pytest.raises(TrainingInterrupted):
        resume(folder / "run")
    return folder
