"""A run that was stopped and resumed cannot be told from one that never was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from support import caches
from support.tiny import hooked_transformer, run_config
from torch import Tensor

import saekit
from saekit.errors import ConfigError, PluginFailedError, StorageError, TrainingInterrupted
from saekit.files import storage
from saekit.runs.saving import Saving
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.trainer import SAETrainer

EVERYTHING: dict[str, dict[str, Any]] = {
    "dataset": {"context_size": 32},
    "activations": {"normalize_activations": "expected_average_only_in"},
    "sae": {
        "noise_scale": 0.1,
        "use_ghost_grads": True,
        "l1_warm_up_steps": 4,
        "b_dec_init_method": "mean",
    },
    "lr_schedule": {"name": "cosine"},
    "training": {
        "training_tokens": 2000,
        "finetuning_tokens": 700,
        "finetuning_method": "unrotated_decoder",
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 2,
        "dead_feature_window": 2,
        "feature_sampling_window": 3,
        "seed": 5,
    },
    "evals": {"every_n_steps": 4},
}
"""Eleven steps with all that changes from one to the next."""

MOMENTS = {
    "in warm-up, mid-buffer": 1,
    "in warm-up, before a window's edge": 2,
    "at the end of warm-up, on a window's edge": 3,
    "at an eval, after a window's edge": 4,
    "mid-buffer": 5,
    "on the next window's edge": 6,
    "before the last step of training": 7,
    "before fine-tuning": 8,
    "in fine-tuning, on a window's edge": 9,
    "in fine-tuning, in decay": 10,
    "at the last step": 11,
}
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
LIVE: dict[str, Any] = {"name": "live", "store_batch_size_prompts": 4, "n_batches_in_buffer": 8}
SOURCES = {
    "live, ahead": LIVE | {"prefetch": True},
    "live": LIVE | {"prefetch": False},
    "cached, ahead": {"name": "cached"},
    "cached": {"name": "cached", "prefetch": False},
}


def contents(folder: Path) -> dict[str, str]:
    """Every file that a run leaves behind but for what tells the time, as a checksum."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".png":
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in line.items() if k != "seconds"} for line in lines]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def without(found: dict[str, str], *prefixes: str) -> dict[str, str]:
    return {path: checksum for path, checksum in found.items() if not path.startswith(prefixes)}


def fake_config(folder: Path, source: dict[str, Any] = LIVE, **sections: dict[str, Any]) -> dict[str, Any]:
    """:data:`EVERYTHING` on the fake model, in ``folder/run``."""
    cached = source["name"] == "cached"
    merged = {section: dict(options) for section, options in EVERYTHING.items()}
    merged |= {
        "model": {"backend": "test:fake"},
        "dataset": {"context_size": caches.SIZE},
        "site": {"hook_name": HOOKS[0]},
        "evals": {"every_n_steps": 4, "n_contexts": 4, "split": None, "held_out_every": 0 if cached else 20},
        "checkpoints": {"name": "run"},
    }
    merged["activations"]["source"] = source
    if cached:  # the rows on disk are of all documents
        merged["evals"]["run"] = []
    for section, options in sections.items():
        merged[section] = merged.get(section, {}) | options
    return run_config(folder, **merged)


def manager(backend: FakeBackend | None = None, *plugins: object) -> saekit.PluginManager:
    own = fake_plugin("model_backends", build=lambda config, **services: backend or FakeBackend())
    return isolated_manager(own, *plugins, builtins=True)


def train(config: Any, **options: Any) -> Any:
    return saekit.train(config, **({"plugins": manager(), "dataset": caches.DOCUMENTS} | options))


def resume(run: Path, **options: Any) -> Any:
    return saekit.resume(run, **({"plugins": manager(), "dataset": caches.DOCUMENTS} | options))


@contextlib.contextmanager
def pressing(*at: int, number: int = signal.SIGINT, name: str | None = None) -> Any:
    """Press Ctrl-C in the middle of these steps, counted in the order in which SAEs (or one of them) make them."""
    made, work = [0], SAETrainer.train_on

    def train_on(trainer: SAETrainer, rows: Tensor) -> Any:
        made[0] += name in (None, trainer.name)
        if made[0] in at and name in (None, trainer.name):
            os.kill(os.getpid(), number)
        return work(trainer, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAETrainer, "train_on", train_on)
        yield


def stopped(config: Any, at: int, **options: Any) -> TrainingInterrupted:
    with pressing(at), pytest.raises(TrainingInterrupted) as caught:
        train(config, **options)
    return caught.value


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are no work for several, which would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    caches.cache(caches.config(folder), sites=[{"hook_name": HOOKS[1]}])
    return folder / "cache"


# ---- every kind of moment


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[str], Any]:
    """The run that was never stopped, once for each source."""
    made: dict[str, Any] = {}

    def of(source: str) -> Any:
        if source not in made:
            folder = tmp_path_factory.mktemp("whole")
            with contextlib.chdir(folder):
                made[source] = train(fake_config(Path("runs"), on_cache(source, cache)))
            made[source] = attrs.evolve(made[source], folder=folder / "runs/run")
        return made[source]

    return of


