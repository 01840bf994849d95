"""Runs that go on with more processes than before, or fewer: nothing that was trained or read is lost."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Call, done_once, together
from support.spread_meshes import TEXT, leg, manager, settings
from torch import Tensor

import saekit
from saekit.config.files import load_config
from saekit.data import Corpus
from saekit.distributed import ALONE
from saekit.errors import ConfigError
from saekit.runs.checkpoints import Checkpoint, newest_checkpoint
from saekit.runs.spread_checkpoints import part_of_training
from saekit.testing import FakeBackend

Legs = dict[tuple[str, str], list[list[dict[str, Any]]]]
GIVEN = ("toy", "cached", "alike")
"""Sources whose rows are those of one process, whatever the number."""
EVERY = "SAEKIT_PROCESSES" in os.environ
WAYS: dict[str, list[tuple[int, int]]] = {
    "up": [(1, 1), (2, 1)],
    "out of features": [(1, 2), (1, 1)],
} | (
    {
        "into features": [(1, 1), (1, 2)],
        "up and down": [(1, 2), (4, 1), (1, 1)],
        "over": [(2, 1), (2, 2), (1, 1)],
    }
    if EVERY
    else {}
)
"""Processes along data and features of each leg, one after the other; each stops at another step.

Those of every change share one launch of two processes."""
STOPS = (5, 9)


def call(folder: Path, name: str, source: str, number: int) -> Call:
    data, features = WAYS[name][number]
    stop = None if number + 1 == len(WAYS[name]) else STOPS[number]
    return Call("support.spread_meshes:leg", data, features, (str(folder / name), source, stop))


def sources(name: str) -> tuple[str, ...]:
    if EVERY:
        return ("live", *GIVEN) if name == "up" else ("live", "toy")
    return ("live", "cached") if name == "up" else ("live",)


@pytest.fixture(scope="module")
def legs(folder: Path) -> Legs:
    """Of every way and source what each leg made, in each process; checkpoints are kept aside as each left them."""
    return done_once(folder / "legs", lambda: made_in(folder))


def made_in(folder: Path) -> Legs:
    found: Legs = {(name, source): [] for name in WAYS for source in sources(name)}
    config = settings(folder, "cached") | {"activations": {"cache": {"folder": str(folder / "cache")}}}
    saekit.cache_activations(config, plugins=manager(), dataset=TEXT)
    for name in WAYS:
        shutil.copytree(folder / "cache", folder / name / "cache")
    apart = leg(ALONE, str(folder), "apart", 5)
    for turn, size in enumerate((1, 2, 4, 1)):
        calls = {}
        for (name, source), made in ((one, made) for one, made in found.items() if one[0] in WAYS):
            number = len(made)
            if number < len(WAYS[name]) and WAYS[name][number][0] * WAYS[name][number][1] == size:
                calls[f"{name}: {source}"] = call(folder, name, source, number)
        if size == 2:
            calls["apart"] = Call("support.spread_meshes:leg", 2, 1, (str(folder), "apart"))
        if size == 1:
            results = {label: [leg(ALONE, *one.given)] for label, one in calls.items()}
        else:
            results = together(calls, size, folder / f"calls-{turn}") if calls else {}
        if size == 2:
            found["apart", ""] = [[apart], results.pop("apart")]
        for label, result in results.items():
            name, source = label.split(": ")
            assert all("error" not in one for one in result), result
            number = len(found[name, source])
            found[name, source].append(result)
            if "checkpoint" in result[0]:
                kept = folder / "kept" / f"{name} {source} {number}"
                shutil.copytree(result[0]["checkpoint"], kept)
    assert all(len(made) == len(WAYS[name]) for (name, _), made in found.items() if name in WAYS)
    return found


def same(found: Any, expected: Any, place: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            same(found[name], value, f"{place}/{name}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


def parted(state: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer keeps of parameters of which it updates a part."""
    return {
        name: kept for name, kept in state["optimizer"].items() if kept["exp_avg"].shape != state["weights"][name].shape
    }


ALL = [(name, source) for name in WAYS for source in sources(name)]


