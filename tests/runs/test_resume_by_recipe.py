"""A run whose checkpoints hold a recipe ends with the same bytes as one whose checkpoints hold rows, and as one that
was never stopped."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lms import causal_lm
from support.recipes import Mixing
from support.runs import HOOKS, LIVE, contents, fake_config, manager, on_cache, pressing, resume, train
from support.spread_runs import SeededSource
from support.tiny import hooked_transformer, run_config

import saekit
from saekit import ConfigError, Entry
from saekit.errors import TrainingInterrupted
from saekit.runs.checkpoints import newest_checkpoint
from saekit.runs.timing import bytes_text
from saekit.testing import FakeConfig
from saekit.testing.fakes import plugin_of

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = {"name": "run", "buffer": "recipe"}
TRAINED = ("sae/", "metrics.jsonl")


def config(source: dict[str, Any] = LIVE, **sections: Any) -> dict[str, Any]:
    sections = {"checkpoints": RECIPE, "training": {"train_batch_size_tokens": 128}, **sections}
    return fake_config(Path("runs"), source, **sections)


def stop(work: Callable[[], Any], at: int) -> TrainingInterrupted:
    with pressing(at), pytest.raises(TrainingInterrupted) as caught:
        work()
    return caught.value


def of_saes(folder: Path) -> dict[str, str]:
    """What was trained and what is told of it, as checksums."""
    return {
        path: summed
        for path, summed in contents(folder).items()
        if not path.startswith("checkpoints/") and any(part in path for part in TRAINED)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped, whose checkpoints hold rows."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        train(config(checkpoints={"name": "run"}), plugins=manager(Mixing()))
    return folder / "runs/run"


@pytest.mark.parametrize(("step", "prefetch"), [(1, False), (5, True), (9, False)])
def test_it_ends_with_the_very_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, step: int, prefetch: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    stop(lambda: train(config(LIVE | {"prefetch": prefetch}), plugins=manager(Mixing())), step)
    resume(Path("runs/run"), plugins=manager(Mixing()))
    assert of_saes(Path("runs/run")) == of_saes(whole)


def test_a_sweep_ends_with_the_very_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds, so two lanes that share forwards, with two hooks each."""
    grid = {"training.seed": [1, 2], "site.hook_name": HOOKS}
    for name, checkpoints in (("rows", {"name": "run"}), ("recipe", RECIPE)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        configs = saekit.grid(config(checkpoints=checkpoints), grid, plugins=manager())
        if name == "rows":
            train(configs, plugins=manager(Mixing()))
        else:
            stop(lambda configs=configs: train(configs, plugins=manager(Mixing())), 13)
            resume(Path("runs/run"), plugins=manager(Mixing()))
    assert of_saes(tmp_path / "recipe/runs/run") == of_saes(tmp_path / "rows/runs/run")


@pytest.mark.parametrize("kind", ["HookedTransformer", "AutoModelForCausalLM"])
def test_real_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In the middle of the text; the checkpoint is many times smaller."""
    model: Any = hooked_transformer(d_model=64) if kind == "HookedTransformer" else causal_lm("gpt2")
    hook = "blocks.1.hook_resid_post" if kind == "HookedTransformer" else "transformer.h.1"
    sizes = {}
    for name, checkpoints in (("rows", {"name": "run"}), ("recipe", RECIPE)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        own = run_config(
            Path("runs"), model={"backend": kind}, site={"hook_name": hook}, evals={"run": []},
            checkpoints={**checkpoints, "folder": "runs"}, sae={"d_sae": 8},
        )  # fmt: skip
        stop(lambda own=own: saekit.train(own, model=model), 5)
        stream = next(Path("runs/run/checkpoints/step-5").glob("stream.safetensors"))
        sizes[name] = stream.stat().st_size
        if name == "recipe":
            saekit.resume("runs/run", model=model)
    monkeypatch.chdir(tmp_path / "rows")
    saekit.resume("runs/run", model=model)
    assert of_saes(tmp_path / "recipe/runs/run") == of_saes(tmp_path / "rows/runs/run")
    assert sizes["recipe"] * 2 < sizes["rows"]
    print(f"\n{kind}: {sizes['rows']:,} bytes of rows, {sizes['recipe']:,} of a recipe")


def test_a_changed_model_is_found_and_may_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stop(lambda: train(config(), plugins=manager(Mixing())), 5)
    before = contents(Path("runs/run"))
    words = (
        r"model.activations: of (\d+) activations that waited in the buffer, \1 are of forwards that do not come out "
        r"as they did, bit for bit: .*another. Go on where runs/run/checkpoints/step-5 was written, so that the run "
        r"ends as it would have; or train on what is computed here, .*: --allow model.activations"
    )
    other = manager(Mixing(factor=1.001))
    with pytest.raises(ConfigError, match=words):
        resume(Path("runs/run"), plugins=other)
    assert contents(Path("runs/run")) == before, "nothing is lost"
    with pytest.raises(ConfigError, match="the same as before: model.activation$"):
        resume(Path("runs/run"), plugins=other, allow=["model.activation"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(Path("runs/run"), plugins=other, allow=["model.activations"])
    told = [str(one.message) for one in caught if "bit for bit" in str(one.message)]
    assert len(told) == 1
    assert told[0].endswith("The run goes on with what is computed here")


def test_it_may_be_changed_when_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """From a recipe to rows, and back."""
    monkeypatch.chdir(tmp_path)
    stop(lambda: train(config(), plugins=manager(Mixing())), 3)
    allow = ["checkpoints.buffer"]

    def on(buffer: str) -> Any:
        return resume(
            Path("runs/run"), plugins=manager(Mixing()), overrides=[f"checkpoints.buffer={buffer}"], allow=allow
        )

    def rows() -> tuple[int, bool]:
        buffer = newest_checkpoint(Path("runs/run")).stream()["lanes"][0]["source"]["buffer"]
        return len(buffer["origins"]), "recipe" in buffer

    assert rows() == (0, True)
    stop(lambda: on("rows"), 2)
    assert rows()[0] > 0
    assert not rows()[1]
    held = rows()[0]
    stop(lambda: on("recipe"), 3)
    assert 0 < rows()[0] < held, "rows of which nothing else is known are kept until they are served"
    resume(Path("runs/run"), plugins=manager(Mixing()))
    assert of_saes(Path("runs/run")) == of_saes(whole)


def test_a_source_that_cannot_is_refused_before_anything_runs(tmp_path: Path, cache: Path) -> None:
    plugins = manager(None, plugin_of("activation_sources", Entry("stranger", FakeConfig, SeededSource)))
    own = fake_config(tmp_path, {"name": "stranger"}, checkpoints=RECIPE)
    words = (
        "checkpoints.buffer: is 'recipe', and the activation source 'test:stranger' does not say that it can compute "
        r"its rows again \(saekit.abilities.KeepsRecipe\). Leave it out: checkpoints hold the rows then"
    )
    with pytest.raises(ConfigError, match=words):
        train(own, plugins=plugins)
    assert not list(tmp_path.iterdir())
    assert any("does not say that it can" in text for text in saekit.plan(own, plugins=plugins).problems)
    train(fake_config(tmp_path, on_cache("cached", cache), checkpoints=RECIPE))  # no rows are in its states anyway


@pytest.mark.usefixtures("short_rehearsals")
def test_the_plan_tells_both(tmp_path: Path) -> None:
    found = {
        buffer: saekit.plan(
            run_config(tmp_path, training={"training_tokens": 10**6}, checkpoints={"buffer": buffer}),
            model=hooked_transformer(),
        )
        for buffer in ("rows", "recipe")
    }
    numbers = found["recipe"].numbers
    rows = f"{bytes_text(numbers['buffer_bytes'])} as rows; about "
    assert found["recipe"].facts["buffer in checkpoints"].startswith(rows)
    assert (
        "as a recipe (as it is), and about 15 forwards to go on from it, "
        in found["recipe"].facts["buffer in checkpoints"]
    )
    assert "with checkpoints.buffer=recipe" in found["rows"].facts["buffer in checkpoints"]
    assert numbers["recipe_forwards"] == found["rows"].numbers["recipe_forwards"] == 15
    assert numbers["recipe_seconds"] > 0
    change = found["rows"].numbers["checkpoint_bytes"] - numbers["checkpoint_bytes"]
    assert change == numbers["buffer_bytes"] - numbers["recipe_bytes"] > 0
