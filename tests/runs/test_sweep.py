"""Many SAEs on one stream: which, under what names, each as if it were alone, and what is said of them at the end."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.sources.live import LiveConfig
from support.caches import DOCUMENTS as CACHED
from support.caches import cache, with_options
from support.caches import config as cached_config
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit.analysis.sweep import plot_sweep
from saekit.config.files import dump_config, parse_grid
from saekit.data.shared import SharedForwards
from saekit.errors import ConfigError, DivergedError, TrainingInterrupted
from saekit.runs import session
from saekit.runs.summary import summary_table
from saekit.runs.sweep import changed_options, member_names, short_names
from saekit.sae import SAE, StepInput, StepOutput
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

DOCUMENTS = [{"text": "".join(f"value_{n}_{k} = {n * k}\n" for k in range(n % 7 + 12))} for n in range(150)]
Changes = Mapping[str, Mapping[str, Any]]
NOW = "seconds"  # what a line of metrics says of the clock


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Matrices of a tiny model are slower with two, and much slower where others want the cores."""
    threads = torch.get_num_threads()
    if "real_model" not in request.node.name:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- runs on a model that is not the point


@attrs.frozen(kw_only=True)
class GainConfig(saekit.SAEConfig):
    """An architecture with a tensor of its own, which draws in every step."""

    penalty: float = 0.1
    """Weight of the sum of activations."""


class GainSAE(SAE):
    def __init__(self, config: Any, *, d_in: int, activation: Any) -> None:
        super().__init__(config, d_in=d_in, activation=activation)
        self.gain = torch.nn.Parameter(torch.rand(self.d_sae))  # of the process's random numbers, as torch's own are

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * self.gain

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        features = self.activation(self.pre_activations(x)) * self.gain
        kept = torch.rand(features.shape, generator=step.generator) < 0.9
        output = self.reconstruction(features * kept)
        loss = (output - x).pow(2).sum(-1).mean() + self.config.penalty * features.sum(-1).mean()
        return StepOutput(loss, {"mse_loss": loss.detach()}, output.detach(), (features > 0).sum(0))


class CountingBackend(FakeBackend):
    """Remembers the tokens of each forward, but for the short ones that only find widths."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
        if len(tokens) > 1:
            self.seen.append(tokens.numpy().tobytes())
        return super().activations(tokens, hooks)


def manager(backend: FakeBackend | None = None, *others: object) -> saekit.PluginManager:
    used = backend or FakeBackend()
    return isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: used),
        fake_plugin("sae_architectures", "gain", build=GainSAE, config=GainConfig),
        *others,
        builtins=True,
    )


def changed(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Options of some sections changed; another plugin comes without the options of the one before."""
    merged = {name: dict(options) for name, options in config.items()}
    for section, options in changes.items():
        old = merged.get(section, {})
        other = section in ("sae", "lr_schedule") and options.get("name", old.get("name")) != old.get("name")
        merged[section] = dict(options) if other else old | dict(options)
    return merged


