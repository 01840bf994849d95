"""Many SAEs on one stream: each as if it were alone, by one run of the model."""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.caches import DOCUMENTS as CACHED
from support.caches import cache, with_options
from support.caches import config as cached_config
from support.sweeps import DOCUMENTS, Changes, CountingBackend, as_csv, changed, fake, kept, manager, train
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit import SAE
from saekit.data.shared import SharedForwards
from saekit.errors import DivergedError, TrainingInterrupted
from saekit.runs import session
from saekit.testing import fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread", "way")


def assert_as_alone(configs: Sequence[Mapping[str, Any]], folder: Path, **options: Any) -> saekit.SweepResult:
    """Train ``configs`` together and each alone: the same bytes."""
    together = train(
        [changed(config, {"checkpoints": {"folder": str(folder / "all")}}) for config in configs], **options
    )
    for config, (name, result) in zip(configs, together.results.items(), strict=True):
        alone = train(changed(config, {"checkpoints": {"folder": str(folder / "one")}}), **options)
        assert kept(result.folder) == kept(alone.folder), name
        assert result.metrics == alone.metrics, name
        for one, other in zip(result.sae.parameters(), alone.sae.parameters(), strict=True):
            assert torch.equal(one, other), name
    return together


VARIANTS: dict[str, Changes] = {
    "plain": {},
    "penalty": {"sae": {"l1_coefficient": 1.0}},
    "learning rate": {"training": {"lr": 3e-3}},
    "schedule": {"lr_schedule": {"name": "cosine"}, "training": {"lr_warm_up_steps": 2, "lr_decay_steps": 2}},
    "width": {"sae": {"d_sae": 20}},
    "hook": {"site": {"hook_name": "blocks.1.hook_resid_post"}},
    "one head": {"site": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}},
    "all heads": {"site": {"hook_name": "blocks.0.attn.hook_z"}},
    "seed": {"training": {"seed": 7}},
    "seed and hook": {"training": {"seed": 7}, "site": {"hook_name": "blocks.1.hook_resid_post"}},
    "batch size": {"training": {"train_batch_size_tokens": 130}},
    "fewer tokens": {"training": {"training_tokens": 450}},
    "more tokens": {"training": {"training_tokens": 1900}},
    "fine-tuning": {"training": {"finetuning_tokens": 500, "finetuning_method": "scale"}},
    "normalized": {"activations": {"normalize_activations": "expected_average_only_in"}},
    "mean": {"sae": {"b_dec_init_method": "mean"}},
    "median": {"sae": {"b_dec_init_method": "geometric_median"}, "training": {"seed": 7}},
    "noise": {"sae": {"noise_scale": 0.3}},
    "ghosts": {
        "sae": {"use_ghost_grads": True, "l1_coefficient": 20.0},
        "training": {"dead_feature_window": 1, "feature_sampling_window": 3},
    },
    "activation": {"sae": {"activation": "tanh-relu"}},
    "architecture": {"sae": {"name": "test:gain", "d_sae": 12}},
    "architecture and seed": {"sae": {"name": "test:gain", "d_sae": 12}, "training": {"seed": 7}},
    "double": {"sae": {"dtype": "float64"}},
    "autocast": {"training": {"autocast": True}},
    "optimizer": {"optimizer": {"beta1": 0.9, "clip_grad_norm": 0.1}},
    "more evals": {"evals": {"every_n_steps": 2, "n_contexts": 3}},
    "no evals": {"evals": {"run": []}},
    "fewer lines": {"training": {"log_frequency": 3}},
}
SAME_WEIGHTS = {"plain", "more evals", "no evals", "fewer lines"}
OTHER_SOURCES: dict[str, Changes] = {
    "larger buffer": {"activations": {"source": {"name": "live", "n_batches_in_buffer": 8}}},
    "larger forwards": {"activations": {"source": {"name": "live", "store_batch_size_prompts": 11}}},
    "half the digits": {"activations": {"source": {"name": "live", "dtype": "bfloat16"}}},
}


