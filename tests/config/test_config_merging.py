"""Sections that are given in part, and what is said of options that are not there."""

from __future__ import annotations

from typing import Any

import pytest
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.optimizers.adam import AdamConfig
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.trackers.wandb import WandbConfig
from support.every_config import having, manager

import saekit
from saekit.config import PretokenizeConfig, SAEConfig, TrainConfig, TrainingConfig
from saekit.config.converter import ConfigConverter
from saekit.config.elsewhere import option_paths
from saekit.config.files import apply_overrides, load_config
from saekit.config.sae_lens_names import SAE_LENS
from saekit.errors import ConfigError

FILE = {
    "model": {"name": "gpt2", "device": "cpu"},
    "training": {"lr": 1.0, "seed": 7},
    "sae": {"name": "topk", "k": 4, "d_sae": 64},
    "lr_schedule": "cosine",
    "activations": {"cache": {"tokens": 10}, "normalize_activations": "expected_average_only_in"},
}


def test_a_table_for_a_section_leaves_the_rest() -> None:
    config = load_config(FILE, ["training={lr=3}", 'model={name="pythia"}', "activations={cache={dtype='float16'}}"])
    assert (config.training.lr, config.training.seed) == (3.0, 7)
    assert (config.model.name, config.model.device) == ("pythia", "cpu"), "its name chooses no plugin"
    assert config.activations.normalize_activations.key == "saekit:expected_average_only_in"
    assert (config.activations.cache.tokens, config.activations.cache.dtype) == (10, "float16")
    assert FILE["training"] == {"lr": 1.0, "seed": 7}, "the input is left alone"
    grid = saekit.grid(FILE, {"training": [{"lr": 1}, {"lr": 2}]})
    assert [(c.training.lr, c.training.seed) for c in grid] == [(1.0, 7), (2.0, 7)]


def test_a_table_with_a_name_that_chooses_a_plugin_replaces_the_choice() -> None:
    assert load_config(FILE, ["sae={d_sae=8}"]).sae == TopKConfig(k=4, d_sae=8)
    assert load_config(FILE, ['sae={name="topk", d_sae=8}']).sae == TopKConfig(d_sae=8)
    assert load_config(FILE, ["sae=topk"]).sae == "saekit:topk"
    assert load_config(FILE, ["lr_schedule={end=0.5}"]).lr_schedule == CosineConfig(end=0.5)
    assert load_config(FILE, ["lr_schedule.end=0.5"]).lr_schedule == CosineConfig(end=0.5)
    assert load_config({}, ["sae={d_sae=8}"]).sae == load_config({"sae": {"d_sae": 8}}).sae
    assert load_config({"sae": {"d_sae": 8}}, ["sae={activation={name='tanh-relu'}}"]).sae.options.d_sae == 8
    made = load_config({"trackers": ["jsonl"]}, ['trackers=[{name="wandb", mode="offline"}]'])
    assert made.trackers == (WandbConfig(mode="offline"),), "a list is a value"


def test_an_option_that_is_a_table_is_replaced() -> None:
    backend = {"name": "HookedTransformer", "from_pretrained_kwargs": {"fold_ln": True}}
    config = load_config({"model": {"backend": backend}}, ["model.backend={from_pretrained_kwargs={center=false}}"])
    assert config.model.backend.options.from_pretrained_kwargs == {"center": False}
    config = load_config({"model": {"backend": backend}}, ["model.backend.from_pretrained_kwargs.center=false"])
    assert config.model.backend.options.from_pretrained_kwargs == {"fold_ln": True, "center": False}


def test_objects_in_tables_can_be_changed() -> None:
    table = {"training": TrainingConfig(lr=2.0, seed=3), "lr_schedule": CosineConfig(end=0.1), "sae": TopKConfig(k=3)}
    config = load_config(table, ["training.lr=1", "lr_schedule.end=0.2", "sae={d_sae=9}"])
    assert (config.training.lr, config.training.seed) == (1.0, 3)
    assert (config.lr_schedule, config.sae) == (CosineConfig(end=0.2), TopKConfig(k=3, d_sae=9))
    assert load_config(TrainConfig(**table), ["training={lr=1}"]).training.seed == 3


def test_tables_of_no_class_are_values() -> None:
    assert apply_overrides({"a": {"b": 1}}, ["a={c=2}"]) == {"a": {"c": 2}}
    with pytest.raises(ConfigError, match=r"^model.name.x: name is 'gpt2', which has no options to set"):
        load_config(FILE, ["model.name.x=1"])


# ---- options that are not there