def fake(folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    base = run_config(
        folder,
        model={"backend": "test:fake"},
        dataset={"context_size": 16},
        site={"hook_name": "blocks.0.hook_resid_post"},
        sae={"name": "standard", "d_sae": 12, "l1_coefficient": 0.1},
        training={"training_tokens": 1500, "train_batch_size_tokens": 200, "lr": 0.01},
        evals={"n_contexts": 2, "split": None, "held_out_every": 10},
    )
    return changed(base, sections)


def train(configs: Any, plugins: saekit.PluginManager | None = None, dataset: Any = DOCUMENTS) -> Any:
    return saekit.train(configs, plugins=plugins or manager(), dataset=dataset)


def kept(home: Path) -> dict[str, str]:
    """Every file of the SAE, and the metrics, as checksums."""
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert lines
    metrics = json.dumps([{name: value for name, value in line.items() if name != NOW} for line in lines])
    files = {path.name: path.read_bytes() for path in sorted((home / "sae").iterdir())}
    assert len(files) == 3
    found = files | {"metrics.jsonl": metrics.encode()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def as_csv(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


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


@pytest.mark.parametrize("prefetch", [False, True])
def test_each_ends_as_if_it_were_alone(tmp_path: Path, prefetch: bool) -> None:
    variants = dict(VARIANTS if not prefetch else list(VARIANTS.items())[::3])
    for name, changes in OTHER_SOURCES.items():
        changes["activations"]["source"].setdefault("n_batches_in_buffer", 4)
        variants[name] = changes
    configs = []
    for changes in variants.values():
        config = changed(fake(tmp_path), changes)
        config["activations"]["source"]["prefetch"] = prefetch
        configs.append(config)
    result = assert_as_alone(configs, tmp_path)
    weights = [kept(found.folder)["sae_weights.safetensors"] for found in result.results.values()]
    plain = {name for name, own in zip(variants, weights, strict=True) if own == weights[0]}
    assert plain == SAME_WEIGHTS & set(variants), "every other variant makes a difference"
    lanes = {len(found.metrics) for found in result.results.values()}
    assert len(lanes) > 1, "evals and architectures have metrics of their own"


def test_each_ends_as_if_it_were_alone_on_cached_activations(tmp_path: Path) -> None:
    base = cached_config(
        tmp_path, sae={"d_sae": 12}, training={"training_tokens": 1500, "train_batch_size_tokens": 200}
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
    configs = [
        changed(base, changes) for changes in ({name: VARIANTS[name] for name in chosen} | other_sources).values()
    ]
    assert_as_alone(configs, tmp_path, dataset=CACHED)


def test_each_ends_as_if_it_were_alone_on_a_real_model(tmp_path: Path) -> None:
    variants: list[Changes] = [
        {},
        {"site": {"hook_name": "blocks.1.hook_resid_post"}, "sae": {"d_sae": 96}},
        {"site": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}, "sae": {"noise_scale": 0.1}},
        {"training": {"seed": 3, "training_tokens": 1200}},
        {"training": {"seed": 3}, "sae": {"b_dec_init_method": "mean"}, "site": {"hook_name": "blocks.0.hook_mlp_out"}},
    ]
    configs = [changed(run_config(tmp_path, training={"training_tokens": 1500}), changes) for changes in variants]
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

    def build(config: object) -> object:
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
    told = sorted(str(warning.message) for warning in caught)
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


# ---- what a grid is


def test_the_last_axis_of_a_grid_changes_fastest() -> None:
    axes = {"sae.l1_coefficient": [1, 5], "training.lr": [1e-4, 3e-4, 1e-3], "training.seed": range(2)}
    found = [(c.sae.options.l1_coefficient, c.training.lr, c.training.seed) for c in saekit.grid({}, axes)]
    assert found == [(l1, lr, seed) for l1 in (1.0, 5.0) for lr in (1e-4, 3e-4, 1e-3) for seed in (0, 1)]
    assert saekit.grid({}, {}) == [saekit.load_config({})]


@given(
    widths=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    rates=st.lists(st.floats(1e-9, 1.0, exclude_min=True), min_size=1, max_size=3),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
def test_a_grid_is_the_product_of_its_axes(widths: list[int], rates: list[float], seeds: list[int]) -> None:
    base = saekit.load_config({"training": {"verbose": False}, "sae": {"l1_coefficient": 2.0, "name": "standard"}})
    configs = saekit.grid(base, {"sae.d_sae": widths, "training.lr": rates, "training.seed": seeds})
    assert len(configs) == len(widths) * len(rates) * len(seeds)
    for index, config in enumerate(configs):
        rest, seed = divmod(index, len(seeds))
        width, rate = divmod(rest, len(rates))
        point = {"lr": rates[rate], "seed": seeds[seed]}
        assert config == attrs.evolve(
            base, sae=attrs.evolve(base.sae.options, d_sae=widths[width]), training=attrs.evolve(base.training, **point)
        )


def test_a_grid_starts_from_a_file_a_dict_or_a_config(tmp_path: Path) -> None:
    table = {"training": {"seed": 3}, "sae": {"name": "standard", "l1_coefficient": 2.0, "d_sae": 32}}
    config = saekit.load_config(table)
    (tmp_path / "run.toml").write_text(dump_config(config))
    axes = {"sae.d_sae": [64, 128]}
    expected = [attrs.evolve(config, sae=attrs.evolve(config.sae.options, d_sae=width)) for width in (64, 128)]
    for base in (table, config, tmp_path / "run.toml", str(tmp_path / "run.toml")):
        assert saekit.grid(base, axes) == expected
    assert table["sae"]["d_sae"] == 32, "what was passed stays as it was"


def test_plugins_and_their_options_are_axes() -> None:
    schedules = ["constant", {"name": "cosine", "end": 1e-5}, CosineConfig(end=2e-5)]
    found = [config.lr_schedule for config in saekit.grid({}, {"lr_schedule": schedules})]
    assert found == ["saekit:constant", CosineConfig(end=1e-5), CosineConfig(end=2e-5)]
    assert schedules[1] == {"name": "cosine", "end": 1e-5}

    ends = [
        c.lr_schedule.options.end for c in saekit.grid({"lr_schedule": "cosine"}, {"lr_schedule.end": [1e-6, 1e-5]})
    ]
    assert ends == [1e-6, 1e-5]
    sources = saekit.grid(
        {}, {"activations.source.n_batches_in_buffer": [8, 16], "sae.activation": ["relu", "tanh-relu"]}
    )
    assert [config.activations.source for config in sources] == [
        LiveConfig(n_batches_in_buffer=n) for n in (8, 8, 16, 16)
    ]
    assert [config.sae.options.activation for config in sources] == ["saekit:relu", "saekit:tanh-relu"] * 2


@pytest.mark.parametrize("base", [StandardConfig(d_sae=8), {"name": "standard", "d_sae": 8}])
def test_options_of_a_plugin_that_is_an_object(base: Any) -> None:
    found = [config.sae for config in saekit.grid({"sae": base}, {"sae.l1_coefficient": [1, 2]})]
    assert found == [StandardConfig(d_sae=8, l1_coefficient=1.0), StandardConfig(d_sae=8, l1_coefficient=2.0)]


@pytest.mark.parametrize("plugin_first", [True, False])
def test_a_plugin_and_its_options_as_axes_in_any_order(plugin_first: bool) -> None:
    table = {"name": "standard", "d_sae": 8}
    axes = [("sae", [table, StandardConfig(d_sae=16)]), ("sae.l1_coefficient", [1.0, 2.0])]
    found = [
        (c.sae.options.d_sae, c.sae.options.l1_coefficient)
        for c in saekit.grid({}, dict(axes if plugin_first else axes[::-1]))
    ]
    expected = [(8, 1.0), (8, 2.0), (16, 1.0), (16, 2.0)]
    assert found == (expected if plugin_first else [expected[n] for n in (0, 2, 1, 3)])
    assert table == {"name": "standard", "d_sae": 8}, "what was passed stays as it was"


def test_axes_are_whatever_holds_several_values() -> None:
    for axis in ((1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (float(n) for n in (1, 2)), [1, 2]):
        assert [config.sae.options.l1_coefficient for config in saekit.grid({}, {"sae.l1_coefficient": axis})] == [
            1.0,
            2.0,
        ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"training.lr": []}, r"training.lr: an axis of a grid needs a list of values, found \[\]"),
        ({"training.lr": 1e-4}, "training.lr: an axis of a grid needs a list of values, found 0.0001"),
        ({"lr_schedule": "cosine"}, "lr_schedule: an axis of a grid needs a list of values, found 'cosine'"),
        ({"lr_schedule": {"name": "cosine"}}, "lr_schedule: an axis of a grid needs a list"),
        ({"training.l": [1e-4]}, "training.l: is not an option. Did you mean 'lr'"),
        ({"trainnig.lr": [1e-4]}, "trainnig: is not an option. Did you mean 'training'"),
        ({"sae.l1_coeficient": [1]}, "sae.l1_coeficient: is not an option. Did you mean 'l1_coefficient'"),
        ({"lr_schedule": ["cosin"]}, "Did you mean 'cosine'"),
        ({"training.lr": [1e-4, "fast"]}, "training.lr: expected a number, found 'fast'"),
        ({"training.lr": [1e-4, -1.0]}, "training.lr: must be above 0, found -1.0"),
        ({"training.lr.x": [1]}, "lr is 0.0004, which has no options to set"),
    ],
    ids=str,
)
def test_bad_axes(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        saekit.grid(saekit.load_config({}), axes)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("sae.l1_coefficient=1,5", [1, 5]),
        ("training.lr=1e-4,3e-4", [1e-4, 3e-4]),
        ("training.lr = 1e-4 , 3e-4", [1e-4, 3e-4]),
        ("training.lr=[1e-4, 3e-4]", [1e-4, 3e-4]),
        ("sae.activation=relu,tanh-relu", ["relu", "tanh-relu"]),
        ("training.autocast=true,false", [True, False]),
        ("sae.activation=relu", ["relu"]),
        ('site.hook_name="a,b",c', ["a,b", "c"]),
        ("site.hook_name='a,b','c'", ["a,b", "c"]),
        ('evals.run=[["reconstruction"], []]', [["reconstruction"], []]),
        ('evals.run=["reconstruction"],[]', [["reconstruction"], []]),
        ('lr_schedule={name = "cosine", end = 1e-5},constant', [{"name": "cosine", "end": 1e-5}, "constant"]),
        ("a.b=x=1,y=2", ["x=1", "y=2"]),
    ],
)
def test_axes_on_the_command_line(text: str, values: list[Any]) -> None:
    path = text.partition("=")[0].strip()
    assert parse_grid([text]) == {path: values}
    assert [type(value) for value in parse_grid([text])[path]] == [type(value) for value in values]


@given(values=st.lists(st.one_of(st.integers(-(10**9), 10**9), st.booleans(), st.floats(1e-12, 1e12)), min_size=1))
def test_numbers_on_the_command_line(values: list[float]) -> None:
    text = ",".join(json.dumps(value) for value in values)
    assert parse_grid([f"a.b={text}", "c.d=1"]) == {"a.b": values, "c.d": [1]}
    assert parse_grid([f"a.b=[{text}]"]) == {"a.b": values}


@given(
    values=st.lists(
        st.text(
            st.characters(codec="ascii", exclude_characters='"\\', min_codepoint=32, max_codepoint=126), max_size=9
        ),
        min_size=1,
    )
)
def test_texts_in_quotes_on_the_command_line(values: list[str]) -> None:
    assert parse_grid(["a.b=" + ",".join(f'"{value}"' for value in values)]) == {"a.b": values}


@pytest.mark.parametrize("text", ["lr", "=1,2", "training..lr=1", "training.lr=", "training.lr= "])
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an axis of a grid; write section.option=value,value"):
        parse_grid([text])


def test_an_axis_twice() -> None:
    with pytest.raises(ConfigError, match="training.lr: is an axis of the grid twice"):
        parse_grid(["training.lr=1e-4", "sae.d_sae=8", "training.lr=3e-4"])


# ---- what can be together, and under what names


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"model": {"dtype": "bfloat16"}}, {}, {"model.dtype"}),
        ({"model": {"name": "x", "autocast": True}}, {}, {"model.name", "model.autocast"}),
        ({"model": {"backend": "test:fake"}}, {"model": {"backend": "HookedTransformer"}}, {"model.backend"}),
        ({"dataset": {"path": "x"}}, {}, {"dataset.path"}),
        ({"dataset": {"context_size": 8}}, {}, {"dataset.context_size"}),
        ({"evals": {"split": "heldout"}}, {}, {"evals.split"}),
        ({"evals": {"held_out_every": 5}}, {}, {"evals.held_out_every"}),
        ({"checkpoints": {"n_checkpoints": 3}}, {}, {"checkpoints.n_checkpoints"}),
        ({"checkpoints": {"folder": "elsewhere"}}, {}, {"checkpoints.folder"}),
    ],
    ids=lambda value: str(sorted(value)),  # sets have no order of their own
)
def test_what_cannot_be_together_is_refused_by_name(
    tmp_path: Path, one: Changes, other: Changes, named: set[str]
) -> None:
    base = fake(tmp_path / "runs")
    with pytest.raises(ConfigError, match="differs between SAEs that are to be trained together") as caught:
        train([base, changed(base, one), changed(base, other), changed(base, one)])
    options_of_another_backend = ("model.backend.",)
    assert {path for path, _ in caught.value.problems if not path.startswith(options_of_another_backend)} == named
    assert not list(tmp_path.iterdir())


