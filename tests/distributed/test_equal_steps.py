"""Steps of several processes are those of one: weights, metrics and firing counts, in float64 and in float32.

``make test-processes`` compares every architecture that trains, with every mix of options, on 2 and on 4 processes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Call, Found, trained
from support.spread_cases import CASES, CHOSEN, MESHES, SIZE, label

import saekit
from saekit.kinds import SAE_ARCHITECTURES

__all__ = ["SIZE"]


def calls(folder: Path) -> dict[str, Call]:
    return {
        label(name, data, features): Call("support.processes:steps", data, features, (case,))
        for data, features in MESHES
        for name, case in CHOSEN.items()
    }


@cache
def alone(name: str) -> Found:
    return trained(CHOSEN[name])


def _off(found: float, expected: float) -> float:
    """Relative to what is expected, or absolute where that is below 1."""
    return abs(found - expected) / max(abs(expected), 1)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "data {} features {}".format(*mesh))
def test_steps_are_those_of_one_process(name: str, mesh: tuple[int, int], found: dict[str, list[Found]]) -> None:
    case, (data, features) = CHOSEN[name], mesh
    results, one = found[label(name, data, features)], alone(name)
    single = case.dtype == "float32"
    within = 1e-5 if single else 1e-9
    for several in results:  # every process has the whole
        for step, (metrics, expected) in enumerate(zip(several.metrics, one.metrics, strict=True)):
            assert metrics.keys() == expected.keys()
            told = {key: value for key, value in expected.items() if not single or key.startswith("losses/")}
            far = {key: (metrics[key], value) for key, value in told.items() if _off(metrics[key], value) > within}
            assert not far, f"at step {step}"
        assert several.weights.keys() == one.weights.keys()
        if not single:
            off = {key: float((value - one.weights[key]).abs().max()) for key, value in several.weights.items()}
            assert max(off.values()) <= 1e-10, off
            assert torch.equal(several.fractions, one.fractions)


def test_every_architecture_that_trains_has_a_case() -> None:
    names = {case.sae["name"] for case in CASES.values()}
    registered = {item.entry.name for item in saekit.default_manager().registries[str(SAE_ARCHITECTURES)].items}
    assert registered - names == {"matching_pursuit", "temporal"}, "these are for inference alone"


def test_every_case_learns() -> None:
    """Else equal weights would say nothing."""
    for name in CHOSEN:
        before: Any = CHOSEN[name].trainer(saekit.distributed.ALONE).sae.state_dict()
        assert any(not torch.allclose(before[key], value) for key, value in alone(name).weights.items()), name