def on_cache(source: str, cache: Path) -> dict[str, Any]:
    return SOURCES[source] | ({"folder": str(cache)} if source.startswith("cached") else {})


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Any], cache: Path, source: str, moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, step = uninterrupted(source), MOMENTS[moment]
    monkeypatch.chdir(tmp_path)
    error = stopped(fake_config(Path("runs"), on_cache(source, cache)), step)
    assert error.step == step
    assert error.checkpoint == Path(f"runs/run/checkpoints/step-{step}")
    assert str(error).endswith(f"saved in {error.checkpoint}. Go on with: saekit train --resume runs/run")
    resumed = resume(Path("runs/run"))
    assert resumed.metrics == whole.metrics
    assert all(torch.equal(a, b) for a, b in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True))
    own = () if step == 11 else (f"checkpoints/step-{step}/",)
    assert without(contents(tmp_path / "runs/run"), *own) == contents(whole.folder)


@pytest.mark.parametrize(
    ("batch", "half"),
    [
        (1, "first"),
        (2, "second"),
        (5, "first"),
        (8, "second"),
        (13, "first"),
        (17, "second"),
        (21, "first"),
        (22, "second"),
    ],
)
def test_a_sweep_is_resumed(tmp_path: Path, sweep: Callable[[], Any], batch: int, half: str) -> None:
    """Two seeds, so two lanes, which take turns, with two hooks each: stopped at the first or second SAE of a batch."""
    configs, whole = sweep()
    with contextlib.chdir(tmp_path):
        error = stopped(configs, 2 * batch - (half == "first"))
        assert error.step == batch
        resumed = resume(Path("runs/run"))
    assert without(contents(tmp_path / "runs/run"), f"checkpoints/step-{batch}/" if batch < 22 else "-") == contents(
        whole.folder
    )
    for name, result in whole.results.items():
        assert resumed.results[name].metrics == result.metrics
    assert resumed.summary == whole.summary


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    folder = tmp_path_factory.mktemp("sweep")
    axes = {"training.seed": [1, 2], "site.hook_name": HOOKS}
    configs = saekit.grid(fake_config(Path("runs")), axes, plugins=manager())
    made: list[Any] = []

    def of() -> Any:
        if not made:
            with contextlib.chdir(folder):
                made.append(attrs.evolve(train(configs), folder=folder / "runs/run"))
        return configs, made[0]

    return of


def test_resumed_again_and_again(tmp_path: Path, uninterrupted: Callable[[str], Any]) -> None:
    whole = uninterrupted("live, ahead")
    with contextlib.chdir(tmp_path):
        assert stopped(fake_config(Path("runs"), SOURCES["live, ahead"]), 2).step == 2
        for at, step in ((1, 3), (3, 6), (3, 9)):
            with pressing(at), pytest.raises(TrainingInterrupted, match=f"interrupted after {step} steps"):
                resume(Path("runs/run"))
        resume(Path("runs/run"))
    assert without(contents(tmp_path / "runs/run"), "checkpoints/step-9/") == contents(whole.folder)