def test_a_plugin_by_its_key_is_the_plugin_with_its_defaults(tmp_path: Path) -> None:
    one = fake(tmp_path, lr_schedule={"name": "constant"})
    other = changed(one, {"model": {"backend": {"name": "test:fake"}}}) | {"lr_schedule": "constant"}
    found = [saekit.load_config(config, plugins=manager()) for config in (one, other)]
    assert found[0] != found[1]
    assert changed_options(found, manager()) == [{}, {}]
    result = train(found)
    assert [row["name"] for row in result.summary] == ["0", "1"]
    assert kept(result.results["0"].folder) == kept(result.results["1"].folder)


def test_a_list_without_configurations() -> None:
    for empty in ([], ()):
        with pytest.raises(ConfigError, match="there is no configuration to train: the list is empty"):
            saekit.train(empty)


def test_a_list_of_one_is_a_sweep_of_one(tmp_path: Path) -> None:
    result = train([fake(tmp_path, checkpoints={"name": "only"})])
    assert result.folder == tmp_path / "only"
    assert list(result.results) == ["0"]
    assert (tmp_path / "only/0/sae/cfg.json").is_file()
    assert not result.diverged


def names(*changes: Changes, base: Mapping[str, Any] | None = None) -> tuple[str | None, list[str]]:
    plugins = saekit.default_manager()
    configs = [saekit.load_config(changed(base or {}, one), plugins=plugins) for one in changes]
    return member_names(configs, plugins)


