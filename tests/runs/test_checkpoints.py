"""Checkpoints on disk: whole or not at all, nothing in them that runs, and the right ones kept."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support import caches
from support.runs import LIVE, fake_config, manager, resume, stopped, train
from torch import Tensor

import saekit
from saekit.errors import StorageError
from saekit.runs import checkpoints as on_disk
from saekit.runs import saving
from saekit.runs.checkpoints import Checkpoint, all_checkpoints
from saekit.testing import fake_plugin
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- what is in a checkpoint


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """Everything that the training needs, in JSON and safetensors alone, and an SAE that loads."""
    error = stopped(fake_config(tmp_path), 9)
    folder = tmp_path / "run/checkpoints/step-9"
    assert error.checkpoint == folder
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "checkpoint.json", "stream.json", "stream.safetensors", "sae/training.json", "sae/training.safetensors",
        "sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors", "sae/probe.safetensors",
    }  # fmt: skip
    for name in files:
        data = (folder / name).read_bytes()
        if name.endswith(".json"):
            json.loads(data)
        else:
            with safe_open(folder / name, "pt") as opened:
                assert opened.keys()
        assert b"torch" not in data[:2] and data[:2] != b"PK" and data[:1] != b"\x80"  # noqa: PT018 - zip, pickle
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(data))
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    assert set(checkpoint.facts["files"]) == files - {"checkpoint.json"}
    training, stream = checkpoint.training("sae"), checkpoint.stream()
    assert set(training) == {
        "step", "tokens", "scale", "diverged", "weights", "optimizer", "firing", "generator", "recent"
    }  # fmt: skip
    assert set(training["weights"]) == {"W_enc", "W_dec", "b_enc", "b_dec", "scaling_factor"}
    assert set(training["optimizer"]["scaling_factor"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert training["scale"] != 1
    assert set(stream["random"]) == {"python", "numpy", "torch", "cuda"}
    (lane,) = stream["lanes"]
    assert set(lane["source"]) == {"buffer", "contexts", "ended"}
    for path in (folder, folder / "sae"):
        sae = saekit.SAE.load(path, plugins=manager())
        assert (sae.d_in, sae.d_sae) == (8, 64)
        assert sae.info.metadata["training_tokens"] == 9 * 256


def test_a_resumed_run_holds_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    """It may be removed, and its room is free then."""
    stopped(fake_config(tmp_path), 4)
    held: list[str] = []

    def build(config: object, *, run: object) -> object:
        def look(sae: object, **services: object) -> dict[str, float]:
            mapped = Path("/proc/self/maps").read_text().splitlines()
            held.extend(line for line in mapped if str(tmp_path / "run/checkpoints") in line)
            return {}

        return look

    plugins = manager(None, fake_plugin("evals", "look", build=build))
    resume(tmp_path / "run", plugins=plugins, overrides=['evals.run=["look"]'], allow=["evals.run"])
    assert not held


# ---- which are written, and which stay


@pytest.mark.parametrize(
    ("number", "keep_last", "steps", "resumable"),
    [
        (0, 2, [11], [11]),
        (1, 2, [6, 11], [6, 11]),  # of 2,700 tokens, those at or after every 1,350, and the end
        (3, 2, [3, 6, 8, 11], [8, 11]),
        (3, 1, [3, 6, 8, 11], [11]),
        (3, 0, [3, 6, 8], []),
        (3, 9, [3, 6, 8, 11], [3, 6, 8, 11]),
        (50, 2, list(range(1, 12)), [10, 11]),
    ],
)
def test_checkpoints_at_even_distances(
    tmp_path: Path, number: int, keep_last: int, steps: list[int], resumable: list[int]
) -> None:
    """Their SAEs stay, whatever is kept to go on from."""
    whole = train(fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": number, "keep_last": keep_last}))
    found = sorted((tmp_path / "run/checkpoints").glob("*"), key=lambda path: int(path.name[5:]))
    assert [path.name for path in found] == [f"step-{step}" for step in steps]
    assert sorted(int(path.name[5:]) for path in all_checkpoints(tmp_path / "run")) == resumable
    for path, step in zip(found, steps, strict=True):
        if step not in resumable:
            names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "probe.safetensors"}
            assert {str(file.relative_to(path)) for file in path.rglob("*")} == {"sae"} | {f"sae/{n}" for n in names}
        for folder in (path, path / "sae"):
            sae = saekit.SAE.load(folder, plugins=manager())
            assert sae.info.metadata["training_tokens"] == min(step * 256, 2700)
    if steps[-1] == 11:
        assert torch.equal(sae.W_enc, whole.sae.W_enc)


def test_an_evenly_spaced_one_is_not_lost_when_another_is_of_the_same_step(tmp_path: Path) -> None:
    """Text that ends may end right there."""
    checkpoints = {"name": "run", "n_checkpoints": 50, "keep_last": 1}
    sections = {"dataset": {"on_exhausted": "stop"}, "training": {"training_tokens": 9000, "finetuning_tokens": 0,
                "finetuning_method": None}}  # fmt: skip
    train(fake_config(tmp_path, checkpoints=checkpoints, **sections), dataset=caches.DOCUMENTS[:25])
    (newest,) = all_checkpoints(tmp_path / "run")
    assert (Checkpoint.open(newest).facts["spaced"], Checkpoint.open(newest).facts["finished"]) == (True, True)


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment when one is copied to that of the next; how long it takes to write is another matter."""
    clock, written = [0.0], []
    begin = saving.Saving._begin

    def note(self: saving.Saving, *how: bool) -> Any:
        written.append((f"step-{self._session.batches}", round(clock[0] / 60)))
        return begin(self, *how)

    work = SAETrainer.train_on

    def slow(trainer: SAETrainer, rows: Tensor, *rest: Any) -> Any:
        clock[0] += 25 * 60
        return work(trainer, rows, *rest)

    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(saving.Saving, "_begin", note)
    monkeypatch.setattr(SAETrainer, "train_on", slow)
    train(fake_config(tmp_path, LIVE | {"prefetch": False}, checkpoints={"name": "run", "every_minutes": 60}))
    assert written == [("step-3", 75), ("step-6", 150), ("step-9", 225), ("step-11", 275)]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-9", "step-11"}
    for number, options in enumerate(({"every_minutes": 0}, {"every_minutes": 60, "keep_last": 0})):
        written.clear()
        name = f"other {number}"
        train(fake_config(tmp_path, LIVE | {"prefetch": False}, checkpoints={"name": name, **options}))
        assert [step for step, _ in written] == [["step-11"], []][number]


def test_an_old_checkpoint_that_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system where somebody reads it; training goes on."""

    def busy(path: Path) -> None:
        raise StorageError("cannot remove it: busy")

    monkeypatch.setattr(on_disk, "remove_folder", busy)
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9})
    with pytest.warns(RuntimeWarning, match="an old checkpoint stays: cannot remove it: busy"):
        train(config)
    assert len(list(all_checkpoints(tmp_path / "run"))) == 11
