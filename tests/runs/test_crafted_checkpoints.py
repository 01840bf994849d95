"""A newest checkpoint that is whole by its checksums and still not what saekit writes: the one before it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.crafted import falls_back, seal, setting
from support.runs import fake_config, manager, resume, stopped

from saekit.errors import StorageError
from saekit.files.names import SAE_FILES
from saekit.runs.checkpoints import Checkpoint, keep_saes
from saekit.runs.state_files import read_state, write_state

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = "[" * 100_000


@pytest.mark.parametrize("file", ["checkpoint.json", "stream.json", "sae/training.json"])
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "[]", "3", "null", '"x"', "{}", '{"saes": 1e999}'])
def test_files_that_hold_something_else(tmp_path: Path, made: Path, file: str, text: str) -> None:
    def change(checkpoint: Path) -> None:
        (checkpoint / file).write_text(text)
        if file != "checkpoint.json":
            seal(checkpoint)

    falls_back(tmp_path, made, change)


def test_nested_less_deep_than_json_takes(tmp_path: Path, made: Path) -> None:
    def change(checkpoint: Path) -> None:
        (checkpoint / "stream.json").write_text('{"a":' * 900 + "1" + "}" * 900)
        seal(checkpoint)

    falls_back(tmp_path, made, change)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batches", -1), ("batches", "5"), ("batches", 2**70), ("batches", True), ("batches", ...), ("finished", 0),
        ("spaced", None), ("identity", []), ("versions", "1"), ("versions", ...), ("files", []), ("files", {"a": 3}),
        ("saes", []), ("saes", {}), ("saes/sae", 3), ("saes/sae/d_sae", 0), ("saes/sae/d_sae", "64"),
        ("saes/sae/diverged", 3), ("saes/sae/config", None), ("saes/sae/config", {}), ("saes/sae/step", 1e300),
        ("saes/sae/config/training", 3), ("saes/sae/config/training", {"lr": "much"}), ("format", 0),
        ("format", "new"), ("format", None), ("saes/sae/config/checkpoints", []), ("saes/sae/tokens", ...),
    ],
)  # fmt: skip
def test_values_in_the_manifest(tmp_path: Path, made: Path, path: str, value: Any) -> None:
    falls_back(tmp_path, made, lambda checkpoint: seal(checkpoint, setting(path, value)))


def test_a_fault_in_an_option_is_told_with_its_file(tmp_path: Path, made: Path) -> None:
    told = r"training.lr: expected a number, found 'much' \(in .*step-5/checkpoint.json, saes.sae.config\)"
    falls_back(tmp_path, made, lambda one: seal(one, setting("saes/sae/config/training/lr", "much")), told)


@pytest.mark.parametrize(
    ("stem", "path", "value"),
    [
        ("stream", "lanes", {}), ("stream", "lanes", []), ("stream", "lanes/0", 3), ("stream", "lanes/0/source", None),
        ("stream", "lanes/0/source", {}), ("stream", "lanes/0/tokens", "x"), ("stream", "lanes/0/batches", 4),
        ("stream", "lanes/0/ended", "no"), ("stream", "lanes/0/untold", {"other": {}}), ("stream", "told", None),
        ("stream", "told", 1.5), ("stream", "latest", {}), ("stream", "latest", {"sae": 3}), ("stream", "random", {}),
        ("stream", "random/python", [3, "x", None]), ("stream", "random/torch", "x"), ("stream", "trackers", []),
        ("stream", "trackers", {"sae": 3}), ("stream", "trackers", {"sae": {"saekit:jsonl": [{"step": 1}]}}),
        ("stream", "trackers", {"sae": {"saekit:jsonl": [{"step": "x", "metrics": {}}]}}),
        ("stream", "trackers", {"sae": {"saekit:jsonl": [{"step": 1, "saved": ["..", "x"]}]}}),
        ("sae/training", "step", 4), ("sae/training", "step", "5"), ("sae/training", "tokens", None),
        ("sae/training", "scale", 0), ("sae/training", "scale", "x"), ("sae/training", "scale", float("nan")),
        ("sae/training", "optimizer", 3), ("sae/training", "optimizer", {"W": {}}), ("sae/training", "firing", ...),
        ("sae/training", "firing/rows", "x"), ("sae/training", "firing/fired", torch.zeros(1)),
        ("sae/training", "firing/since_fired", torch.zeros(64)), ("sae/training", "generator", torch.zeros(3)),
        ("sae/training", "diverged", "it did"), ("sae/training", "weights", {}),
        ("sae/training", "optimizer/b_enc/exp_avg", torch.zeros(3)), ("sae/training", "optimizer/b_enc/exp_avg", ...),
    ],
)  # fmt: skip
def test_values_in_the_states(tmp_path: Path, made: Path, stem: str, path: str, value: Any) -> None:
    def change(checkpoint: Path) -> None:
        folder, _, name = stem.rpartition("/")
        state = read_state(checkpoint / folder, name)
        setting(path, value)(state)
        for suffix in ("json", "safetensors"):
            (checkpoint / folder / f"{name}.{suffix}").unlink()
        write_state(checkpoint / folder, name, state)
        seal(checkpoint)

    falls_back(tmp_path, made, change)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "other shapes"])
def test_tensors_of_a_state(tmp_path: Path, made: Path, kind: str) -> None:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "sae/training.safetensors"
        data = file.read_bytes()
        if kind == "missing":
            file.unlink()
        elif kind == "other shapes":
            save_file({name: value.flatten()[:1].clone() for name, value in load_file(file).items()}, file)
        else:
            file.write_bytes(data[: len(data) // 2] if kind == "cut" else b"")
        seal(checkpoint, lambda table: table["files"].pop("sae/training.safetensors") if kind == "missing" else None)

    falls_back(tmp_path, made, change)


def test_none_that_can_be_used(tmp_path: Path, made: Path) -> None:
    """All are named with what is wrong, and all stay where they are."""
    shutil.copytree(made / "run", tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        state = read_state(checkpoint, "stream") | {"lanes": []}
        for suffix in ("json", "safetensors"):
            (checkpoint / f"stream.{suffix}").unlink()
        write_state(checkpoint, "stream", state)
        seal(checkpoint, setting("batches", 0))
    with (
        pytest.warns(RuntimeWarning, match="a newer checkpoint is not used: .*step-5 does not fit the run as it"),
        pytest.raises(StorageError, match=r"every checkpoint in .* is damaged: .*step-5.*; .*step-3"),
    ):
        resume(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-3", "step-5"}


def test_a_checkpoint_of_an_older_saekit(tmp_path: Path, made: Path) -> None:
    """It says nothing of trackers, and is used."""
    shutil.copytree(made / "run", tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-5"
    state = read_state(checkpoint, "stream")
    del state["trackers"]
    for suffix in ("json", "safetensors"):
        (checkpoint / f"stream.{suffix}").unlink()
    write_state(checkpoint, "stream", state)
    seal(checkpoint)
    resume(tmp_path / "run")  # a warning would be an error


def test_a_damaged_one_takes_no_name_that_is_taken(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    kept = tmp_path / "run/checkpoints/step-5.damaged"
    kept.mkdir()
    (kept / "notes.txt").write_text("what I found")
    seal(tmp_path / "run/checkpoints/step-5", setting("batches", -1))
    with pytest.warns(RuntimeWarning, match="Going on from step-3"):
        resume(tmp_path / "run")
    assert (kept / "notes.txt").read_text() == "what I found"
    assert (tmp_path / "run/checkpoints/step-5.damaged-2/checkpoint.json").exists()


@pytest.mark.parametrize("names", [[], ["sae"]])
def test_files_of_others_do_not_go_with_a_checkpoint(tmp_path: Path, made: Path, names: list[str]) -> None:
    shutil.copytree(made / "run/checkpoints/step-3", tmp_path / "step-3")
    (tmp_path / "step-3/notes.txt").write_text("what I found")
    (tmp_path / "step-3/sae/plots").mkdir()
    (tmp_path / "step-3/sae/plots/a.png").write_text("a picture")
    (tmp_path / "step-3/link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-3/.DS_Store").write_text("litter")
    keep_saes(tmp_path / "step-3", names)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    loads = {f"step-3/sae/{name}" for name in SAE_FILES}
    assert found == {"step-3/notes.txt", "step-3/sae/plots/a.png", "step-3/link"} | (loads if names else set())


def test_a_checkpoint_written_again_keeps_files_of_others(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 11)
    (tmp_path / "run/checkpoints/step-11/notes.txt").write_text("what I found")
    resume(tmp_path / "run", plugins=manager())
    assert (tmp_path / "run/checkpoints/step-11/notes.txt").read_text() == "what I found"
    assert Checkpoint.open(tmp_path / "run/checkpoints/step-11").facts["finished"]
