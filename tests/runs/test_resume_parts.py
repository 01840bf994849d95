"""What a run is made of goes on with it: random numbers, places in texts, fine-tuning, evals, sources."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from support import caches
from support.runs import LIVE, contents, fake_config, manager, pressing, resume, stopped, train, without
from torch import Tensor

import saekit
from saekit import Forward
from saekit.errors import ConfigError, PluginFailedError, TrainingInterrupted
from saekit.testing import FakeBackend, fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("method", ["scale", "decoder", "unrotated_decoder"])
def test_resumed_in_fine_tuning(tmp_path: Path, dtype: str, method: str) -> None:
    sections = {
        "sae": {"dtype": dtype, "apply_b_dec_to_input": method != "decoder"},
        "training": {"finetuning_method": method},
        "activations": {"normalize_activations": "none"},
    }
    assert_the_same(tmp_path, [9, 10], **sections)


@pytest.mark.parametrize("transform", ["layer_norm", "whitening"])
def test_resumed_with_an_input_transform(tmp_path: Path, transform: str) -> None:
    """Whether rows are normalized, or a map of all of them was estimated at the start."""
    sections = {"sae": {"normalize_sae_decoder": False}, "activations": {"normalize_activations": transform}}
    assert_the_same(tmp_path, [2, 6], **sections)


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

    def build(config: object, *, run: object) -> object:
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
        path.write_text("".join(f"{n} = {document['text']}\n" for n, document in enumerate(caches.DOCUMENTS[:30])))
    elif kind == "jsonl":
        datasets.Dataset.from_list(caches.DOCUMENTS[:30]).to_json(path)
    else:
        tokens = kind == "parquet of tokens"
        rows = [{"tokens": [1 + n % 100, 2, 3] * (n % 20)} for n in range(35)] if tokens else caches.DOCUMENTS[:30]
        datasets.Dataset.from_list(rows).to_parquet(path, batch_size=7)
    options: dict[str, Any] = {"dataset": None}
    dataset = {"path": str(path), "context_size": caches.SIZE, "on_exhausted": "repeat"}
    training = {"training_tokens": 3000, "finetuning_tokens": 700}
    sections = {"dataset": dataset, "training": training, "evals": {"run": [], "n_contexts": 4}}
    # datasets does not write the same position in the same way after it was loaded.
    unlike = ["stream.json", "checkpoint.json"] if "parquet" in kind else []
    assert_the_same(tmp_path, [1, 5, 10], options, options, unlike, **sections)


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
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            if len(tokens) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().run(tokens, **options)

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

        def build(config: object, *, run: object) -> object:
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
        (lambda: saekit.grid(fake_config(Path("runs"), **sections), axes, plugins=plugins(None)), [11]),
    ):
        whole = tmp_path / f"whole {fails[-1]}"
        whole.mkdir()
        with contextlib.chdir(whole):
            train(configs(), plugins=plugins(None))
        for fail_at in fails:
            folder = tmp_path / f"{fails[-1]} {fail_at}"
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

        def run(self, tokens: Tensor, **options: Any) -> Forward:
            if len(tokens) == 4:
                self.left -= 1
                if self.left == -1:
                    raise OSError("the network drive is gone")
            return super().run(tokens, **options)

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


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_every_optimizer_goes_on_bit_by_bit(tmp_path: Path, optimizer: str) -> None:
    """``b_dec`` and the rest, in fine-tuning, too, where some parameters stop."""
    chosen = {"optimizer": {"name": optimizer}}
    with contextlib.chdir(tmp_path):
        whole = train(fake_config(Path("whole"), **chosen))
        for step in (3, 9):
            stopped(fake_config(Path(f"runs{step}"), **chosen), step)
            resumed = resume(Path(f"runs{step}/run"))
            assert resumed.metrics == whole.metrics
            assert all(torch.equal(a, b) for a, b in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True))