def test_folders_are_named_after_what_differs() -> None:
    sae = {"name": "standard"}
    assert names({"sae": sae | {"l1_coefficient": 1}}, {"sae": sae | {"l1_coefficient": 0.5, "d_sae": 64}}) == (
        None, ["0_d_sae=None_l1_coefficient=1", "1_d_sae=64_l1_coefficient=0.5"]
    )  # fmt: skip
    assert names({}, {}, {}) == (None, ["0", "1", "2"]), "the same again"
    assert names(*[{}] * 11)[1][:2] == ["00", "01"], "in order in any listing"
    assert names({}, {"lr_schedule": {"name": "cosine", "end": 1e-5}})[1] == [
        "0_lr_schedule=saekit-constant_end=None", "1_lr_schedule=saekit-cosine_end=1e-05"
    ]  # fmt: skip
    assert names({"evals": {"run": []}}, {})[1] == ["0_run=", "1_run=-saekit-reconstruction"]


def test_options_of_one_name_are_told_apart() -> None:
    source = {"activations": {"source": {"name": "live", "dtype": "float16"}}}
    assert names({"sae": {"name": "standard", "dtype": "float64"}}, source)[1] == [
        "0_source.dtype=None_sae.dtype=float64", "1_source.dtype=float16_sae.dtype=float32"
    ]  # fmt: skip
    assert short_names(["a.b.c", "x.b.c", "d", "e.d", "f"]) == {
        "a.b.c": "a.b.c", "x.b.c": "x.b.c", "d": "d", "e.d": "e.d", "f": "f"
    }  # fmt: skip


