"""Runs whose numbers are none any more: what is not worth saving is not saved."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import attrs
import pytest
from safetensors import safe_open
from support.runs import HOOKS, contents, fake_config, manager, poison, pressing, resume, stopped, train

import saekit
from saekit.errors import DivergedError, TrainingInterrupted
from saekit.runs.checkpoints import all_checkpoints
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has what one looks for, and the last good checkpoint stays, and can be gone on from."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9})
    with monkeypatch.context() as patch, pytest.raises(DivergedError) as caught:
        poison(patch, "", 6)
        train(config)
    last = tmp_path / "run/checkpoints/step-5/sae"
    assert re.fullmatch(
        r"the loss of blocks.0.hook_resid_post is nan at step 6 \(learning rate 0.000\d+, 256 activations of mean norm "
        r"inf and largest value inf, gradient norm nan\)\. Lower training.lr, or add training.lr_warm_up_steps\. The "
        rf"last good checkpoint is {last}", str(caught.value)
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-4", "step-5"}
    assert not (tmp_path / "run/sae").exists()
    assert saekit.SAE.load(last, plugins=manager()).W_dec.isfinite().all()
    for path in (tmp_path / "run").rglob("sae_weights.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 - no mapping
    assert resume(tmp_path / "run").metrics["details/n_training_tokens"] == 2700


def test_a_resumed_run_that_diverges_names_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(fake_config(tmp_path), 4)
    poison(monkeypatch, "", 6)
    with pytest.raises(
        DivergedError, match=f"at step 6 .* The last good checkpoint is {tmp_path}/run/checkpoints/step-4/sae"
    ):
        resume(tmp_path / "run")


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is noticed: at a checkpoint, when it is interrupted, at the end."""
    config = fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 4})
    for name, at, step in (("spaced", 4, 5), ("interrupted", 4, None), ("end", 11, 11)):
        config["checkpoints"]["name"] = name
        with monkeypatch.context() as patch:
            poison(patch, "", at, "weights")
            # On a GPU the loss is only looked at when it is logged.
            patch.setattr(SAETrainer, "_check_finite", lambda *arguments: None)
            if name == "interrupted":
                with pressing(4), pytest.raises(TrainingInterrupted) as stop:
                    train(config)
                assert stop.value.checkpoint is None
            else:
                with pytest.raises(DivergedError) as caught:
                    train(config)
                assert f"b_enc of the SAE at {HOOKS[0]} holds numbers that are not finite after step {step}" in str(
                    caught.value
                )
                assert f"The last good checkpoint is {tmp_path / name}/checkpoints/step-" in str(caught.value)
        saved = {int(path.name[5:]) for path in all_checkpoints(tmp_path / name)}
        assert max(saved) < at
        for path in (tmp_path / name).rglob("sae_weights.safetensors"):
            with safe_open(path, "pt") as file:
                assert file.get_tensor("b_enc").isfinite().all()
        assert resume(tmp_path / name).metrics["evals/l0"] > 0, "from what was good"


def test_one_of_a_sweep_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped alone, its last good SAE stays when older checkpoints go, and the others end as if alone."""
    checkpoints = {"name": "run", "every_minutes": 1e-9}
    axes = {"training.seed": [1, 2], "sae.l1_coefficient": [1.0, 2.0]}
    configs = saekit.grid(fake_config(tmp_path, checkpoints=checkpoints), axes, plugins=manager())
    name = "1_l1_coefficient=2_seed=1"
    poison(monkeypatch, name, 5)
    with pytest.warns(RuntimeWarning, match=rf"^{name} is stopped: .* at step 5 \(learning rate"):
        result = train(configs)
    assert set(result.diverged) == {name}
    found = {path.name: path for path in (tmp_path / "run/checkpoints").iterdir()}
    resumable = [path.name for path in all_checkpoints(tmp_path / "run")]
    assert resumable == ["step-22", "step-21"]
    (kept,) = set(found) - set(resumable)
    assert kept == "step-8", "its fourth step, and the last before its fifth"
    assert {path.name for path in found[kept].iterdir()} == {name}
    assert saekit.SAE.load(found[kept] / name, plugins=manager()).info.metadata["training_tokens"] == 4 * 256
    assert not (tmp_path / "run" / name / "sae").exists()
    assert {path.name for path in found["step-22"].iterdir() if path.is_dir()} == {path.name for path in
           found["step-21"].iterdir() if path.is_dir()}  # fmt: skip
    assert not (found["step-22"] / name / "cfg.json").exists()
    alone = train(attrs.evolve(configs[0], checkpoints=attrs.evolve(configs[0].checkpoints, name="alone")))
    weights = "sae/sae_weights.safetensors"
    ours = result.results["0_l1_coefficient=1_seed=1"].folder
    assert (ours / weights).read_bytes() == (alone.folder / weights).read_bytes()


def test_a_sweep_of_which_one_diverged_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other goes on, the one stays where it was."""
    poison(monkeypatch, "l1_coefficient=2", 3)
    axes = {"sae.l1_coefficient": [1.0, 2.0]}
    results = []
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
        with contextlib.chdir(tmp_path / name):
            configs = saekit.grid(fake_config(Path("runs")), axes, plugins=manager())
            with pytest.warns(RuntimeWarning, match="is stopped") as caught:
                results.append(train(configs) if name == "whole" else stopped(configs, 12))
            assert sum("is stopped" in str(one.message) for one in caught) == 1
    with contextlib.chdir(tmp_path / "part"):
        whole, part = results[0], resume(Path("runs/run"))
    assert part.diverged == whole.diverged
    assert part.summary == whole.summary
    ours, theirs = (contents(tmp_path / name / "runs/run") for name in ("part", "whole"))
    assert {path for path in ours if not path.startswith("checkpoints/")} == {
        path for path in theirs if not path.startswith("checkpoints/")
    }
    assert all(ours[path] == theirs[path] for path in theirs if not path.startswith("checkpoints/"))
