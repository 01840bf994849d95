"""`saekit plan`: what it says is so, everything that train would refuse is found at once, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import warm
from support.command import cli
from support.tiny import hooked_transformer, run_config

import saekit
from saekit.runs.timing import bytes_text

pytestmark = pytest.mark.usefixtures("short_rehearsals")


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"log_frequency": 100})
    model = hooked_transformer()
    found = saekit.plan(config, model=model)
    assert found.problems == []
    assert not list(tmp_path.iterdir()), "nothing is written"
    numbers = found.numbers
    assert (numbers["steps"], numbers["training_tokens"], numbers["d_in"], numbers["d_sae"]) == (8, 2000, 16, 64)
    assert numbers["buffer_bytes"] == (4 + 1) * 8 * 32 * 16 * 4, "four forwards, and one ahead"
    assert numbers["checkpoint_bytes"] == numbers["sae_bytes"] * 3 / 4 + numbers["buffer_bytes"]
    assert numbers["model_bytes"] == sum(parameter.nbytes for parameter in model.parameters())
    assert numbers["forward_seconds"] > 0
    assert numbers["step_seconds"] > 0
    parts = ("opening", "forward", "step", "eval", "saving")
    assert all(numbers[f"{part}_seconds"] > 0 for part in parts)
    assert numbers["picture_seconds"] == 0, "none are drawn"
    assert numbers["seconds"] == pytest.approx(sum(numbers[f"{part}_seconds"] for part in parts))
    assert numbers["first_step_seconds"] < numbers["last_step_seconds"] < numbers["seconds"]
    result = saekit.train(config, model=model)
    assert result.metrics["details/n_training_tokens"] == numbers["training_tokens"]
    weights = sum(parameter.nbytes for parameter in result.sae.parameters())
    assert numbers["sae_bytes"] == 4 * weights
    assert found.facts["contexts"] == (
        "32 tokens, from BOS '<|endoftext|>' (id 0) on; between documents BOS '<|endoftext|>' (id 0)"
    )
    assert found.facts["site"] == "blocks.1.hook_resid_post of custom, width 16"
    assert found.facts["SAE step"] == "fast kernels, no first look in bfloat16: not for fewer than 1024 features"
    planned = saekit.plan(run_config(tmp_path, training={"autocast": True}))
    assert planned.facts["SAE step"] == "plain torch: autocast rounds its products"


def test_the_verdict_is_said_once_before_batches_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is said again, where that takes long, is what is being done."""
    monkeypatch.setattr("saekit.planning.duration.TimedRun.time", lambda *given: None)
    config = run_config(tmp_path, training={"verbose": True})
    found = saekit.plan(config, model=hooked_transformer())
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "It fits" in line] == [f"counted so far: {found.verdict}"]
    assert said[-1] == "trying a few batches ..."


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what the process has")
def test_the_memory_of_the_process_is_that_of_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.planning.duration.TimedRun.time", lambda *given: None)
    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, 1e15))
    found = saekit.plan(run_config(tmp_path), model=hooked_transformer())
    whole, _, parts = found.facts["memory of the process"].removeprefix("about ").partition(": ")
    assert whole == bytes_text(found.numbers["peak_bytes"])
    assert parts.startswith(found.facts["memory on cpu"].partition(" (")[0] + " of memory on cpu, and ")
    assert found.verdict.startswith(f"It fits: it needs about {whole} of memory on cpu (1,000 TB are free)")
    tensors = found.numbers["memory_bytes"]
    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, 2 * tensors))
    tight = saekit.plan(run_config(tmp_path), model=hooked_transformer())
    assert tight.fits is True, "what this process has is free when it ends"


def test_sizes_are_told_in_the_unit_that_they_are_rounded_to() -> None:
    assert [bytes_text(size) for size in (999, 999_400, 999_600, 1e15)] == ["999 bytes", "999 kB", "1 MB", "1,000 TB"]


def test_planning_changes_nothing(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    before = saekit.train(config).sae.W_enc
    state = torch.get_rng_state()
    saekit.plan(config)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, saekit.train(config).sae.W_enc)