@pytest.mark.parametrize("operation", range(1, 60, 8))
def test_interrupted_during_a_checkpoint(
    tmp_path: Path, uninterrupted: Callable[[str], Any], operation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and once more while it is being saved: at once, and the checkpoint before it is what there is."""
    whole, touched = uninterrupted("live"), [0]

    def impatient(path: Path) -> None:
        touched[0] += 1
        if touched[0] == operation:
            raise KeyboardInterrupt
        sync(path)

    sync = storage._sync
    with contextlib.chdir(tmp_path):
        config = fake_config(Path("runs"), SOURCES["live"], checkpoints={"every_minutes": 1e-9, "name": "run"})
        with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
            saving = Saving.save

            def counted(self: Saving, **options: Any) -> Any:
                patch.setattr(storage, "_sync", impatient)
                return saving(self, **options)

            patch.setattr(Saving, "save", counted)
            train(config)
        checkpoints = sorted(int(path.name[5:]) for path in Path("runs/run/checkpoints").glob("step-*"))
        if checkpoints:
            told = f"go on from runs/run/checkpoints/step-{checkpoints[-1]} with: saekit train --resume runs/run"
            resume(Path("runs/run"))
        else:
            told = "there is none to go on from"
            with pytest.warns(RuntimeWarning, match="the run in runs/run was stopped before its first checkpoint"):
                resume(Path("runs/run"))
        assert caught.value.checkpoint is None, "at once: it is not begun again"
        assert "a checkpoint could not be saved: that was interrupted, too; " + told in str(caught.value)
        assert not list(Path("runs/run").rglob(".*")), "nothing half written is left"
    ends = ("config.toml", "checkpoints/step-10/", "checkpoints/step-11/")
    assert without(contents(tmp_path / "runs/run"), *ends) == without(contents(whole.folder), *ends)


def test_a_step_has_one_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the thread that runs the model ahead has gone: two runs with one seed leave the same checkpoint."""

    class Slow(FakeBackend):
        def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
            time.sleep(0.02)
            return super().activations(tokens, hooks)

    work, pause = SAETrainer.train_on, [0.0]

    def train_on(trainer: SAETrainer, rows: Tensor) -> Any:
        time.sleep(pause[0])
        return work(trainer, rows)

    monkeypatch.setattr(SAETrainer, "train_on", train_on)
    found = []
    for name, pause[0], backend in (("ahead", 0.05, FakeBackend()), ("behind", 0.0, Slow())):
        folder = tmp_path / name
        folder.mkdir()
        with contextlib.chdir(folder):
            # A large buffer, of which less than half is used: the thread fills what was served meanwhile, or not.
            source = LIVE | {"prefetch": True, "n_batches_in_buffer": 24}
            stopped(fake_config(Path("runs"), source), 3, plugins=manager(backend))
        found.append(contents(folder))
    assert found[0] == found[1]


# ---- what else makes a run


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("method", ["scale", "decoder", "unrotated_decoder"])
def test_resumed_in_fine_tuning(tmp_path: Path, dtype: str, method: str) -> None:
    sections = {
        "sae": {"dtype": dtype, "apply_b_dec_to_input": method != "decoder"},
        "training": {"finetuning_method": method},
        "activations": {"normalize_activations": "none"},
    }
    assert_the_same(tmp_path, [9, 10], **sections)


def assert_the_same(
    tmp_path: Path, steps: list[int], whole: dict[str, Any] | None = None, part: dict[str, Any] | None = None,
    unlike: Collection[str] = (), **sections: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A run that is stopped at these steps leaves what one leaves that is not."""
    results = []
    for name, at in (("whole", []), ("parts", steps)):
        (tmp_path / name).mkdir()
        with contextlib.chdir(tmp_path / name):
            config = fake_config(Path("runs"), **sections)
            options = (whole if name == "whole" else part) or {}
            done = 0
            for number, step in enumerate([*at, None]):
                with pressing(*([] if step is None else [step - done])):
                    try:
                        results.append(resume(Path("runs/run"), **options) if number else train(config, **options))
                        assert step is None
                    except TrainingInterrupted:
                        done = step or 0
    own = [f"checkpoints/step-{step}/" for step in steps]
    found = [contents(tmp_path / name / "runs/run") for name in ("whole", "parts")]
    last = f"checkpoints/step-{max(int(p.split('-')[1].split('/')[0]) for p in found[0] if 'step-' in p)}/"
    own = [prefix for prefix in own if prefix != last]
    one, other = ({k: v for k, v in f.items() if k.rpartition("/")[2] not in unlike} for f in found)
    assert without(other, *own) == without(one, *own)
    assert {path for path in found[0] if path.startswith(last)}
    return results[0], results[1]


def test_the_random_numbers_of_plugins_go_on(tmp_path: Path) -> None:
    """An eval that draws from the process's own generators, of Python, NumPy and torch."""

    def build(config: object) -> object:
        def measure(sae: object, **services: object) -> dict[str, float]:
            return {
                "python": random.random(), "gauss": random.gauss(), "numpy": np.random.rand(),
                "normal": np.random.standard_normal(), "torch": torch.rand(()).item(),
            }  # fmt: skip

        return measure

    options = {"plugins": manager(None, fake_plugin("evals", "drawn", build=build))}
    one, _ = assert_the_same(tmp_path, [3, 6], options, options, evals={"run": ["drawn"], "every_n_steps": 1})
    lines = [json.loads(line) for line in (tmp_path / "whole/runs/run/metrics.jsonl").read_text().splitlines()]
    assert len({line["evals/torch"] for line in lines}) == 11
    assert one.metrics["evals/python"] == lines[-1]["evals/python"]
    state = random.getstate()
    assert state == random.getstate(), "and the caller's own are left alone"


def test_an_architecture_with_a_form_of_its_own(tmp_path: Path) -> None:
    """It saves other tensors than it trains, and has some that nothing learns."""
    from saekit_plugins.architectures.standard import StandardConfig
    from saekit_plugins.architectures.standard.module import StandardSAE

    class Odd(StandardSAE):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.register_buffer("seen", torch.zeros(()))

        def losses(self, x: Tensor, step: Any) -> Any:
            self.seen += len(x)
            result = super().losses(x, step)
            return result._replace(loss=result.loss * (1 + 1e-3 * torch.sin(self.seen)))

        def public_tensors(self) -> dict[str, Tensor]:
            return {name: value.half() for name, value in super().public_tensors().items()}  # digits are lost

    @attrs.frozen(kw_only=True)
    class OddConfig(StandardConfig):
        pass

    def build(config: OddConfig, **services: Any) -> Odd:
        return Odd(config, **services)

    options = {"plugins": manager(None, fake_plugin("sae_architectures", "odd", build=build, config=OddConfig))}
    sections = {
        "sae": {"name": "odd"},
        "activations": {"normalize_activations": "none"},
        "training": {"finetuning_tokens": 0, "finetuning_method": None},
    }
    assert_the_same(tmp_path, [2, 6], options, options, **sections)


@pytest.mark.parametrize("kind", ["jsonl", "parquet of tokens", "parquet", "text"])
def test_the_position_in_a_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets that are streamed, each with a position of its own; the text is read more than once."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"text.{kind.split()[0].replace('text', 'txt')}"
    if kind == "text":
        path.write_text("".join(f"{n} = {document['text']}\n" for n, document in enumerate(caches.DOCUMENTS)))
    elif kind == "jsonl":
        datasets.Dataset.from_list(caches.DOCUMENTS).to_json(path)
    else:
        tokens = kind == "parquet of tokens"
        rows = [{"tokens": [1 + n % 100, 2, 3] * (n % 20)} for n in range(70)] if tokens else caches.DOCUMENTS
        datasets.Dataset.from_list(rows).to_parquet(path, batch_size=7)
    options: dict[str, Any] = {"dataset": None}
    dataset = {"path": str(path), "context_size": caches.SIZE, "on_exhausted": "repeat"}
    training = {"training_tokens": 6000, "finetuning_tokens": 700}
    sections = {"dataset": dataset, "training": training, "evals": {"run": [], "n_contexts": 4}}
    # datasets does not write the same position in the same way after it was loaded.
    unlike = ["stream.json", "checkpoint.json"] if "parquet" in kind else []
    assert_the_same(tmp_path, [1, 4, 5, 14, 20], options, options, unlike, **sections)


@pytest.mark.parametrize("prefetch", [False, True])
def test_text_that_ends(tmp_path: Path, prefetch: bool) -> None:
    """The last batch is what was left, and the run is finished although it wanted more."""
    few, source = caches.DOCUMENTS[:25], LIVE | {"prefetch": prefetch}
    options = {"dataset": few}
    sections: dict[str, Any] = {
        "source": source,
        "dataset": {"on_exhausted": "stop"},
        "training": {"training_tokens": 9000, "finetuning_tokens": 0, "finetuning_method": None},
    }
    one, _ = assert_the_same(tmp_path, [3, 5, 11], options, options, **sections)
    tokens = one.metrics["details/n_training_tokens"]
    assert 11 * 256 < tokens < 9000
    assert tokens % 256
    with pytest.raises(ConfigError, match="run is finished. To train it longer, raise training.training_tokens"):
        resume(tmp_path / "parts/runs/run", dataset=few)


def test_text_that_ended_is_read_again_if_that_is_allowed(tmp_path: Path) -> None:
    config = fake_config(
        tmp_path, LIVE, dataset={"on_exhausted": "stop"},
        training={"training_tokens": 9000, "finetuning_tokens": 0, "finetuning_method": None},
    )  # fmt: skip
    few = caches.DOCUMENTS[:25]
    run = train(config, dataset=few).folder
    with pytest.raises(ConfigError, match=r"ended after [\d,]+ activations, so it cannot train longer on it"):
        resume(run, dataset=few, overrides=["training.training_tokens=9500"], allow=["training.training_tokens"])
    again = {"overrides": ["dataset.on_exhausted=repeat"], "allow": ["dataset.on_exhausted"]}
    assert resume(run, dataset=few, **again).metrics["details/n_training_tokens"] == 9000


def test_a_configuration_that_was_edited_or_not_trained_with_yet(tmp_path: Path) -> None:
    """What counts is what the checkpoint was made with, whatever config.toml says by now."""
    run = train(fake_config(tmp_path)).folder
    total = saekit.load_config(run / "config.toml", plugins=manager()).training.training_tokens
    text = (run / "config.toml").read_text()
    # As a run that was allowed to go on is killed before its first checkpoint.
    (run / "config.toml").write_text(text.replace(f"training_tokens = {total}", f"training_tokens = {total + 512}", 1))
    with pytest.raises(
        ConfigError, match=rf"training_tokens: was {total} when the run was saved, and is {total + 512}"
    ):
        resume(run)
    resume(run, allow=["training.training_tokens"])
    text = (run / "config.toml").read_text()
    assert text.count("lr = ") == 1
    (run / "config.toml").write_text(re.sub(r"\nlr = .*", "\nlr = 0.5", text))
    with pytest.raises(ConfigError, match="training.lr: was .* and is 0.5 now"):
        resume(run)


def test_a_start_is_needed_once(tmp_path: Path) -> None:
    start = {"b_dec_init_method": "zeros"}
    folder = train(fake_config(tmp_path / "start", sae=start)).folder
    begun = fake_config(tmp_path, sae=start, training={"from_pretrained_path": str(folder / "sae")})
    stopped(begun, 3)
    shutil.rmtree(folder)
    assert resume(tmp_path / "run").sae.d_sae == 64


def test_a_model_that_ran_out_of_memory_goes_on_in_halves(tmp_path: Path) -> None:
    class Cramped(FakeBackend):
        def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
            if len(tokens) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().activations(tokens, hooks)

    config = fake_config(tmp_path, LIVE | {"prefetch": False}, evals={"run": []})
    with pytest.warns(RuntimeWarning, match="ran out of memory on 4 contexts at once"):
        stopped(config, 5, plugins=manager(Cramped()))
    resume(tmp_path / "run", plugins=manager(Cramped()))  # a warning would be an error
    train(config | {"checkpoints": {"folder": str(tmp_path), "name": "other"}})
    weights = "sae/sae_weights.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "other" / weights).read_bytes()


def test_an_eval_that_fails_is_made_again(tmp_path: Path) -> None:
    """The step before it was made; what it gave is not lost, and not logged twice."""

    def plugins(fail_at: int | None) -> saekit.PluginManager:
        calls = [0]

        def build(config: object) -> object:
            def measure(sae: Any, **services: object) -> dict[str, float]:
                calls[0] += 1
                if calls[0] == fail_at:
                    raise RuntimeError("no memory for an eval")
                return {"norm": sae.W_enc.norm().item()}

            return measure

        return manager(None, fake_plugin("evals", "bad", build=build))

    sections = {
        "evals": {"run": ["bad"], "every_n_steps": 3, "n_contexts": 4},
        "checkpoints": {"n_checkpoints": 3, "name": "run"},
    }
    axes = {"training.seed": [1, 2], "sae.l1_coefficient": [1.0, 2.0]}
    for configs, fails in (
        (lambda: fake_config(Path("runs"), **sections), [2, 4]),
        (lambda: saekit.grid(fake_config(Path("runs"), **sections), axes, plugins=plugins(None)), [2, 11]),
    ):
        whole = tmp_path / f"whole {fails[1]}"
        whole.mkdir()
        with contextlib.chdir(whole):
            train(configs(), plugins=plugins(None))
        for fail_at in fails:
            folder = tmp_path / f"{fails[1]} {fail_at}"
            folder.mkdir()
            with contextlib.chdir(folder):
                with pytest.raises(PluginFailedError, match="no memory for an eval") as caught:
                    train(configs(), plugins=plugins(fail_at))
                (note,) = caught.value.__notes__
                assert re.fullmatch(
                    r"the run as it was before is in runs/run/checkpoints/step-(\d+); saekit train --resume runs/run "
                    "goes on from it", note
                )  # fmt: skip
                with pytest.raises(PluginFailedError, match="no memory for an eval"):
                    resume(Path("runs/run"), plugins=plugins(1))  # it fails again
                resume(Path("runs/run"), plugins=plugins(None))
            # There is one checkpoint more, so of an older one only the SAEs are left.
            found, wanted = contents(folder / "runs/run"), contents(whole / "runs/run")
            last = max(int(number) for number in re.findall(r"step-(\d+)", " ".join(wanted)))
            missing = {path for path in wanted if path not in found}
            assert all(re.search(r"(training|stream|checkpoint)\.\w+$", path) for path in missing)
            assert not any(f"step-{last}/" in path for path in missing)
            assert found.items() >= {path: wanted[path] for path in wanted if path not in missing}.items(), fail_at


@pytest.mark.parametrize(
    ("forward", "prefetch"), [(0, True), (3, False), (9, True), (11, False), (20, True), (31, False)]
)
def test_a_source_that_fails_is_asked_again(tmp_path: Path, prefetch: bool, forward: int) -> None:
    class Failing(FakeBackend):
        """After so many forwards for training; the model is probed once before."""

        left = forward

        def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
            if len(tokens) == 4:
                self.left -= 1
                if self.left == -1:
                    raise OSError("the network drive is gone")
            return super().activations(tokens, hooks)

    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    sections = {"evals": {"run": []}}
    with contextlib.chdir(tmp_path / "whole"):
        train(fake_config(Path("runs"), LIVE | {"prefetch": prefetch}, **sections))
    with contextlib.chdir(tmp_path / "part"):
        with pytest.raises(PluginFailedError, match="the network drive is gone") as caught:
            train(fake_config(Path("runs"), LIVE | {"prefetch": prefetch}, **sections), plugins=manager(Failing()))
        steps = [int(path.name[5:]) for path in Path("runs/run/checkpoints").glob("step-*")]
        if forward < 8:  # the first buffer
            assert not Path("runs/run").exists()
            return
        assert f"is in runs/run/checkpoints/step-{steps[0]}; saekit train --resume" in caught.value.__notes__[0]
        resume(Path("runs/run"))
    found = without(contents(tmp_path / "part/runs/run"), f"checkpoints/step-{steps[0]}/")
    assert found == contents(tmp_path / "whole/runs/run")


# ---- the end of a run


def test_stopped_between_the_last_eval_and_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line is there already, and comes again when the run is resumed: no line twice."""
    sections = {"evals": {"every_n_steps": 0, "n_contexts": 4}}
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    with contextlib.chdir(tmp_path / "whole"):
        train(fake_config(Path("runs"), **sections))

    def killed(self: Saving, **options: Any) -> None:
        if options.get("finished"):
            raise RuntimeError("as good as killed")

    with contextlib.chdir(tmp_path / "part"):
        with monkeypatch.context() as patch:
            patch.setattr(Saving, "save_if_possible", killed)
            with pytest.raises(RuntimeError, match="as good as killed"):
                train(fake_config(Path("runs"), **sections))
        lines = Path("runs/run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, 12), 11]
        resume(Path("runs/run"))
        assert Path("runs/run/metrics.jsonl").read_text().splitlines() == lines
    assert contents(tmp_path / "part/runs/run") == contents(tmp_path / "whole/runs/run")


def test_a_signal_in_the_last_evals_acts_at_once(tmp_path: Path) -> None:
    pressed = [True, False, False]

    def build(config: object) -> object:
        def measure(sae: object, **services: object) -> dict[str, float]:
            if pressed.pop(0):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                raise AssertionError("not at once")
            return {"x": 1.0}

        return measure

    plugins = manager(None, fake_plugin("evals", "slow", build=build))
    config = fake_config(tmp_path, evals={"run": ["slow"], "every_n_steps": 0})
    with pytest.raises(TrainingInterrupted, match="interrupted after 11 steps") as caught:
        train(config, plugins=plugins)
    assert caught.value.signal == signal.SIGTERM, "which the command exits with 143 for"
    assert resume(tmp_path / "run", plugins=plugins).metrics["evals/x"] == 1


def test_a_finished_run(tmp_path: Path) -> None:
    result = train(fake_config(tmp_path))
    before = contents(result.folder)
    with pytest.raises(ConfigError) as caught:
        resume(result.folder)
    assert str(caught.value) == (
        f"the run in {result.folder} is finished. To train it longer, raise training.training_tokens and allow it: "
        f"saekit train --resume {result.folder} training.training_tokens=... --allow training.training_tokens"
    )
    assert contents(result.folder) == before


@pytest.mark.parametrize("source", ["live, ahead", "cached"])
def test_longer_training_is_as_if_it_had_been_so_from_the_start(tmp_path: Path, cache: Path, source: str) -> None:
    short: dict[str, Any] = {
        "training_tokens": 1024, "finetuning_tokens": 0, "finetuning_method": None, "lr_decay_steps": 0
    }  # fmt: skip
    sections = {"training": short, "evals": {"run": []}}
    config = fake_config(tmp_path, on_cache(source, cache), **sections) | {"lr_schedule": "constant"}
    run = train(config).folder
    longer = {"overrides": ["training.training_tokens=3000"], "allow": ["training.training_tokens"]}
    with pytest.raises(ConfigError, match="training.training_tokens: was 1024 when the run was saved, and is 3000 now"):
        resume(run, overrides=longer["overrides"])
    assert resume(run, **longer).metrics["details/n_training_tokens"] == 3000
    assert saekit.load_config(run / "config.toml", plugins=manager()).training.training_tokens == 3000
    config["checkpoints"]["name"] = "other"
    config["training"]["training_tokens"] = 3000
    whole = train(config).folder
    ours, theirs = contents(run), contents(whole)
    for path in ("metrics.jsonl", "sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors"):
        assert ours[path] == theirs[path]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)), "no line twice"
    with pytest.raises(ConfigError, match="is finished"):
        resume(run)


# ---- what may not change


def test_what_changed_is_named_and_refused(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    run, before = tmp_path / "run", contents(tmp_path / "run")
    changes = ["training.lr=1e-3", "sae.l1_coefficient=2.5", "trackers=[]", "training.finetuning_method=scale"]
    with pytest.raises(ConfigError) as caught:
        resume(run, overrides=changes)
    assert caught.value.problems == [
        (path, f"was {old!r} when the run was saved, and is {new!r} now; a run that goes on as it was cannot change "
         f"it. To change it all the same: --allow {path} (or allow=[{path!r}])")
        for path, old, new in [
            ("sae.l1_coefficient", 1.0, 2.5),
            ("training.finetuning_method", "unrotated_decoder", "scale"),
            ("training.lr", 4e-4, 1e-3),
        ]
    ]  # fmt: skip
    assert str(caught.value).startswith("the resumed run has 3 problems:\n  - sae.l1_coefficient: was 1.0")
    with pytest.raises(ConfigError) as caught:
        resume(run, overrides=changes, allow=["training.lr", "sae.l1_coefficient"])
    assert [path for path, _ in caught.value.problems] == ["training.finetuning_method"]
    for allow in (["training.lr"], ["training.lr", "dataset.contents"], ["model.weights"], ["nonsense"]):
        unneeded = [path for path in allow if path != "training.lr"] or ["training.lr"]
        given = changes[:1] if len(allow) > 1 else []
        with pytest.raises(ConfigError, match=f"allowed to change, but the same as before: {unneeded[0]}"):
            resume(run, overrides=given, allow=allow)
    assert contents(run) == before, "a refusal changes nothing"
    every = ["training.lr", "sae.l1_coefficient", "training.finetuning_method"]
    result = resume(run, overrides=changes, allow=every)
    assert result.metrics["details/current_l1_coefficient"] == 2.5
    config = saekit.load_config(run / "config.toml", plugins=manager())
    assert (config.training.lr, config.training.finetuning_method) == (1e-3, "scale")


def test_resumed_with_a_configuration_file(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    file = tmp_path / "run.toml"
    file.write_text((tmp_path / "run/config.toml").read_text().replace("test:fake", "fake"))
    with pressing(2), pytest.raises(TrainingInterrupted, match="after 5 steps"):
        resume(tmp_path / "run", cfg=file)
    file.write_text(re.sub(r"(?m)^seed = 5$", "seed = 6", file.read_text()))
    with pytest.raises(ConfigError, match="training.seed: was 5 when the run was saved, and is 6 now"):
        resume(tmp_path / "run", cfg=file)
    with pytest.raises(ConfigError, match="seed: was 5 .* and is 7 now"):
        resume(tmp_path / "run", cfg=file, overrides=["training.seed=7"])
    assert resume(tmp_path / "run", cfg=file, overrides=["training.seed=5"]).metrics["evals/l0"] > 0


def test_one_configuration_cannot_replace_those_of_a_sweep(tmp_path: Path) -> None:
    configs = saekit.grid(fake_config(tmp_path), {"training.seed": [1, 2]}, plugins=manager())
    stopped(configs, 5)
    with pytest.raises(ConfigError, match="run is a sweep of 2 SAEs, so one configuration cannot take the place"):
        resume(tmp_path / "run", cfg=fake_config(tmp_path))
    with pytest.raises(ConfigError, match="training.lr: was 0.0004 when the run was saved, and is 0.001 now"):
        resume(tmp_path / "run", overrides=["training.lr=1e-3"])
    result = resume(tmp_path / "run", overrides=["training.lr=1e-3"], allow=["training.lr"])
    assert {row["training.seed"] for row in result.summary} == {1, 2}


def test_another_text_is_noticed(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    for other in (caches.DOCUMENTS[:-1], [{"text": "import this " * 40}, *caches.DOCUMENTS[1:]]):
        with pytest.raises(ConfigError, match=r"^dataset.contents: was '60 documents, beginning \w+' when the run was"):
            resume(tmp_path / "run", dataset=other)
        with pytest.raises(ConfigError, match="the same as before: dataset.path"):
            resume(tmp_path / "run", dataset=other, allow=["dataset.contents", "dataset.path"])
    resume(tmp_path / "run", dataset=other, allow=["dataset.contents"])


def test_another_model_is_noticed(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evals={"run": []})
    del config["model"]
    options = {"plugins": saekit.default_manager()}
    stopped(config, 3, model=hooked_transformer(), **options)
    other = hooked_transformer(seed=1)
    with pytest.raises(ConfigError, match="^model.weights: was '.*' when the run was saved, and is '.*' now"):
        resume(tmp_path / "run", model=other, **options)
    with pytest.raises(ConfigError, match="allowed to change, but the same as before: model.weights"):
        resume(tmp_path / "run", model=hooked_transformer(), allow=["model.weights"], **options)
    resume(tmp_path / "run", model=other, allow=["model.weights"], **options)


def test_a_tokenizer_that_changed_can_be_allowed(tmp_path: Path) -> None:
    """Not the configuration, but what it means, is another."""
    stopped(fake_config(tmp_path), 3)
    other = FakeBackend()
    other.special_tokens = {"bos": 1, "eos": None, "sep": None}
    for path, allow in (("begin_batch_token", []), ("sequence_separator_token", ["begin_batch_token"])):
        with pytest.raises(ConfigError, match=rf"dataset.{path}: was 0 when the run was saved, and is 1 now"):
            resume(tmp_path / "run", plugins=manager(other), allow=[f"dataset.{name}" for name in allow])
    allow = ["dataset.begin_batch_token", "dataset.sequence_separator_token"]
    resume(tmp_path / "run", plugins=manager(other), allow=allow)


def test_what_came_from_memory_has_to_come_again(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evals={"run": []})
    del config["model"]
    model, options = hooked_transformer(), {"plugins": saekit.default_manager()}
    stopped(config, 3, model=model, **options)
    run = tmp_path / "run"
    missing = {"model": model, "dataset": caches.DOCUMENTS}
    for given, told in (
        ({}, "a model and a dataset from memory; pass model=... and dataset=... to saekit.resume again"),
        ({"model": model}, "a dataset from memory; pass dataset=... to"),
        ({"dataset": caches.DOCUMENTS}, "a model from memory; pass model=... to"),
    ):
        with pytest.raises(ConfigError, match=f"run was started with {re.escape(told)}"):
            resume(run, **({"model": None, "dataset": None} | given), **options)
    assert resume(run, **missing, **options).metrics["details/n_training_tokens"] == 2700


# ---- what cannot be resumed


def test_what_is_not_a_run_folder(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    for folder, told in (
        (tmp_path / "nowhere", r"there is no folder .*nowhere; a run prints the name of its folder when it ends$"),
        (tmp_path, r"is not a run folder: there is no run.json in it. It holds the runs run\."),
        (tmp_path / "run/checkpoints/step-3", r"step-3 is not a run folder"),
    ):
        with pytest.raises(StorageError, match=told):
            resume(folder)
    record = tmp_path / "run/run.json"
    for text, told in (
        ("{", "run.json cannot be read: JSONDecodeError"),
        ("[]", "cannot be read: TypeError"),
        ("{}", "cannot be read: KeyError 'format'"),
        ('{"format": 1, "saes": 3, "in_memory": []}', "cannot be read: AttributeError"),
        ('{"format": 2}', "run.json has format 2, expected 1: update saekit to go on"),
    ):
        record.write_text(text)
        with pytest.raises(StorageError, match=told):
            resume(tmp_path / "run")


def test_stopped_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins anew and says so, as a job that is always started with --resume needs; the metrics begin anew too."""
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    with contextlib.chdir(tmp_path / "whole"):
        train(fake_config(Path("runs")))
    with contextlib.chdir(tmp_path / "part"):
        with monkeypatch.context() as patch:
            patch.setattr(Saving, "save", lambda *arguments, **options: None)  # as good as killed
            with pytest.raises(TrainingInterrupted):
                stopped(fake_config(Path("runs")), 4)
                raise TrainingInterrupted(0, 0, None, Path())
        assert len(Path("runs/run/metrics.jsonl").read_text().splitlines()) == 4
        with pytest.raises(ConfigError, match="training.lr: was"):
            resume(Path("runs/run"), overrides=["training.lr=1"])
        with pytest.warns(RuntimeWarning) as caught:
            resume(Path("runs/run"))
        assert [str(w.message) for w in caught] == [
            "the run in runs/run was stopped before its first checkpoint; it begins anew"
        ]
    assert contents(tmp_path / "part/runs/run") == contents(tmp_path / "whole/runs/run")


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    """A run that may not keep checkpoints, and one whose checkpoints were removed, are not begun anew unasked."""
    error = stopped(fake_config(tmp_path, checkpoints={"keep_last": 0, "name": "run"}), 4)
    assert error.checkpoint == tmp_path / "run/checkpoints/step-4"
    assert str(error) == (
        f"interrupted after 4 steps (1,024 tokens); the SAEs are saved in {error.checkpoint}, without what training "
        "needs; there is none to go on from"
    )
    assert saekit.SAE.load(error.checkpoint, plugins=manager()).d_sae == 64
    message = "there is no checkpoint to go on from in .*: the run was stopped before its first one, or had checkpoints"
    with pytest.raises(StorageError, match=message):
        resume(tmp_path / "run")
    done = train(fake_config(tmp_path, checkpoints={"keep_last": 0, "name": "done"}))
    assert not (done.folder / "checkpoints").exists()
    with pytest.raises(StorageError, match=message):
        resume(done.folder)
    other = train(fake_config(tmp_path, checkpoints={"name": "other"})).folder
    storage.remove_folder(other / "checkpoints")
    with pytest.raises(StorageError, match=message):
        resume(other)


def test_two_at_once(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    code = "import sys, time\nfrom pathlib import Path\nfrom saekit.files.storage import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match=r"another process is still training in .*run; end it first"):
        resume(tmp_path / "run")
    other.kill()
    other.communicate()
    resume(tmp_path / "run")


def test_a_run_folder_that_is_trained_in_is_locked(tmp_path: Path) -> None:
    tried = []

    def build(config: object) -> object:
        def measure(sae: object, **services: object) -> dict[str, float]:
            with pytest.raises(ConfigError, match="another process is still training in"):
                resume(tmp_path / "run")
            tried.append(True)
            return {}

        return measure

    plugins = manager(None, fake_plugin("evals", "nosy", build=build))
    train(fake_config(tmp_path, evals={"run": ["nosy"], "every_n_steps": 0}), plugins=plugins)
    assert tried


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    stopped(fake_config(tmp_path), 3)
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: exec("raise OSError(9, 'Bad file descriptor')"))
    resume(tmp_path / "run")


# ---- the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["saekit", "train", *map(str, arguments)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)  # of click's, in typer
        from saekit import cli

        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM, as a cluster sends it, ends with 143, and a resumed run with what an uninterrupted one leaves."""
    monkeypatch.chdir(tmp_path)
    sections = {section: dict(options) for section, options in EVERYTHING.items()}
    config = run_config(Path("runs"), **sections, checkpoints={"name": "run"})
    Path("run.toml").write_text(saekit.dump_config(saekit.load_config(config)))
    assert command(monkeypatch, "run.toml", "checkpoints.name=whole", "training.training_tokens=20000") == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "saekit.cli", "train", "run.toml", "training.training_tokens=20000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, deadline = Path("runs/run/metrics.jsonl"), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 5:
            break
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143, err
    found = re.fullmatch(
        r"interrupted after (\d+) steps \([\d,]+ tokens\); saved in (runs/run/checkpoints/step-\d+)\. "
        r"Go on with: saekit train --resume runs/run\n", err
    )  # fmt: skip
    assert found, err
    assert Path(found[2]).name == f"step-{found[1]}"
    capsys.readouterr()

    assert command(monkeypatch, "--resume", "runs") == 2
    assert (
        "error: runs is not a run folder: there is no run.json in it. It holds the runs run, whole."
        in capsys.readouterr().err
    )
    assert command(monkeypatch, "--resume", "runs/run", "training.lr=1") == 2
    assert "error: training.lr: was 0.0004 when the run was saved, and is 1.0 now;" in capsys.readouterr().err
    assert command(monkeypatch, "--resume", "runs/run", "--allow", "training.lr") == 2
    assert "error: allowed to change, but the same as before: training.lr" in capsys.readouterr().err
    assert command(monkeypatch, "--allow", "training.lr", "run.toml") == 2
    assert "--allow goes with --resume" in capsys.readouterr().err
    assert command(monkeypatch, "--resume", "runs/run") == 0
    assert "run folder: runs/run" in capsys.readouterr().out
    same = ("config.toml", f"checkpoints/step-{found[1]}/")
    assert without(contents(Path("runs/run")), *same) == without(contents(Path("runs/whole")), *same)
    assert command(monkeypatch, "--resume", "runs/run") == 2
    assert "error: the run in runs/run is finished. To train it longer," in capsys.readouterr().err
    longer = ("training.training_tokens=20500", "--allow", "training.training_tokens")
    assert command(monkeypatch, "--resume", "runs/run", *longer) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines[-1]["step"] == 83
    told = [(line["step"], "losses/mse_loss" in line) for line in lines]
    assert len(set(told)) == len(told), "no line twice"
