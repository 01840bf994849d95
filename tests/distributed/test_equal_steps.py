"""Steps of several processes are those of one: weights, metrics and firing counts, in float64 and in float32.

``make test-processes`` compares every architecture that trains, with every mix of options, on 2 and on 4 processes: on
two cores that takes minutes, and can be done in parts (``SAEKIT_PROCESSES=4``, ``-k "1x4 and standard"``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.golden import FILES
from support.processes import Call, Found, Results, once, trained
from support.spread_cases import CASES, CHOSEN, FAST, MESHES, SIZE, label

import saekit
from saekit.kinds import SAE_ARCHITECTURES

__all__ = ["SIZE"]

Worst = Callable[[tuple[int, int], str, float, str], None]


def calls(folder: Path) -> dict[str, Call]:
    return {
        label(name, data, features): Call("support.processes:steps", data, features, (case,))
        for data, features in MESHES
        for name, case in CHOSEN.items()
    }


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, folder: Path) -> Results:
    """What each process made of the cases that were asked for, so that a few (``-k``) take seconds."""
    items: list[Any] = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    given = [item.callspec.params for item in items if "found" in item.fixturenames]
    asked = {label(one["name"], *one["mesh"]) for one in given}
    return once(folder, lambda place: {name: call for name, call in calls(place).items() if name in asked}, SIZE)


@cache
def alone(name: str) -> Found:
    return trained(CHOSEN[name])


@attrs.frozen
class Within:
    """How far off several processes may be: losses and other metrics, and weights."""

    metrics: float
    weights: float


@cache
def rounding(name: str) -> Within:
    """With p < 1 the gradient of a feature near zero has no bound, and sums in another order show: as much is allowed
    as one process is off by where its starting weights change by their rounding.
    """
    case, within = CHOSEN[name], Within(1e-9, 1e-10)
    if case.dtype == "float32":
        return Within(1e-5, 0)
    if not case.sae.get("lp_norm", 1) < 1:
        return within
    for seed in range(4):
        other, one = trained(case, rounded=seed), alone(name)
        weights = max(float((other.weights[key] - value).abs().max()) for key, value in one.weights.items())
        steps = zip(other.metrics, one.metrics, strict=True)
        metrics = max(_off(some[key], value) for some, those in steps for key, value in those.items())
        within = Within(max(within.metrics, metrics), max(within.weights, weights))
    assert within.weights < 1e-8
    return within


def _off(found: float, expected: float) -> float:
    """Relative to what is expected, or absolute where that is below 1."""
    return abs(found - expected) / max(abs(expected), 1)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "{}x{}".format(*mesh))
def test_steps_are_those_of_one_process(
    name: str, mesh: tuple[int, int], found: dict[str, list[Found]], worst: Worst
) -> None:
    case, (data, features) = CHOSEN[name], mesh
    undetermined = rounding(name)
    results, one = found[label(name, data, features)], alone(name)
    single = case.dtype == "float32"
    told_of = case.dtype + (" with p < 1" if undetermined.weights > 1e-10 else "")
    for several in results:  # every process has the whole
        for step, (metrics, expected) in enumerate(zip(several.metrics, one.metrics, strict=True)):
            assert metrics.keys() == expected.keys()
            told = {key: value for key, value in expected.items() if not single or key.startswith("losses/")}
            off = {key: _off(metrics[key], value) for key, value in told.items()}
            for key, value in off.items():
                kind = "losses" if key.startswith("losses/") else "metrics"
                worst(mesh, f"{told_of} {kind}", value, f"{key} of {name}")
            far = {key: (metrics[key], told[key]) for key, value in off.items() if not value <= undetermined.metrics}
            assert not far, f"at step {step}"
        assert several.weights.keys() == one.weights.keys()
        if not single:
            off = {key: float((value - one.weights[key]).abs().max()) for key, value in several.weights.items()}
            for key, value in off.items():
                worst(mesh, f"{told_of} weights", value, f"{key} of {name}")
            assert all(value <= undetermined.weights for value in off.values()), off
            assert torch.equal(several.fractions, one.fractions)


def test_every_file_of_the_reference_has_a_case() -> None:
    """With its options, which are checked where it is read, and its batches."""
    assert {case.golden for case in CASES.values()} - {None} == {*FILES}
    assert set(FILES) >= {"plain", "lp_half", "tanh_relu", "strong_clip", "mixed_finetune_unrotated_decoder_ghost"}


@pytest.mark.parametrize("name", FAST)
def test_split_features_take_the_fast_way(name: str) -> None:
    sae = FAST[name].trainer(saekit.distributed.ALONE).sae
    sae.spread = frozenset({"data", "features"})
    assert sae.why_reference() is None


def test_every_architecture_that_trains_has_a_case() -> None:
    names = {case.sae["name"] for case in CASES.values()}
    registered = {item.entry.name for item in saekit.default_manager().registries[str(SAE_ARCHITECTURES)].items}
    assert registered - names == {"matching_pursuit", "temporal"}, "these are for inference alone"


def test_every_case_learns() -> None:
    """Else equal weights would say nothing."""
    for name in CHOSEN:
        before: Any = CHOSEN[name].trainer(saekit.distributed.ALONE).sae.state_dict()
        assert any(not torch.allclose(before[key], value) for key, value in alone(name).weights.items()), name
