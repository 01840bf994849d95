"""Cosine restarts whose cycles do not divide the steps, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from saekit_plugins.schedules.cosine_restarts import CosineRestartsConfig
from support.tiny import run_config

import saekit
from saekit.testing import FakeBackend, fake_plugin, isolated_manager


def schedule(steps: int, cycles: int, fill: bool) -> Any:
    config = CosineRestartsConfig(end=0.0, n_restart_cycles=cycles, fill=fill)
    return saekit.default_manager().build("lr_schedules", config, lr=1.0, steps=steps)


def starts(steps: int, cycles: int, fill: bool) -> list[int]:
    """The steps at the peak rate: each begins a cycle."""
    found = schedule(steps, cycles, fill)
    return [step for step in range(steps) if found(step) == 1.0]


def test_steps_that_are_left_over_begin_one_more_cycle() -> None:
    """As in sae-lens 3.0.0; the golden files have it."""
    assert starts(11, 3, fill=False) == [0, 3, 6, 9]
    assert starts(12, 3, fill=False) == [0, 4, 8]


@pytest.mark.parametrize(("steps", "cycles"), [(11, 3), (12, 3), (10, 7), (7, 7), (5, 1), (1000, 333), (64, 10)])
def test_cycles_that_fill_the_steps(steps: int, cycles: int) -> None:
    begin = starts(steps, cycles, fill=True)
    assert len(begin) == cycles
    lengths = {end - start for start, end in zip(begin, [*begin[1:], steps], strict=True)}
    assert lengths <= {steps // cycles, -(-steps // cycles)}
    found = schedule(steps, cycles, fill=True)
    rates = [found(step) for step in range(steps)]
    for before, after, step in zip(rates, rates[1:], range(1, steps), strict=False):
        assert after == 1.0 if step in begin else after < before
    assert found(steps) >= 0  # a run may have a step more than was planned
    if steps % cycles == 0:
        assert rates == [schedule(steps, cycles, fill=False)(step) for step in range(steps)]


def test_the_plan_says_that_a_cycle_is_cut_off(tmp_path: Path) -> None:
    plugins = isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: FakeBackend()), builtins=True
    )

    def warnings(**options: Any) -> list[str]:
        config = run_config(
            tmp_path, model={"backend": "test:fake"}, site={"hook_name": "hook_embed"},
            training={"training_tokens": 1100, "train_batch_size_tokens": 100, "device": "cpu"},
            evals={"run": [], "split": None, "held_out_every": 0},
        ) | {"lr_schedule": {"name": "cosine-restarts", **options}}  # fmt: skip
        found = saekit.plan(config, plugins=plugins, dataset=[{"text": "some words " * 400}]).warnings
        return [warning for warning in found if "lr_schedule" in warning]

    assert warnings(n_restart_cycles=3) == [
        "lr_schedule: 3 cycles of 3 steps take 9 of 11 steps, and the last 2 begin one more, near the peak rate; "
        "lr_schedule.fill=true shares all steps out"
    ]
    assert warnings(n_restart_cycles=3, fill=True) == warnings(n_restart_cycles=11) == warnings() == []