OF_STEPS = (
    "plain", "penalty", "all heads", "seed", "schedule", "fine-tuning", "normalized", "median", "noise", "ghosts",
    "activation", "architecture and seed", "double", "autocast", "optimizer", "more evals",
)  # fmt: skip
"""Those by which steps are others; how a step is made has no part in what is read, logged and measured."""


@pytest.mark.parametrize("prefetch", [False, True])
def test_each_ends_as_if_it_were_alone(tmp_path: Path, prefetch: bool, way: str) -> None:
    chosen = [*VARIANTS] if way == "fast" else [*OF_STEPS]
    variants = {name: VARIANTS[name] for name in (chosen[::3] if prefetch else chosen)}
    for name, changes in OTHER_SOURCES.items() if way == "fast" else ():
        changes["activations"]["source"].setdefault("n_batches_in_buffer", 4)
        variants[name] = changes
    configs = []
    for changes in variants.values():
        config = changed(fake(tmp_path, training={"training_tokens": 1100}), changes)
        config["activations"]["source"]["prefetch"] = prefetch
        configs.append(config)
    result = assert_as_alone(configs, tmp_path)
    weights = [kept(found.folder)["sae_weights.safetensors"] for found in result.results.values()]
    plain = {name for name, own in zip(variants, weights, strict=True) if own == weights[0]}
    assert plain == SAME_WEIGHTS & set(variants), "every other variant makes a difference"
    lanes = {len(found.metrics) for found in result.results.values()}
    assert len(lanes) > 1, "evals and architectures have metrics of their own"


def test_each_ends_as_if_it_were_alone_on_cached_activations(tmp_path: Path, way: str) -> None:
    base = cached_config(
        tmp_path, sae={"d_sae": 12}, training={"training_tokens": 1100, "train_batch_size_tokens": 200}
    )
    cache(base)
    place = base["activations"]["cache"]["folder"]
    other_sources = {
        "blocks": {"activations": {"source": {"name": "cached", "folder": place, "block_rows": 4}}},
        "no thread": {"activations": {"source": {"name": "cached", "folder": place, "prefetch": False}}},
        "live": {"activations": {"source": {"name": "live", "n_batches_in_buffer": 8}}},
    }
    chosen = ("plain", "hook", "one head", "seed and hook", "batch size", "fewer tokens", "fine-tuning", "normalized",
              "median", "architecture and seed")  # fmt: skip
    variants: dict[str, Changes] = {name: VARIANTS[name] for name in chosen if way == "fast" or name in OF_STEPS}
    configs = [changed(base, changes) for changes in (variants | other_sources).values()]
    assert_as_alone(configs, tmp_path, dataset=CACHED)


@pytest.mark.usefixtures("several_threads")
def test_each_ends_as_if_it_were_alone_on_a_real_model(tmp_path: Path) -> None:
    variants: list[Changes] = [
        {},
        {"site": {"hook_name": "blocks.1.hook_resid_post"}, "sae": {"d_sae": 96}},
        {"site": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}, "sae": {"noise_scale": 0.1}},
        {"training": {"seed": 3, "training_tokens": 700}},
        {"training": {"seed": 3}, "sae": {"b_dec_init_method": "mean"}, "site": {"hook_name": "blocks.0.hook_mlp_out"}},
    ]
    configs = [changed(run_config(tmp_path, training={"training_tokens": 1000}), changes) for changes in variants]
    assert_as_alone(configs, tmp_path, plugins=saekit.default_manager(), dataset=None)


# ---- one run of the model


def counting(folder: Path, variants: Sequence[Changes], *, prefetch: bool = False) -> tuple[list[dict[str, Any]], Any]:
    """Configurations without evals, and a function that trains some and gives the forwards."""
    configs = [changed(fake(folder, evals={"run": []}), changes) for changes in variants]
    for config in configs:
        config["activations"]["source"] = config["activations"]["source"] | {"prefetch": prefetch}

    def forwards(what: Any) -> list[bytes]:
        backend = CountingBackend()
        train(what, manager(backend))
        return backend.seen

    return configs, forwards