@pytest.mark.parametrize(("name", "source"), ALL, ids=str)
def test_the_state_is_that_which_was_saved(legs: Legs, folder: Path, name: str, source: str) -> None:
    """Weights, moments, firing counts, scale, generator, and how far it had come."""
    for number, made in enumerate(legs[name, source][1:]):
        checkpoint = Checkpoint.open(folder / "kept" / f"{name} {source} {number}")
        assert checkpoint.mesh == WAYS[name][number]
        assert checkpoint.facts["batches"] == STOPS[number]
        table = saekit.SAE.load(checkpoint.folder / "sae").table
        features = checkpoint.mesh[1]
        if checkpoint.processes == 1:
            saved = checkpoint.training("sae")
        else:
            others = [checkpoint.moments("sae", part) for part in range(features)]
            assert {len(some) for some in others} == {checkpoint.mesh[0] - 1}, "each wrote what it updates"
            states = [checkpoint.training("sae", part) for part in range(features)]
            saved = part_of_training(states, table, moments=others)
        data, now = WAYS[name][number + 1]
        every = [[one["state"] for one in made[first : first + now]] for first in range(0, data * now, now)]
        for parts in every:
            states = [{**part, "optimizer": one["optimizer"]} for part, one in zip(parts, every[0], strict=True)]
            others = [[parted(column[place]) for column in every[1:]] for place in range(now)]
            loaded = states[0] if data * now == 1 else part_of_training(states, table, moments=others)
            assert loaded["step"] == STOPS[number]
            same(loaded, saved, "state")


@pytest.mark.parametrize(("name", "source"), [one for one in ALL if one[1] != "live"], ids=str)
def test_on_given_rows_the_weights_are_those_of_one_process(legs: Legs, folder: Path, name: str, source: str) -> None:
    whole = folder / f"whole-{source}"

    def made() -> dict[str, Tensor]:
        shutil.copytree(folder / "cache", whole / "cache")
        return leg(ALONE, str(whole), source)["weights"]  # type: ignore[no-any-return]

    expected = done_once(whole, made)
    for one in legs[name, source][-1]:
        for key, value in one["weights"].items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", WAYS)
def test_every_token_is_trained_on_once(legs: Legs, folder: Path, name: str) -> None:
    """But for the last of each process, which fill no context."""
    config = load_config(settings(folder, "live"), plugins=manager())
    corpus, model = Corpus.of(config.dataset, config.evals, TEXT), FakeBackend()
    expected = Counter(
        (number, token) for number, text in corpus.training_documents().read() for token in model.tokenize(str(text))
    )
    served: Counter[tuple[int, int]] = sum((one["served"] for made in legs[name, "live"] for one in made), Counter())
    last = newest_checkpoint(folder / name / "live")
    assert last.facts["finished"]
    for stream in last.streams():
        packer = stream["lanes"][0]["source"]["contexts"]["contexts"]["packer"]
        assert len(packer["tokens"]) < 16
        served.update(zip(packer["documents"], packer["tokens"], strict=True))
    put_in = model.special_tokens["bos"]
    assert put_in not in {token for _, token in expected}
    assert Counter({pair: n for pair, n in served.items() if pair[1] != put_in}) == expected
    assert last.facts["saes"]["sae"]["tokens"] > 0.9 * expected.total()


def test_it_is_said_what_to_add(legs: Legs, folder: Path) -> None:
    """And nothing is changed."""
    run = folder / "up" / "cached"
    before = sorted(str(path) for path in run.rglob("*"))

    def refused(*overrides: str, allow: tuple[str, ...] = ()) -> str:
        given = ["training.training_tokens=4000", *overrides]
        with pytest.raises(ConfigError) as caught:
            saekit.resume(run, overrides=given, allow=["training", *allow], plugins=manager(), dataset=TEXT)
        return str(caught.value)

    assert (
        "distributed.data: was 2 when the run was saved, and is 1 now; 2 processes wrote the checkpoint, and one "
        "process would go on from it, so what is left of the text is dealt out anew, and rows may come in another "
        "order. To go on as it was, start as many (torchrun --nproc-per-node 2). To change it all the same: "
        "--allow distributed.data"
    ) in refused()
    assert "allowed to change, but the same as before: distributed.features" in refused(
        allow=("distributed.data", "distributed.features")
    )
    assert (
        "this is one: start it with torchrun --nproc-per-node 2 --no-python saekit train ...; the checkpoint is of 2 "
        "processes, 2 × 1 (data × features); to go on with 1: distributed.features=1 --allow distributed"
    ) in refused("distributed.data=2")
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_a_source_that_cannot_go_on_so_is_told(legs: Legs, folder: Path) -> None:
    (begun,), both = legs["apart", ""]
    for one in both:
        assert (
            "activations.source: gives each process rows of its own, and does not say how 2 processes go on where one "
            "process were (load_states; see saekit.abilities.TakesStates). Start as many as before (without torchrun)"
        ) in one["error"]
    assert Path(begun["checkpoint"]).exists()
    assert "weights" in leg(ALONE, str(folder), "apart", allow=())