@given(
    paths=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150),
                   min_size=2, max_size=3),
)  # fmt: skip
@settings(max_examples=40)
def test_names_that_every_file_system_takes(paths: list[str]) -> None:
    found = names(*({"training": {"from_pretrained_path": path}} for path in paths))[1]
    assert len({name.casefold() for name in found}) == len(paths)
    for name in found:
        assert name.isascii()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.=+-")
        assert len(name) <= 100
        assert not name.endswith((".", "-"))


def test_given_names_name_the_saes(tmp_path: Path) -> None:
    checkpoints = [{"checkpoints": {"name": name}} for name in ("small", "läuft=1.5")]
    assert names(*checkpoints) == (None, ["small", "läuft=1.5"])
    assert names(*[{"checkpoints": {"name": "all"}}] * 2) == ("all", ["0", "1"])
    result = train([changed(fake(tmp_path), one) for one in checkpoints])
    assert sorted(path.name for path in result.folder.iterdir() if path.is_dir()) == [
        "checkpoints",
        "läuft=1.5",
        "small",
    ]
    assert result.folder.parent == tmp_path
    assert "checkpoints.name" not in result.summary[0]
    with pytest.raises(ConfigError, match="all exists already"):
        (tmp_path / "all").mkdir()
        train([fake(tmp_path, checkpoints={"name": "all"})] * 2)