def test_the_model_runs_as_often_as_for_the_one_that_needs_it_most(tmp_path: Path) -> None:
    last = {"hook_name": "blocks.1.hook_resid_post"}
    configs, forwards = counting(
        tmp_path,
        [
            {},
            {"site": last},
            {"training": {"seed": 2}},
            {"training": {"seed": 2, "training_tokens": 4000}, "site": last},
            {"training": {"train_batch_size_tokens": 130, "training_tokens": 900}},
            {"activations": {"source": {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 9}}},
        ],
    )
    alone = [forwards(config) for config in configs]
    assert len({len(found) for found in alone}) > 2
    together = forwards(configs)
    assert sorted(together) == sorted(max(alone, key=len))


def test_the_model_runs_once_with_threads_too(tmp_path: Path) -> None:
    variants: list[Changes] = [{"training": {"seed": seed, "training_tokens": 600 * seed}} for seed in (1, 2, 3, 4)]
    configs, forwards = counting(tmp_path, variants, prefetch=True)
    together = forwards(configs)
    assert len(together) >= 2400 / (8 * 16)
    assert max(Counter(together).values()) == 1


class Watched(SharedForwards):
    """Knows the most that it ever kept."""

    made: list[Watched] = []  # noqa: RUF012

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.most = 0
        self.made.append(self)

    def take(self, *arguments: Any) -> dict[str, Tensor]:
        found = super().take(*arguments)
        self.most = max(self.most, self.nbytes)
        return found


