"""The SAEs of a sweep laid out over processes: all that they leave is what one process leaves, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import spread_sweeps as sweeps
from support.processes import Call, ended, together
from support.runs import contents, pressing, without
from support.spread_runs import manager

import saekit
from saekit.config import DistributedConfig
from saekit.distributed.launched import Launched, check_mesh
from saekit.errors import ConfigError, TrainingInterrupted
from saekit.runs.checkpoints import newest_checkpoint
from saekit.training.elsewhere import dealt_out

SWEEPS = "support.spread_sweeps"
LOOK = {"checkpoints": {"keep_last": 0}}
DRAWN: list[dict[str, Any]] = [{"sae": {"d_sae": 12}}, {"sae": {"d_sae": 20}, "training": {"lr": 3e-3}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each process has, so that sums are made in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process makes of the sweep."""
    return sweeps.alone(str(folder / "one"))


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Any]]:
    """What both processes made of each."""
    stop(folder / "widened", at=12)

    def call(name: str, *given: Any) -> Call:
        return Call(f"{SWEEPS}:{name}", given=given, saes=2)

    calls = {
        "swept": call("swept", str(folder / "swept")),
        "look": call("swept", str(folder / "look"), LOOK),
        "stopped": call("stopped", str(folder / "stopped"), 1, 5),
        "resumed": call("resumed", str(folder / "stopped/run")),
        "to one": call("stopped", str(folder / "narrowed"), 0, 7),
        "widened": call("resumed", str(folder / "widened/run"), "distributed.saes"),
        "seeded": call("given", str(folder / "seeded"), "seeded", DRAWN),
        "moody": call("given", str(folder / "moody"), "moody", DRAWN),
        "few": call("given", str(folder / "few"), "seeded", DRAWN[:1]),
    }
    return together(calls, 2, folder / "calls")


def stop(folder: Path, at: int) -> None:
    """Begin the sweep in one process, and stop it in the middle of a step."""
    with pressing(at), pytest.raises(TrainingInterrupted):
        sweeps.alone(str(folder))


def same(result: dict[str, Any], one: dict[str, Any]) -> None:
    """What the caller is given, but for where it is."""
    assert result["saes"].keys() == one["saes"].keys()
    for name, sae in one["saes"].items():
        assert result["saes"][name]["metrics"] == sae["metrics"]
        ours = result["saes"][name]["weights"]
        for known in ("weights", "saved"):  # one that another process has trained is as it is saved
            if all(torch.equal(ours[key], value) for key, value in sae[known].items()):
                break
        else:
            pytest.fail(f"{name} has other weights")
    assert result["diverged"] == one["diverged"]
    assert len(one["diverged"]) == 1


def same_files(run: Path, one: Path) -> None:
    """All that lies there, but for the configuration, which says how SAEs are laid out, and manifests."""
    ours, theirs = contents(run), contents(one)
    differing = {path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)}
    assert all(path.endswith(("/config.toml", "/checkpoint.json")) for path in differing), differing
    last, other = newest_checkpoint(run).facts, newest_checkpoint(one).facts
    assert last["files"] == other["files"]
    assert last["finished"] is True
    assert "mesh" not in last


def test_all_that_a_sweep_leaves_is_that_of_one_process(
    found: dict[str, list[Any]], one: dict[str, Any], folder: Path
) -> None:
    first, second = found["swept"]
    same(first, one)
    same(second, one)
    assert first["summary"] == one["summary"]
    assert second["summary"] == [], "it is for the first process to write"
    same_files(folder / "swept/run", folder / "one/run")
    assert any("evals" in key for key in next(iter(one["saes"].values()))["metrics"])


def test_forwards_are_dealt_out(found: dict[str, list[Any]], folder: Path) -> None:
    backend = sweeps.sweeps.CountingBackend()
    sweeps.quietly(
        lambda: sweeps.sweeps.train(sweeps.configs(str(folder / "counted"), 1), sweeps.sweeps.manager(backend))
    )
    alone, (first, second) = len(backend.seen), (one["forwards"] for one in found["swept"])
    assert first + second <= alone, "which makes a few more ahead, for nobody"
    assert abs(first - second) <= 1


def test_saes_alone_are_those_of_one_process(found: dict[str, list[Any]], folder: Path) -> None:
    sweeps.alone(str(folder / "one look"), **LOOK)
    ours, theirs = (without(contents(folder / name / "run"), "x") for name in ("look", "one look"))
    assert any(path.startswith("checkpoints/") for path in theirs)
    assert {path for path in ours if ours[path] != theirs.get(path)} == {
        path for path in ours if path.endswith("config.toml")
    }
    assert ours.keys() == theirs.keys()


def test_a_signal_to_one_ends_all_at_one_step_and_they_go_on(
    found: dict[str, list[Any]], one: dict[str, Any], folder: Path
) -> None:
    first, second = found["stopped"]
    assert first == second
    assert first["signal"] == 15
    assert "goes on from it" in first["text"] or "saved in" in first["text"]
    for result in found["resumed"]:
        same(result, one)
    same_files(folder / "stopped/run", folder / "one/run")


def test_a_sweep_of_one_process_goes_on_on_many(found: dict[str, list[Any]], one: dict[str, Any], folder: Path) -> None:
    for result in found["widened"]:
        same(result, one)
    same_files(folder / "widened/run", folder / "one/run")