@pytest.mark.parametrize(
    ("table", "path", "told"),
    [
        ({"l1_coefficient": 5}, "l1_coefficient",
         "is not an option here; it is sae.l1_coefficient (of saekit:crosscoder, saekit:gated, saekit:standard and "
         "saekit:transcoder)"),
        ({"lr": 5}, "lr", "is not an option here; it is activations.source.lr (of saekit:toy) or training.lr"),
        ({"sae": {"lr": 1}}, "sae.lr",
         "is not an option here; it is activations.source.lr (of saekit:toy) or training.lr"),
        ({"training": {"d_sae": 1}}, "training.d_sae", "is not an option here; it is sae.d_sae"),
        ({"sae": {"name": "standard", "k": 3}}, "sae.k",
         f"is not an option of saekit:standard (sae.name), but of {having('k')}. Choose one of these (sae.name=topk), "
         "or delete it"),
        ({"sae": {"l1": 3}}, "sae.l1", "is not an option. Did you mean 'l1_coefficient'?"),
        ({"hook_name": "x"}, "hook_name", "is not an option here; it is site.hook_name"),
        ({"dtype": "x"}, "dtype", "is not an option here; it is model.dtype or activations.source.dtype (of "
         "saekit:live and saekit:toy) or activations.cache.dtype or sae.dtype"),
        ({"tags": []}, "tags", "is not an option here; it is trackers[].tags (of saekit:wandb)"),
        ({"training": {"lr_warm_up": 1}}, "training.lr_warm_up", "is not an option. Did you mean 'lr_warm_up_steps'?"),
        ({"context_siz": 1}, "context_siz", "is not an option. Did you mean dataset.context_size?"),
        ({"lr_scheduler_name": "constant"}, "lr_scheduler_name", "is a name of sae-lens; here it is lr_schedule"),
        ({"hook_point": "x"}, "hook_point", "is a name of sae-lens; here it is site.hook_name"),
        ({"sae": {"activation_fn": "relu"}}, "sae.activation_fn", "is a name of sae-lens; here it is sae.activation"),
        ({"wandb_project": "x"}, "wandb_project",
         'is a name of sae-lens; here it is trackers=[{name = "wandb", project = ...}]'),
    ],
)  # fmt: skip
def test_an_option_at_the_wrong_place(table: dict[str, Any], path: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(table)
    assert caught.value.problems == [(path, told)]


def test_every_name_of_sae_lens_leads_somewhere() -> None:
    """To an option that is there, or to words; and none is a name of ours that is found by itself."""
    tree = option_paths(TrainConfig, saekit.default_manager())
    places = {path.replace("[]", "") for paths in tree.values() for path in paths}
    for name, place in SAE_LENS.items():
        assert name not in tree, f"{name} is an option of ours"
        first = place.split(" ")[0].partition("=")[0].rstrip(",")
        if "." in first or first in ("optimizer", "lr_schedule", "trackers"):
            assert first in places or first.removesuffix(".name") in places, name


def test_other_roots_know_their_own_tree_alone() -> None:
    converter = ConfigConverter(manager())
    with pytest.raises(ConfigError, match="^context_size: is not an option here; it is dataset.context_size$"):
        load_config({"folder": "x", "context_size": 3}, kind=PretokenizeConfig)
    with pytest.raises(ConfigError, match="hook_point: is not an option. The options here are"):
        converter.structure({"hook_point": 3}, SAEConfig)
    with pytest.raises(ConfigError, match="^lr: is not an option. The options here are clip_grad_norm, beta1, "):
        converter.structure({"lr": 3}, AdamConfig)


# ---- dotted keys in dicts


def test_dicts_take_dotted_keys_as_overrides_do() -> None:
    dotted = {"sae.k": 8, "sae.name": "topk", "training.lr": 1e-3, "training": {"seed": 3}, "sae.d_sae": 64}
    nested = {"sae": {"name": "topk", "k": 8, "d_sae": 64}, "training": {"lr": 1e-3, "seed": 3}}
    assert load_config(dotted) == load_config(nested)
    assert load_config({"sae.k": 8, "sae": "topk"}).sae == TopKConfig(k=8), "in whatever order"
    assert load_config(dotted, ["sae.k=9"]).sae == TopKConfig(k=9, d_sae=64)
    assert [one.sae for one in saekit.grid(dotted, {"sae.k": [1, 2]})] == [TopKConfig(k=k, d_sae=64) for k in (1, 2)]
    assert dotted["training"] == {"seed": 3}, "is not changed in its place"


@pytest.mark.parametrize("order", [1, -1])
def test_a_dotted_name_leaves_what_is_in_its_section(order: int) -> None:
    """It was chosen, also where the default plugin has it so by default, and the one that is named has not."""
    changed = {"normalize_sae_decoder": True, "decoder_heuristic_init": False, "d_sae": 64}
    table = dict([("sae", changed), ("sae.name", "topk")][::order])
    assert load_config(table) == load_config({"sae": {"name": "topk", **changed}})
    assert load_config(table, ["sae.k=9"]).sae == TopKConfig(k=9, **changed)  # type: ignore[arg-type]
    assert saekit.grid(table, {"sae.k": [9]})[0].sae == TopKConfig(k=9, **changed)  # type: ignore[arg-type]
    given = {"decoder_heuristic_init": True, "dtype": "float32"}
    table = dict([("sae", {"name": "topk", "expansion_factor": 8}), ("sae.d_sae", 64)][::order])
    with pytest.raises(ConfigError, match="expansion_factor") as nested:
        load_config({"sae": {"name": "topk", "expansion_factor": 8, "d_sae": 64}})
    with pytest.raises(ConfigError) as dotted:
        load_config(table)
    assert dotted.value.problems == nested.value.problems
    assert load_config({"sae": given, "sae.name": "topk"}) == load_config({"sae": {"name": "topk", **given}})


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("sae", ["standard", {"name": "standard"}, TopKConfig()], ids=repr)
def test_a_plugin_that_is_named_twice(sae: object, order: int) -> None:
    told = "sae.name: is given twice, by its dotted name and in its section; leave out one of them"
    with pytest.raises(ConfigError, match=told):
        load_config(dict([("sae", sae), ("sae.name", "topk")][::order]))
    with pytest.raises(ConfigError, match=told.replace("sae.", "model.backend.")):
        load_config(dict([("model.backend", "none"), ("model.backend.name", "bridge")][::order]))


@pytest.mark.parametrize(
    ("table", "path", "told"),
    [
        ({"training.lr": 1, "training": {"lr": 2}}, "training.lr", "is given twice, by its dotted name and in its "
         "section; leave out one of them"),
        ({"training.lrr": 1}, "training.lrr", "is not an option. Did you mean 'lr'?"),
        ({"training..lr": 1}, "training..lr", "is not an option. Did you mean 'training'?"),
    ],
)  # fmt: skip
def test_dotted_keys_that_are_wrong(table: dict[str, Any], path: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(table)
    assert caught.value.problems == [(path, told)]
