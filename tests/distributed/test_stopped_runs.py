"""Checkpoints that two processes write together: runs that are stopped, and go on, on the same processes or otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Call, together
from support.runs import contents
from support.spread_stops import DOCUMENTS, manager

import saekit
from saekit.errors import ConfigError
from saekit.runs.checkpoints import Checkpoint

STOPS = "support.spread_stops"
MESHES = ((2, 1), (1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Any]]:
    """What both processes made of each."""
    calls = {}
    for data, features in MESHES:
        name = f"{data}x{features}"
        calls[f"whole {name}"] = Call(f"{STOPS}:whole", data, features, (str(folder / f"whole-{name}"),))
        for kind in ("same", "other"):
            place = str(folder / f"{kind}-{name}")
            calls[f"stopped {kind} {name}"] = Call(f"{STOPS}:stopped", data, features, (place, 1, 5))
        calls[f"same {name}"] = Call(f"{STOPS}:resumed", data, features, (str(folder / f"same-{name}/run"),))
        allow = (str(folder / f"other-{name}/run"), "distributed.features")
        calls[f"other {name}"] = Call(f"{STOPS}:resumed", features, data, allow)
    calls["unlike"] = Call(f"{STOPS}:unlike", 2, 1, (str(folder / "unlike"),))
    calls["full"] = Call(f"{STOPS}:full", 2, 1, (str(folder / "full"),))
    return together(calls, 2, folder / "calls")


def names(data: int, features: int) -> str:
    return f"{data}x{features}"


@pytest.mark.parametrize("mesh", MESHES)
def test_a_signal_to_one_ends_all_at_one_step(found: dict[str, list[Any]], folder: Path, mesh: tuple[int, int]) -> None:
    for one in found[f"stopped same {names(*mesh)}"]:
        assert one["signal"] == 15
        assert one["text"].startswith("interrupted after 5 steps")
        assert f"saved in {folder}/same-{names(*mesh)}/run/checkpoints/step-5." in one["text"]


@pytest.mark.parametrize("mesh", MESHES)
def test_it_goes_on_as_if_it_had_never_stopped(
    found: dict[str, list[Any]], folder: Path, mesh: tuple[int, int]
) -> None:
    ours, wanted = found[f"same {names(*mesh)}"], found[f"whole {names(*mesh)}"]
    for one, other in zip(ours, wanted, strict=True):
        assert {name: (value == other["weights"][name]).all() for name, value in one["weights"].items()}
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])
    resumed = contents(folder / f"same-{names(*mesh)}/run")
    whole = contents(folder / f"whole-{names(*mesh)}/run")
    for path in whole:
        if not path.startswith(("checkpoints/", "config.toml", "curves.html")):
            assert resumed[path] == whole[path], path
    last = json.loads((folder / f"whole-{names(*mesh)}/run/checkpoints/step-10/checkpoint.json").read_text())
    again = json.loads((folder / f"same-{names(*mesh)}/run/checkpoints/step-10/checkpoint.json").read_text())
    assert last["files"] == again["files"], "all states are the same, to the last bit"
    assert last["mesh"] == list(mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_it_goes_on_where_features_are_split_otherwise(found: dict[str, list[Any]], mesh: tuple[int, int]) -> None:
    for one, other in zip(found[f"other {names(*mesh)}"], found[f"whole {names(*mesh)}"], strict=True):
        for name, value in one["weights"].items():
            torch.testing.assert_close(value, other["weights"][name], rtol=0, atol=1e-10)