@pytest.mark.parametrize(
    "name", ["checkpoints", "run.json", "summary.csv", "summary.png", "a/b", "..", ".x", "a b", "x" * 250]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="checkpoints.name: names a folder in that of the sweep, which .* cannot"):
        names({"checkpoints": {"name": "fine"}}, {"checkpoints": {"name": name}})


@pytest.mark.parametrize("given_names", [("a", None), ("a", "b", "a"), (None, "a", "b")])
def test_names_that_are_neither_one_nor_all_different(given_names: tuple[str | None, ...]) -> None:
    with pytest.raises(ConfigError, match="must be the same for all, to name the sweep, or different for all"):
        names(*({"checkpoints": {"name": name}} for name in given_names))


# ---- the summary


def row(number: int, options: Mapping[str, Any], l0: float | None, ev: float | None, **more: Any) -> dict[str, Any]:
    name = "_".join([str(number), *(f"{path.rpartition('.')[2]}={value}" for path, value in options.items())])
    return {
        "name": name, **options, "l0": l0, "explained_variance": ev, "ce_recovered": ev, "mse": 12.5,
        "dead_features": 3.0, "tokens": 2000, "status": "trained", **more,
    }  # fmt: skip


GRID = [
    row(n, {"sae.l1_coefficient": l1, "training.lr": lr}, 100 / l1 + n, 0.9 - l1 / 20)
    for n, (l1, lr) in enumerate((l1, lr) for l1 in (0.5, 1.0, 2.0, 5.0) for lr in (1e-4, 3e-4))
]
DIVERGED = dict.fromkeys(("l0", "explained_variance", "ce_recovered", "mse", "dead_features")) | {"status": "diverged"}


def test_the_summary_is_a_table_for_programs(tmp_path: Path) -> None:
    result = train(
        saekit.grid(fake(tmp_path), {"sae.d_sae": [8, 12], "sae.activation": ["relu", "tanh-relu"]}, plugins=manager())
    )
    rows = as_csv(result.folder)
    options = ["sae.d_sae", "sae.activation"]
    numbers = ["l0", "explained_variance", "ce_recovered", "mse", "dead_features"]
    assert list(rows[0]) == ["name", *options, *numbers, "tokens", "status"]
    frame = pd.read_csv(result.folder / "summary.csv")
    assert list(frame["sae.d_sae"]) == [8, 8, 12, 12]
    assert list(frame["sae.activation"]) == ["saekit:relu", "saekit:tanh-relu"] * 2
    assert (frame["tokens"] == 1500).all()
    assert (frame["status"] == "trained").all()
    for number, (name, found) in enumerate(result.results.items()):
        assert result.summary[number]["name"] == rows[number]["name"] == frame["name"][number] == name
        for column in numbers:
            source = "sparsity/dead_features" if column == "dead_features" else f"evals/{column}"
            source = source if source in found.metrics else "losses/mse_loss"
            assert result.summary[number][column] == found.metrics[source] == frame[column][number]


def test_the_summary_without_evals(tmp_path: Path) -> None:
    result = train(saekit.grid(fake(tmp_path, evals={"run": []}), {"sae.d_sae": [8, 12]}, plugins=manager()))
    for line, found in zip(result.summary, result.results.values(), strict=True):
        assert line["ce_recovered"] is None
        assert line["l0"] == found.metrics["metrics/l0"]
        assert line["explained_variance"] == found.metrics["metrics/explained_variance"]


