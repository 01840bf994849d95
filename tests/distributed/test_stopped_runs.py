"""Checkpoints that two processes write together: runs that are stopped, and go on, on the same mesh or another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Call
from support.runs import contents

import saekit
from saekit.runs.checkpoints import newest_checkpoint
from saekit.runs.spread_checkpoints import part_of_training

STOPS = "support.spread_stops"
MESHES = ((2, 1), (1, 2))
OTHER = MESHES if "SAEKIT_PROCESSES" in os.environ else MESHES[:1]
"""Those from which a run goes on on the other."""


def calls(folder: Path) -> dict[str, Call]:
    """What both processes do."""
    made = {}
    for data, features in MESHES:
        name = f"{data}x{features}"
        made[f"whole {name}"] = Call(f"{STOPS}:whole", data, features, (str(folder / f"whole-{name}"),))
        for kind in ("same", "other") if (data, features) in OTHER else ("same",):
            place = str(folder / f"{kind}-{name}")
            made[f"stopped {kind} {name}"] = Call(f"{STOPS}:stopped", data, features, (place, 1, 5))
        made[f"same {name}"] = Call(f"{STOPS}:resumed", data, features, (str(folder / f"same-{name}/run"),))
        if (data, features) in OTHER:
            allow = (str(folder / f"other-{name}/run"), "distributed.features")
            made[f"other {name}"] = Call(f"{STOPS}:resumed", features, data, allow)
    made["recipe"] = Call(f"{STOPS}:by_recipe", 2, 1, (str(folder / "recipe"),))
    made["stopped back"] = Call(f"{STOPS}:stopped", 2, 1, (str(folder / "back"), 1, 5))
    made["back"] = Call(f"{STOPS}:falls_back", 2, 1, (str(folder / "back/run"),))
    made["unlike"] = Call(f"{STOPS}:unlike", 2, 1, (str(folder / "unlike"),))
    made["other text"] = Call(f"{STOPS}:other_text", 2, 1, (str(folder / "other text"),))
    made["full"] = Call(f"{STOPS}:full", 2, 1, (str(folder / "full"),))
    return made


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
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])
    resumed = contents(folder / f"same-{names(*mesh)}/run")
    whole = contents(folder / f"whole-{names(*mesh)}/run")
    for path in whole:
        if not path.startswith(("checkpoints/", "config.toml", "curves.html")):
            assert resumed[path] == whole[path], path
    last, again = (newest_checkpoint(folder / f"{kind}-{names(*mesh)}/run").facts for kind in ("whole", "same"))
    assert last["files"] == again["files"], "all states are the same, to the last bit"
    assert (last["mesh"], last["finished"]) == (list(mesh), True)
    assert last["format"] == (2 if mesh[0] > 1 else 1)
    parts = {f"sae/training-{part}.{kind}" for part in range(mesh[1]) for kind in ("json", "safetensors")}
    assert {file for file in last["files"] if "training" in file} == parts
    assert {file for file in last["files"] if "moments" in file and file.endswith(".json")} == {
        f"sae/moments-0-{process}.json" for process in range(1, mesh[0])
    }
    assert {f"stream-{process}.safetensors" for process in range(2)} <= set(last["files"])


def test_each_computes_its_own_rows_again(found: dict[str, list[Any]], folder: Path) -> None:
    """By the recipes of its checkpoint; where one process finds others, all are told, and nothing is changed."""
    for one, other in zip(found["recipe"], found["whole 2x1"], strict=True):
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])
    kept = newest_checkpoint(folder / "recipe/run")
    for process in range(2):
        buffer = kept.stream(process)["lanes"][0]["source"]["buffer"]
        assert not len(buffer["origins"])
        assert len(buffer["recipe"]["contexts"])
    first, second = (one["told"] for one in found["recipe"])
    assert "forwards that do not come out as they did, bit for bit" in second
    assert first.startswith("of process 1: ")
    assert second in first


@pytest.mark.parametrize("mesh", OTHER)
def test_it_goes_on_where_features_are_split_otherwise(found: dict[str, list[Any]], mesh: tuple[int, int]) -> None:
    for one, other in zip(found[f"other {names(*mesh)}"], found[f"whole {names(*mesh)}"], strict=True):
        for name, value in one["weights"].items():
            torch.testing.assert_close(value, other["weights"][name], rtol=0, atol=1e-10)


def test_all_fall_back_where_one_cannot_use_its_part(found: dict[str, list[Any]], folder: Path) -> None:
    """And train the steps since then again."""
    for one, other in zip(found["back"], found["whole 2x1"], strict=True):
        assert any("step-5 does not fit the run as it is now: ValueError: not what it wrote" in text
                   for text in one["told"])  # fmt: skip
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])


def test_processes_that_are_not_alike_are_found_before_anything_runs(found: dict[str, list[Any]], folder: Path) -> None:
    for text in found["unlike"]:
        assert text == (
            "the processes of a run must be alike, and process 1 has another option than process 0: lr_schedule.name "
            "is 'saekit:cosine', not 'saekit:constant'. Start all by the same command, in the same environment"
        )
    assert not (folder / "unlike").exists()


def test_processes_that_read_another_text_are_found_before_anything_runs(
    found: dict[str, list[Any]], folder: Path
) -> None:
    for text in found["other text"]:
        assert text.startswith(
            "the processes of a run must be alike, and process 1 has another model or text than process 0: "
            "dataset.contents is "
        )
        assert text.endswith(". Give all the same files")
    assert not (folder / "other text").exists()


def test_what_one_cannot_save_ends_all(found: dict[str, list[Any]], folder: Path) -> None:
    """Its disk is full, or its state odd: all say whose, and the run goes on from the checkpoint before."""
    said = (
        "cannot write a checkpoint: No space left on device. What was there before is kept",
        "the state at stream-1/odd holds a object, which cannot be saved. A state_dict may hold mappings, lists, "
        "numbers, texts, None and tensors",
    )
    place = f"{folder}/full/run"
    note = (
        f"torchrun --nproc-per-node 2 --no-python saekit train --resume {place} goes on from {place}/checkpoints/step-2"
    )
    for one, whose in zip(found["full"], ("of process 1: ", ""), strict=True):
        assert one["told"] == [[f"{whose}{text}", note] for text in said]
        for name, value in one["weights"].items():
            assert torch.equal(value, found["whole 2x1"][0]["weights"][name])


@pytest.mark.parametrize("name", ["topk", "standard", "gated"])
def test_a_state_is_that_of_its_parts(name: str) -> None:
    """Weights, moments and counts of features are split; what all processes have alike stays what it is."""
    given = {"topk": {"k": 2}, "standard": {"l1_coefficient": 1.0}, "gated": {"l1_coefficient": 1.0}}[name]
    sae = saekit.SAE.from_dict({"name": name, "d_in": 3, "d_sae": 8, **given})
    weights = {key: torch.rand_like(value) for key, value in sae.named_parameters()}
    moments = {key: {"step": torch.tensor(4.0), "exp_avg": torch.rand_like(value)} for key, value in weights.items()}
    firing = {"fired": torch.arange(8), "since_fired": torch.arange(8), "rows": 3, "last_fractions": None}
    state = {"diverged": None, "step": 4, "weights": weights, "optimizer": moments, "firing": firing}
    parts = [part_of_training([state], sae.table, number, 4) for number in range(4)]
    assert [part["firing"]["fired"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for key, value in parts[2]["weights"].items():
        axes = [axis for axis, size in enumerate(weights[key].shape) if size == 8]
        assert torch.equal(value, weights[key].narrow(axes[0], 4, 2) if axes else weights[key])
        assert value.shape == parts[2]["optimizer"][key]["exp_avg"].shape
    for number in range(2):  # of four parts, two
        half, expected = (part_of_training(states, sae.table, number, 2) for states in (parts, [state]))
        for key in weights:
            assert torch.equal(half["weights"][key], expected["weights"][key])
            assert torch.equal(half["optimizer"][key]["exp_avg"], expected["optimizer"][key]["exp_avg"])
    again = part_of_training(parts, sae.table)
    assert (again["step"], again["firing"]["rows"], again["firing"]["last_fractions"]) == (4, 3, None)
    for key, value in weights.items():
        assert torch.equal(again["weights"][key], value)
        assert torch.equal(again["optimizer"][key]["exp_avg"], moments[key]["exp_avg"])
    assert part_of_training([{"diverged": "nan"}], sae.table, 0, 2) == {"diverged": "nan"}
