"""Learning rates at every step of every mix of schedule, warm-up, decay and end, against closed forms of SPEC §6."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.schedules.cosine_restarts import CosineRestartsConfig
from support.optimizers import adam_for

import saekit
from saekit.config import TrainingConfig
from saekit.errors import ConfigError
from saekit.training.schedule import ComposedSchedule

LR = 3.0
COSINES = [("cosineannealing", end, 1) for end in (None, 0.0, 0.7)]
RESTARTS = [("cosineannealingwarmrestarts", end, cycles) for end in (None, 0.0, 0.7, LR) for cycles in (1, 2, 3, 7, 10)]
SCHEDULES = [("constant", None, 1), *COSINES, *RESTARTS]
SHORT = {"cosineannealing": "cosine", "cosineannealingwarmrestarts": "cosine-restarts", "constant": "constant"}


def composed(schedule: Any, steps: int, warm_up: int, decay: int) -> ComposedSchedule:
    # The last batch is half empty: it is a step like the others.
    training = TrainingConfig(
        training_tokens=10 * steps - 5, train_batch_size_tokens=10, lr=LR, lr_warm_up_steps=warm_up,
        lr_decay_steps=decay,
    )  # fmt: skip
    plugins = saekit.default_manager()
    return ComposedSchedule(training, lambda n: plugins.build("lr_schedules", schedule, lr=LR, steps=n))


def closed_form(name: str, end: float, cycles: int, steps: int, warm_up: int, decay: int) -> list[float]:
    rates = [LR * (t + 1) / warm_up for t in range(warm_up)]
    main = steps - warm_up - decay
    for t in range(main):
        if name == "constant":
            rates.append(LR)
            continue
        period = main // cycles
        rates.append(end + (LR - end) / 2 * (1 + math.cos(math.pi * (t % period) / period)))
    last = LR if name == "constant" else end
    return rates + [last * (1 - j / decay) for j in range(decay)]


@pytest.mark.parametrize("warm_up", [0, 1, 5])
@pytest.mark.parametrize("decay", [0, 1, 4])
@pytest.mark.parametrize("steps", [1, 5, 6, 9, 10, 11, 20, 64])
def test_every_mix_at_every_step(steps: int, decay: int, warm_up: int) -> None:
    if warm_up + decay > steps:
        with pytest.raises(ConfigError, match=rf"warm-up \({warm_up}\) and decay \({decay}\) take more than the "):
            composed("constant", steps, warm_up, decay)
        return
    main = steps - warm_up - decay
    for name, end, cycles in SCHEDULES:
        options: dict[str, Any] = {} if name == "constant" else {"end": end}
        if cycles > 1:
            options["n_restart_cycles"] = cycles
        plain: Any = {"name": SHORT[name], **options}
        plain = saekit.load_config({"lr_schedule": plain}).lr_schedule
        if name == "cosineannealingwarmrestarts" and cycles > main:
            with pytest.raises(ConfigError, match=f"is {cycles}, more than the schedule's {main} steps"):
                composed(plain, steps, warm_up, decay)
            continue
        if decay and end == 0:
            with pytest.raises(ConfigError, match="already ends at 0, so there is nothing to decay from"):
                composed(plain, steps, warm_up, decay)
            continue
        schedule = composed(plain, steps, warm_up, decay)
        found = [schedule(step) for step in range(steps)]
        expected = closed_form(name, LR / 10 if end is None else end, cycles, steps, warm_up, decay)
        assert len(expected) == steps
        assert found == pytest.approx(expected, rel=1e-13, abs=1e-15), (name, end, cycles)
        with pytest.raises(ValueError, match="step -1 is before the first step, 0"):
            schedule(-1)
        assert {schedule(steps + more) for more in (0, 1, 7, 10**6)} == {found[-1]}, "batches may not be full"


def test_values_by_hand() -> None:
    """Against a slip in the closed forms."""
    found = composed(CosineConfig(end=1.0), 10, 2, 2)
    root = math.sqrt(0.5)
    main = [3.0, 2 + math.cos(math.pi / 6), 2.5, 2.0, 1.5, 2 - math.cos(math.pi / 6)]
    assert [found(t) for t in range(10)] == pytest.approx([1.5, 3.0, *main, 1.0, 0.5])
    found = composed(CosineRestartsConfig(end=1.0, n_restart_cycles=2), 9, 0, 0)  # the ninth begins another cycle
    cycle = [3.0, 2 + root, 2.0, 2 - root]
    assert [found(t) for t in range(9)] == pytest.approx([*cycle, *cycle, 3.0])
    assert composed("cosine", 4, 0, 0)(3) == pytest.approx(0.3 + 2.7 * (1 - root) / 2)
    assert [composed("constant", 3, 1, 2)(t) for t in range(3)] == [3.0, 3.0, 1.5]


def test_the_optimizer_steps_at_the_rate_of_its_step() -> None:
    """With a gradient of 1 and no momentum, Adam's step is the learning rate."""
    schedule = composed(CosineConfig(end=0.5), 12, 3, 4)
    weight = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = adam_for([("w", weight)], schedule, eps=1e-30, clip_grad_norm=0)
    for step, rate in enumerate(closed_form("cosineannealing", 0.5, 1, 12, 3, 4)):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step(step)
        assert optimizer.lr == pytest.approx(rate)
        assert (before - weight.detach()).tolist() == pytest.approx([rate] * 5, rel=1e-9), step


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_schedule": {"name": "cosine", "end": -0.1}}, "lr_schedule.end: must be 0 or more, found -0.1"),
        ({"lr_schedule": {"name": "cosine-restarts", "n_restart_cycles": 0}}, "n_restart_cycles: must be 1 or more"),
        ({"lr_schedule": {"name": "constant", "end": 1}}, "lr_schedule.end: is not an option"),
        ({"training": {"lr": 0}}, "training.lr: must be above 0"),
        ({"training": {"lr_warm_up_steps": -1}}, "lr_warm_up_steps: must be 0 or more"),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        saekit.load_config(options)


def test_names_and_options_may_be_mixed() -> None:
    for long, short in SHORT.items():
        for name, qualified in itertools.product((long, short), (False, True)):
            key = f"saekit:{name}" if qualified else name
            assert composed(key, 7, 1, 2)(3) == composed(long, 7, 1, 2)(3)