def drawn(rows: Sequence[Mapping[str, Any]], to: Path) -> Any:
    """The figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    options = list(rows[0])[1 : list(rows[0]).index("l0")]
    with mock.patch.object(Figure, "savefig", keep):
        plot_sweep(rows, short_names(options), to)
    return figures[0] if figures else None


def labels(axes: Any) -> list[Any]:
    return [text for text in axes.texts if text.get_text()]


def test_the_picture(tmp_path: Path) -> None:
    figure = drawn(GRID, tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == [
        "Explained variance against L0",
        "CE recovered against L0",
    ]
    lines = [line for line in left.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[r["l0"] for r in GRID[n::2]] for n in (0, 1)], (
        "along the penalty"
    )
    assert len({line.get_color() for line in lines}) == 2, "colored by learning rate"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lr = 0.0001", "lr = 0.0003"]
    assert figure.get_suptitle() == "8 SAEs    numbers at the points and lines: l1_coefficient    colors: lr"
    assert left.get_xscale() == "log"
    ticks = [t.get_text() for t, x in zip(left.get_xticklabels(), left.get_xticks(), strict=True) if 15 < x < 250]
    assert ticks == ["20", "50", "100", "200"]


def test_labels_neither_overlap_nor_are_cut_off(tmp_path: Path) -> None:
    crowded = [
        row(
            n,
            {"sae.l1_coefficient": l1, "training.lr": lr, "training.seed": seed},
            90 / l1 + seed / 9,
            0.9 - l1 / 20 - lr,
        )
        for n, (l1, lr, seed) in enumerate(
            (l1, lr, seed) for l1 in (0.5, 1.0, 2.0, 4.0) for lr in (1e-4, 2e-4, 1e-3) for seed in (1, 2, 3)
        )
    ]
    for rows, least in ((GRID, 8), (crowded, 12)):
        figure = drawn(rows, tmp_path / "x.png")
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in labels(axes)]
            assert least <= len(boxes) <= len(rows)
            for number, box in enumerate(boxes):
                assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
                assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
                assert not any(box.overlaps(other) for other in boxes[:number])
    assert {text.get_text() for text in labels(figure.axes[0])} <= {"0.5", "1", "2", "4"}
    assert [text.get_text() for text in figure.legends[0].get_texts()][3:] == [
        "lr = 0.0001", "lr = 0.0002", "lr = 0.001"
    ] or len(figure.legends[0].get_texts()) == 6  # fmt: skip
    width, height = figure.canvas.get_width_height()
    for text in [*figure.legends[0].get_texts(), figure._suptitle]:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_what_is_not_in_the_picture_is_named(tmp_path: Path) -> None:
    rows = [*GRID[:5], GRID[5] | DIVERGED, GRID[6] | {"l0": 0.0}, GRID[7] | {"ce_recovered": float("nan")}]
    figure = drawn(rows, tmp_path / "x.png")
    note = figure.get_supxlabel()
    assert note == (
        "Not drawn, diverged: 5_l1_coefficient=2.0_lr=0.0003\n"
        "Not drawn, without a feature that fires, or without numbers: 6_l1_coefficient=5.0_lr=0.0001"
    )
    points = [sum(len(line.get_xdata()) == 1 for line in axes.lines) for axes in figure.axes]
    assert points == [6, 5]
    many = drawn([GRID[0], *(one | DIVERGED for one in GRID[1:])], tmp_path / "x.png")
    assert many.get_supxlabel().endswith("4 more")


def test_pictures_of_other_sweeps(tmp_path: Path) -> None:
    hooks = [f"blocks.{n}.hook_resid_post" for n in range(12)]
    by_hook = [row(n, {"site.hook_name": hook}, 10.0 + n, 0.5) for n, hook in enumerate(hooks)]
    figure = drawn(by_hook, tmp_path / "x.png")
    assert len(figure.legends[0].get_texts()) == 12
    assert not labels(figure.axes[0])
    assert figure.axes[0].get_xscale() == "linear", "10 to 21 is not enough for a logarithmic axis"
    assert len({line.get_color() for line in figure.axes[0].lines}) == 12
    alone = drawn([row(0, {}, 10.0, 0.5)], tmp_path / "x.png")
    assert [text.get_text() for text in labels(alone.axes[0])] == ["0"]
    long = [row(n, {}, 10.0 + n, 0.5, name=f"{n}_a_name_of_its_own_that_takes_much_room_{n}") for n in range(3)]
    axes = drawn(long, tmp_path / "x.png").axes[0]
    for text in labels(axes):
        assert axes.bbox.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= axes.bbox.x1
    assert [text.get_text() for text in labels(axes)] == [f"{n}_a_name_of_its_own_tha…" for n in range(3)]
    listed = [
        row(n, {"sae": f"test:{n}", "site.hook_name": f"blocks.{n}", "training.seed": n}, 10.0 + n, 0.5)
        for n in range(3)
    ]
    assert [text.get_text() for text in labels(drawn(listed, tmp_path / "x.png").axes[0])] == ["0", "1", "2"]
    without = drawn([one | {"ce_recovered": None} for one in GRID], tmp_path / "x.png")
    assert len(without.axes) == 1
    assert drawn([one | DIVERGED for one in GRID], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    mixed = [row(n, {"evals.run": value}, 10.0 + n, 0.5) for n, value in enumerate(([], ["x"], None))]
    assert len(drawn(mixed, tmp_path / "x.png").legends[0].get_texts()) == 3


def shown(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(summary_table(rows, console))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_table_for_people() -> None:
    rows = [*GRID[:7], GRID[7] | DIVERGED]
    for width in (80, 200):
        lines = shown(rows, width)
        assert lines[0].split() == ["SAE", "l1_coefficient", "lr", "L0", "EV", "CE", "rec.", "mse", "dead"]
        assert lines[2].split() == ["0", "0.5", "0.0001", "200", "0.875", "0.875", "12.5", "3"]
        assert lines[9].split() == ["7", "5", "0.0003", "diverged", "-", "-", "-", "-"]
        assert len(lines) == 10, "one line for each"
        assert max(map(len, lines)) <= 80
    narrow = shown(rows, 64)
    assert [line.split()[0] for line in narrow[:2]] == ["l1_", "SAE"]
    assert len(narrow) == 11
    assert max(map(len, narrow)) <= 64


def test_the_table_of_many_options_in_a_narrow_terminal() -> None:
    options = {
        "site.hook_name": "blocks.10.attn.hook_z", "sae": "saekit:standard", "sae.activation": "saekit:tanh-relu",
        "training.lr": 3e-4, "sae.l1_coefficient": 5.0,
    }  # fmt: skip
    rows = [row(n, options | {"training.lr": n / 10}, 12.0, 0.5, tokens=2_000_000 + n) for n in range(3)]
    narrow, wide = shown(rows, 80), shown(rows, 200)
    assert max(map(len, narrow)) <= 80
    assert len(wide) == 5
    assert narrow[2].split() == ["0", "12", "0.500", "0.500", "12.5", "3", "2,000,000"]
    assert [line.strip() for line in narrow[3:8]] == [
        "hook_name=blocks.10.attn.hook_z", "sae=saekit:standard", "activation=saekit:tanh-relu", "lr=0",
        "l1_coefficient=5",
    ]  # fmt: skip
    named = [one | {"name": f"my_own_{n}"} for n, one in enumerate(rows)]
    assert shown(named, 200)[2].startswith("my_own_0 ")
    assert "tokens" not in shown([one | {"tokens": 5} for one in rows], 200)[0]


# ---- the command line


def cli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "saekit.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.slow
def test_a_grid_on_the_command_line(tmp_path: Path) -> None:
    config = run_config(Path("runs"), training={"training_tokens": 1000}, sae={"normalize_sae_decoder": False})
    (tmp_path / "run.toml").write_text(dump_config(saekit.load_config(config)))
    axes = ["--grid", "sae.l1_coefficient=1,5", "--grid", "training.lr=[4e-4, 1e30]"]
    found = cli("train", "run.toml", "checkpoints.name=s", *axes, cwd=tmp_path)
    assert found.returncode == 1, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].split()[:4] == ["SAE", "l1_coefficient", "lr", "L0"]
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["0", "1", "0.0004"], ["1", "1", "1e+30"], ["2", "5", "0.0004"], ["3", "5", "1e+30"]
    ]  # fmt: skip
    assert [line.split()[3] == "diverged" for line in lines[2:6]] == [False, True, False, True]
    assert lines[6] == "sweep folder: runs/s"
    for name in ("1_l1_coefficient=1_lr=1e+30", "3_l1_coefficient=5_lr=1e+30"):
        why = r"the loss of .* is (nan|inf) at step \d \(learning rate 1e\+30, 256 activations of mean norm"
        assert re.search(rf"(?m)^{name.replace('+', '[+]')} diverged: {why}", found.stderr)
        assert f"warning: {name} is stopped: the loss of" in found.stderr
    assert "Traceback" not in found.stderr
    assert {path.name for path in (tmp_path / "runs/s").glob("*/sae")} == {"sae"}
    assert len(list((tmp_path / "runs/s").glob("*/sae"))) == 2
    wrong = cli("train", "run.toml", "--grid", "sae.l1_coeficient=1,5", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Did you mean 'l1_coefficient'" in wrong.stderr
