"""A run that was stopped and resumed cannot be told from one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import run_config

import saekit
from saekit.errors import TrainingInterrupted
from saekit.testing import fake_plugin, isolated_manager

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


def plugins_that_stop_at(batch: int) -> saekit.PluginManager:
    """A schedule is asked once a step, so it can press Ctrl-C in the middle of one."""

    def build(config: object, *, lr: float, steps: int) -> object:
        inner = saekit.default_manager().build("lr_schedules", "cosine", lr=lr, steps=steps)

        class Stopping:
            end = inner.end

            def __call__(self, step: int) -> float:
                if step == batch - 1 - 3:  # after the three steps of warm-up
                    os.kill(os.getpid(), signal.SIGINT)
                return inner(step)

        return Stopping()

    return isolated_manager(fake_plugin("lr_schedules", "stopping", build=build), builtins=True)


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


def config(folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    merged = {section: dict(options) for section, options in EVERYTHING.items()}
    for section, options in sections.items():
        merged[section] = merged.get(section, {}) | options
    return run_config(folder, checkpoints={"name": name}, **merged)


@pytest.mark.parametrize("step", [4, 5, 6, 8])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    schedule = {"lr_schedule": {"name": "cosine"}}
    whole = saekit.train(config(tmp_path / "whole", "run", **schedule))
    stopping = config(tmp_path / "parts", "run") | {"lr_schedule": "test:stopping"}
    with pytest.raises(TrainingInterrupted) as stopped:
        saekit.train(stopping, plugins=plugins_that_stop_at(step))
    assert stopped.value.step == step
    run = tmp_path / "parts/run"
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("test:stopping", "saekit:cosineannealing"))
    resumed = saekit.resume(run)
    one, other = contents(whole.folder), contents(resumed.folder)
    for path in ("config.toml",):
        one.pop(path), other.pop(path)
    assert {k: v for k, v in other.items() if not k.startswith("checkpoints/step-" + str(step) + "/")} == one
    assert resumed.metrics == whole.metrics
