"""Runs on the fake model with all that changes from step to step, stopped, resumed and compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import caches
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit.errors import TrainingInterrupted
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.trainer import SAETrainer

EVERYTHING: dict[str, dict[str, Any]] = {
    "dataset": {"context_size": 32},
    "activations": {"normalize_activations": "expected_average_only_in"},
    "sae": {
        "noise_scale": 0.1,
        "use_ghost_grads": True,
        "l1_warm_up_steps": 4,
        "b_dec_init_method": "mean",
    },
    "lr_schedule": {"name": "cosine"},
    "training": {
        "training_tokens": 2000,
        "finetuning_tokens": 700,
        "finetuning_method": "unrotated_decoder",
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 2,
        "dead_feature_window": 2,
        "feature_sampling_window": 3,
        "seed": 5,
    },
    "evals": {"every_n_steps": 4},
}
"""Eleven steps with all that changes from one to the next."""
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
LIVE: dict[str, Any] = {"name": "live", "store_batch_size_prompts": 4, "n_batches_in_buffer": 8}
SOURCES = {
    "live, ahead": LIVE | {"prefetch": True},
    "live": LIVE | {"prefetch": False},
    "cached, ahead": {"name": "cached"},
    "cached": {"name": "cached", "prefetch": False},
}


def contents(folder: Path) -> dict[str, str]:
    """Every file that a run leaves behind but for what tells the time, as a checksum."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".png":
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in line.items() if k != "seconds"} for line in lines]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def without(found: dict[str, str], *prefixes: str) -> dict[str, str]:
    return {path: checksum for path, checksum in found.items() if not path.startswith(prefixes)}


def fake_config(folder: Path, source: dict[str, Any] = LIVE, **sections: dict[str, Any]) -> dict[str, Any]:
    """:data:`EVERYTHING` on the fake model, in ``folder/run``."""
    cached = source["name"] == "cached"
    merged = {section: dict(options) for section, options in EVERYTHING.items()}
    merged |= {
        "model": {"backend": "test:fake"},
        "dataset": {"context_size": caches.SIZE},
        "site": {"hook_name": HOOKS[0]},
        "evals": {"every_n_steps": 4, "n_contexts": 4, "split": None, "held_out_every": 0 if cached else 20},
        "checkpoints": {"name": "run"},
    }
    merged["activations"]["source"] = source
    if cached:  # the rows on disk are of all documents
        merged["evals"]["run"] = []
    for section, options in sections.items():
        merged[section] = merged.get(section, {}) | options
    return run_config(folder, **merged)


def manager(backend: FakeBackend | None = None, *plugins: object) -> saekit.PluginManager:
    own = fake_plugin("model_backends", build=lambda config, **services: backend or FakeBackend())
    return isolated_manager(own, *plugins, builtins=True)


def train(config: Any, **options: Any) -> Any:
    return saekit.train(config, **({"plugins": manager(), "dataset": caches.DOCUMENTS} | options))


def resume(run: Path, **options: Any) -> Any:
    return saekit.resume(run, **({"plugins": manager(), "dataset": caches.DOCUMENTS} | options))


@contextlib.contextmanager
def pressing(*at: int, number: int = signal.SIGINT, name: str | None = None) -> Any:
    """Press Ctrl-C in the middle of these steps, counted in the order in which SAEs (or one of them) make them."""
    made, work = [0], SAETrainer.train_on

    def train_on(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        made[0] += name in (None, trainer.name)
        if made[0] in at and name in (None, trainer.name):
            os.kill(os.getpid(), number)
        return work(trainer, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAETrainer, "train_on", train_on)
        yield


def stopped(config: Any, at: int, **options: Any) -> TrainingInterrupted:
    with pressing(at), pytest.raises(TrainingInterrupted) as caught:
        train(config, **options)
    return caught.value


def on_cache(source: str, cache: Path) -> dict[str, Any]:
    return SOURCES[source] | ({"folder": str(cache)} if source.startswith("cached") else {})


def poison(monkeypatch: pytest.MonkeyPatch, name: str, step: int, what: str = "rows") -> None:
    """From this step on, the SAE of this name gets rows that are not numbers, or has weights that are not."""
    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        if trainer.step + 1 >= step and name in trainer.name:
            if what == "rows":
                rows = rows.clone()
                rows[0, 0] = math.inf
            else:
                found = work(trainer, rows, *rest)
                with torch.no_grad():
                    trainer.sae.b_enc[0] = math.nan
                return found
        return work(trainer, rows, *rest)

    monkeypatch.setattr(SAETrainer, "train_on", train_on)