def watched(configs: Any, **options: Any) -> tuple[Watched, Any]:
    with mock.patch.object(session, "SharedForwards", Watched), mock.patch.object(Watched, "made", []):
        result = train(configs, **options)
        (shared,) = Watched.made
    return shared, result


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("ends", ["tokens", "divergence"])
def test_nothing_is_kept_for_a_lane_that_has_ended(tmp_path: Path, prefetch: bool, ends: str) -> None:
    early = {"training_tokens": 400} if ends == "tokens" else {"lr": 1e30}
    variants: list[Changes] = [
        {"training": {"seed": 1, "training_tokens": 9000}},
        {"training": {"seed": 2} | early, "sae": {"normalize_sae_decoder": False}},
    ]
    configs, _ = counting(tmp_path, variants, prefetch=prefetch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        shared, _ = watched(configs)
    forward = 8 * 16 * 8 * 4
    assert shared.nbytes == 0
    assert forward < shared.most <= 6 * forward, "a buffer of four, and what the threads make ahead"


def test_nothing_is_kept_for_a_source_that_reads_from_disk(tmp_path: Path) -> None:
    base = cached_config(tmp_path, training={"training_tokens": 4000, "train_batch_size_tokens": 200})
    cache(base)
    live = with_options(base, "activations", source={"name": "live", "n_batches_in_buffer": 4, "prefetch": False})
    shared, _ = watched([base, live], dataset=CACHED)
    assert shared.most == 0


def test_data_that_ends_ends_every_lane(tmp_path: Path) -> None:
    few = DOCUMENTS[:20]
    configs = [
        fake(tmp_path, dataset={"on_exhausted": "stop"}, training={"seed": seed, "training_tokens": 10**6})
        for seed in (1, 2)
    ]
    result = assert_as_alone(configs, tmp_path, dataset=few)
    assert len({row["tokens"] for row in result.summary}) == 1
    assert 0 < result.summary[0]["tokens"] < 10**4


def test_a_sweep_that_was_stopped_goes_on_as_if_it_never_had(tmp_path: Path) -> None:
    armed = False

    def build(config: object, *, run: object) -> object:
        def press(sae: SAE, **services: Any) -> dict[str, float]:
            if armed and sae.info.metadata["training_tokens"] == 800 and sae.info.metadata["seed"] == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return {"pressed": 1.0}

        return press

    def plugins() -> tuple[CountingBackend, saekit.PluginManager]:
        backend = CountingBackend()
        return backend, manager(backend, fake_plugin("evals", "key", build=build))

    def configs(folder: str) -> list[dict[str, Any]]:
        base = fake(tmp_path, checkpoints={"folder": str(tmp_path / folder), "name": "s"})
        seeds = [
            {"training": {"seed": seed, "training_tokens": tokens}} for seed, tokens in ((1, 1500), (2, 1800), (3, 400))
        ]
        evals = {"evals": {"run": ["key"], "every_n_steps": 2}}
        return [changed(changed(base, evals), changes) for changes in seeds]

    whole = train(configs("whole"), plugins()[1])
    armed = True
    with pytest.raises(TrainingInterrupted):
        train(configs("parts"), plugins()[1])
    armed = False
    backend, others = plugins()
    with mock.patch.object(session, "SharedForwards", Watched), mock.patch.object(Watched, "made", []):
        resumed = saekit.resume(tmp_path / "parts/s", plugins=others, dataset=DOCUMENTS)
        (shared,) = Watched.made
    assert [kept(found.folder) for found in resumed.results.values()] == [
        kept(found.folder) for found in whole.results.values()
    ]
    assert resumed.summary == whole.summary
    assert (resumed.folder / "summary.csv").read_bytes() == (whole.folder / "summary.csv").read_bytes()
    assert max(Counter(backend.seen).values()) == 1
    assert shared.nbytes == 0, "the third had ended before"


# ---- SAEs that diverge


def diverging(folder: Path) -> list[dict[str, Any]]:
    base = fake(folder, sae={"normalize_sae_decoder": False})
    return [
        changed(base, {"training": training}) for training in ({}, {"lr": 1e30}, {"seed": 2, "lr": 1e30}, {"seed": 2})
    ]


def test_one_that_diverges_is_stopped_and_the_others_go_on(tmp_path: Path) -> None:
    configs = diverging(tmp_path)
    with pytest.warns(RuntimeWarning) as caught:
        result = train(configs)
    names = ["0_lr=0.01_seed=42", "1_lr=1e+30_seed=42", "2_lr=1e+30_seed=2", "3_lr=0.01_seed=2"]
    bad, good = names[1:3], [names[0], names[3]]
    assert [row["name"] for row in result.summary] == names
    assert list(result.results) == good
    assert list(result.diverged) == bad
    told = sorted(str(one.message) for one in caught if "worse than the mean" not in str(one.message))
    assert len(told) == 2
    for name, text in zip(bad, told, strict=True):
        why = result.diverged[name]
        assert text == f"{name} is stopped: {why}"
        assert "the loss of blocks.0.hook_resid_post is " in why
        assert "at step 2 (learning rate 1e+30, 200 activations of mean norm " in why
        assert "Lower training.lr" in why
        assert not (result.folder / name / "sae").exists()
        assert (result.folder / name / "metrics.jsonl").read_text().count("\n") == 1
    for name, config in zip(good, (configs[0], configs[3]), strict=True):
        alone = train(changed(config, {"checkpoints": {"folder": str(tmp_path / "alone")}}))
        assert kept(result.folder / name) == kept(alone.folder)
    rows = as_csv(result.folder)
    assert [row["status"] for row in rows] == ["trained", "diverged", "diverged", "trained"]
    assert [row["l0"] == "" for row in rows] == [False, True, True, False]
    assert [int(row["tokens"]) for row in rows] == [1500, 400, 400, 1500]


def test_when_all_diverge(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="is stopped"), pytest.raises(DivergedError) as caught:
        train(diverging(tmp_path)[1:3])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("0_seed=42: the loss of ")
    assert lines[1].startswith("1_seed=2: the loss of ")
    assert caught.value.exit_code == 1