def test_everything_that_train_would_refuse_at_once(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        sae={"d_in": 64},
        dataset={"context_size": 129},
        training={"train_batch_size_tokens": 8000, "device": "cuda:7"},
        evals={"split": "test"},
        lr_schedule={"name": "cosine", "end": 0},
    )
    config["training"]["lr_decay_steps"] = 1
    found = saekit.plan(config)
    for words in (
        "dataset.context_size: is 129, but the model 'saekit/tiny-python' takes at most 128 tokens",
        "sae.d_in: is 64, but blocks.1.hook_resid_post of 'saekit/tiny-python' has width 128",
        "too few for batches of 8,000",
        "training.device: 'cuda:7' cannot be used",
        "has no split 'test'",
        "nothing to decay from",
    ):
        assert sum(words in problem for problem in found.problems) == 1, (words, found.problems)
    assert len(found.problems) == 6


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"site": {"hook_name": "blocks.1.hook_resid_pots"}}, "has no hook 'blocks.1.hook_resid_pots'"),
        ({"dataset": {"column": "body"}}, "has no column 'body'"),
        ({"dataset": {"path": "./nowhere"}}, "there is no file or folder './nowhere'"),
        ({"dataset": {"sequence_separator_token": "sep"}}, "asks for the tokenizer's sep token"),
        ({"model": {"name": "./nowhere"}}, "there is no model folder './nowhere'"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_each_problem(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    found = saekit.plan(run_config(tmp_path, **sections))
    assert any(words in problem for problem in found.problems), found.problems
    assert len(found.problems) == 1


def test_what_looks_wrong_but_runs(tmp_path: Path) -> None:
    windows = {"dead_feature_window": 1000, "feature_sampling_window": 100}
    found = saekit.plan(run_config(tmp_path, dataset={"prepend_bos": False}, sae={"d_sae": 16}, training=windows))
    assert found.problems == []
    for words in (
        "contexts do not begin with BOS",
        "fewer features (16) than its input has dimensions (128)",
        "no feature is ever counted as dead",
        "no firing fractions are logged",
    ):
        assert sum(words in warning for warning in found.warnings) == 1, words
    assert "with no token put before them" in found.facts["contexts"]


@pytest.mark.slow
def test_defaults_do_not_warn_of_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:the SAE at")  # is worse than the mean, after a few steps
    monkeypatch.setattr("saekit.planning.times._SECONDS", 0.05)  # of evals
    assert saekit.plan({}).warnings == []
    run = cli("train", "training.training_tokens=16_384", "checkpoints.name=small", cwd=tmp_path)
    assert "warning" not in run.stderr.lower()


def test_a_run_from_a_cache_is_timed_by_its_reads(tmp_path: Path) -> None:
    cache = {"folder": str(tmp_path / "cache"), "tokens": 2000}
    config = run_config(tmp_path / "runs", activations={"cache": cache})
    planned = saekit.plan(config)
    saekit.cache_activations(config)
    size = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))
    assert planned.numbers["cache_bytes"] == size
    config["activations"]["source"] = {"name": "cached", "folder": cache["folder"]}
    found = saekit.plan(config, measure=True)
    assert found.problems == []
    told = found.facts["contexts in a forward"]
    assert told == "not compared: the activations are there, and training runs no model"
    assert "reading activations" in found.facts["duration"]
    assert "buffer_bytes" not in found.numbers


def test_text_that_is_too_short(tmp_path: Path) -> None:
    config = run_config(tmp_path, evals={"run": [], "split": None}, dataset={"on_exhausted": "stop"})
    found = saekit.plan(config, dataset=[{"text": "abc"}] * 3)
    assert "the data does not fill one context of 32 tokens" in found.problems


def test_what_train_refuses_by_name_alone(tmp_path: Path) -> None:
    found = saekit.plan(run_config(tmp_path, evals={"run": ["reconstruction", "saekit:reconstruction"]}))
    assert any("evals.run: names a plugin twice" in problem for problem in found.problems)
    found = saekit.plan(run_config(tmp_path) | {"trackers": ["jsonl", {"name": "jsonl", "file": "b.jsonl"}]})
    assert any("trackers: names a plugin twice" in problem for problem in found.problems)


def test_a_cache_that_could_not_be_written_is_no_problem_of_training(tmp_path: Path) -> None:
    config = run_config(tmp_path, activations={"cache": {"sites": [{"hook_name": "blocks.9.hook_resid_post"}]}})
    config["activations"]["source"] = {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4}
    found = saekit.plan(config)
    assert found.problems == []
    assert any("'blocks.9.hook_resid_post' (activations.cache.sites)" in warning for warning in found.warnings)


def plan_in_shell(*arguments: object, cwd: Path, code: int) -> str:
    found = warm.python("-m", "saekit.cli", "plan", *arguments, cwd=cwd)
    assert found.returncode == code, found.stderr
    return found.stdout


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run_config(tmp_path / "runs"))))
    shown = plan_in_shell("run.toml", "sae.d_in=5", cwd=tmp_path, code=2)
    assert "duration" in shown
    assert "problem: sae.d_in: is 5" in shown
    data = json.loads(plan_in_shell("run.toml", "--json", cwd=tmp_path, code=0))
    assert data["numbers"]["steps"] == 8
    assert {path.name for path in tmp_path.iterdir()} == {"run.toml"}