def test_a_sweep_of_many_processes_goes_on_on_one(
    found: dict[str, list[Any]], one: dict[str, Any], folder: Path
) -> None:
    run, options = folder / "narrowed/run", {"plugins": sweeps.sweeps.manager(), "dataset": sweeps.DOCUMENTS}
    with pytest.raises(ConfigError, match=r"--allow distributed\.saes"):
        saekit.resume(run, overrides=["distributed.saes=1"], **options)
    result = sweeps.quietly(
        lambda: saekit.resume(run, overrides=["distributed.saes=1"], allow=["distributed.saes"], **options)
    )
    same(sweeps.told(result), one)
    same_files(run, folder / "one/run")


def test_a_source_that_knows_nothing_of_it_is_asked_by_each(found: dict[str, list[Any]], folder: Path) -> None:
    configs = sweeps.configs(str(folder / "one seeded"), 1, DRAWN, **sweeps.on("seeded"))
    alone = sweeps.told(sweeps.quietly(lambda: sweeps.sweeps.train(configs, manager())))
    for result in found["seeded"]:
        for name, sae in alone["saes"].items():
            for key, value in sae["saved"].items():
                assert torch.equal(result["saes"][name]["saved"][key], value)
    for result in found["moody"]:
        assert "gave other rows in this process than in another" in result["error"]


@pytest.mark.processes
def test_batches_split_and_saes_laid_out(folder: Path) -> None:
    """Four processes; in float64, for sums are made in another order."""
    calls = {"both": Call(f"{SWEEPS}:given", 2, given=(str(folder / "both"), "seeded", DRAWN), saes=2)}
    results = together(calls, 4, folder / "calls of four")["both"]
    configs = sweeps.configs(str(folder / "one of four"), 1, DRAWN, **sweeps.on("seeded"))
    alone = sweeps.told(sweeps.quietly(lambda: sweeps.sweeps.train(configs, manager())))
    for result in results:
        for name, sae in alone["saes"].items():
            for key, value in sae["saved"].items():
                torch.testing.assert_close(result["saes"][name]["saved"][key], value, rtol=0, atol=1e-10)
            assert result["saes"][name]["metrics"] == pytest.approx(sae["metrics"], rel=1e-8, abs=1e-10)
    last = newest_checkpoint(folder / "both/run").facts
    assert last["mesh"] == [2, 1]
    assert {file for file in last["files"] if "stream" in file} == {
        f"stream-{part}.{kind}" for part in range(2) for kind in ("json", "safetensors")
    }


def test_the_command_line_lays_out_a_grid(tmp_path: Path) -> None:
    """As torchrun starts it."""
    file = tmp_path / "run.json"
    table = {
        "model": {"backend": "none"},
        "site": {"hook_name": "hidden"},
        "evals": {"run": [], "held_out_every": 0},
        "activations": {"source": {"name": "toy", "directions": "random", "n_features": 6, "n_hidden": 4}},
        "sae": {"name": "standard", "d_sae": 8},
        "training": {"training_tokens": 800, "train_batch_size_tokens": 200, "verbose": False},
        "reports": {"pictures": False},
    }
    file.write_text(json.dumps(table))

    def run(size: int, *words: str) -> list[tuple[int, str]]:
        place = [f"checkpoints.folder={tmp_path / str(size)}", "checkpoints.name=run"]
        return ended(size, [sweeps.__file__, "train", str(file), *place, f"distributed.saes={size}", *words])

    grid = ["--grid", "sae.l1_coefficient=0.1,1,3"]
    for size in (1, 2):
        assert [code for code, _ in run(size, *grid)] == [0] * size
    ours, theirs = (contents(tmp_path / size / "run") for size in ("2", "1"))
    assert ours.keys() == theirs.keys()
    assert all(path.endswith(("config.toml", "checkpoint.json")) for path in ours if ours[path] != theirs[path])


@pytest.mark.processes
def test_one_that_is_killed_ends_all(tmp_path: Path) -> None:
    (code, said), (killed, _) = ended(2, [sweeps.__file__, "killed", str(tmp_path)], timeout=90)
    assert (code, killed) == (1, -9)
    assert "process 1 has gone or hangs: it was killed or stopped, or its machine is not there any more" in said
    newest = newest_checkpoint(tmp_path / "run").folder
    assert (
        f"torchrun --nproc-per-node 2 --no-python saekit train --resume {tmp_path / 'run'} goes on from {newest}"
        in (said)
    )


def test_more_groups_than_saes_are_refused(found: dict[str, list[Any]]) -> None:
    for result in found["few"]:
        assert result["error"] == (
            "distributed.saes: is 2, and this run trains one SAE, so some processes would have "
            "none; leave it out. To have several processes train one SAE, split batches or its features "
            "(distributed.features)"
        )


@pytest.mark.parametrize(
    ("size", "config", "said"),
    [
        (1, {"saes": 2}, "distributed.saes: asks for 2 processes, and this is one: start it with torchrun"),
        (4, {"saes": 3}, "distributed.saes: is 3, which does not divide the 4 processes"),
        (
            4,
            {"saes": 2, "data": 4},
            "is 4, and 4 processes with distributed.saes = 2 leave 2; leave it out, or start 8",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(size: int, config: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mesh(DistributedConfig(**config), Launched(size=size))
    assert said in str(caught.value)


def test_saes_are_laid_out_or_split() -> None:
    with pytest.raises(ConfigError, match=r"saes: is 2, and features is 2: .* set one of the two to 1"):
        DistributedConfig(saes=2, features=2)
    assert check_mesh(DistributedConfig(saes=2), Launched(size=6)) == (3, 2)


def test_saes_are_dealt_out_by_their_weights() -> None:
    assert dealt_out([1, 9, 4, 4], 2) == [1, 0, 1, 1]
    assert dealt_out([5, 5, 5], 3) == [0, 1, 2]
    assert dealt_out([3, 2], 1) == [0, 0]
