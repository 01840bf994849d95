"""Configuration: strict, every fault at once, and the same after a round trip."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saekit_plugins.activations.tanh_relu import TanhReluConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.optimizers.adam import AdamConfig
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.sources.live import LiveConfig
from saekit_plugins.trackers.wandb import WandbConfig

import saekit
from saekit.config import (
    CheckpointsConfig,
    DatasetConfig,
    EvalsConfig,
    ModelConfig,
    SAEConfig,
    Site,
    TrainConfig,
    TrainingConfig,
)
from saekit.config.describe import describe_fields
from saekit.config.files import apply_overrides, commented_toml, dump_config, load_config, plain_config
from saekit.errors import ConfigError, UnknownKeyError


def every_config_class() -> list[type]:
    plugins = saekit.default_manager()
    options = [item.entry.config for registry in plugins.registries.values() for item in registry.items]
    sections = [TrainConfig, *(type(getattr(TrainConfig(), field.name)) for field in attrs.fields(TrainConfig))]
    return list(dict.fromkeys([*(cls for cls in sections if attrs.has(cls)), SAEConfig, *options]))


positive = st.floats(1e-6, 1e6, allow_nan=False)
texts = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x24F, exclude_characters="\x85\xa0"), min_size=1, max_size=12
)
standard = st.builds(
    StandardConfig,
    d_sae=st.one_of(st.none(), st.integers(1, 10**6)),
    activation=st.sampled_from(["saekit:relu", TanhReluConfig()]),
    l1_coefficient=positive,
    lp_norm=positive,
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
    noise_scale=positive,
    b_dec_init_method=st.sampled_from(["zeros", "mean", "geometric_median"]),
)
configs = st.builds(
    TrainConfig,
    model=st.builds(ModelConfig, name=texts, device=texts),
    dataset=st.builds(
        DatasetConfig,
        path=texts,
        name=st.one_of(st.none(), texts),
        begin_sequence_token=st.one_of(st.sampled_from(["bos", "none"]), st.integers(0, 9999)),
        context_size=st.integers(2, 4096),
    ),
    site=st.builds(Site, hook_name=texts, hook_head_index=st.one_of(st.none(), st.integers(0, 64))),
    sae=st.one_of(st.just("saekit:standard"), standard),
    optimizer=st.builds(AdamConfig, beta1=st.floats(0, 0.99), clip_grad_norm=positive),
    lr_schedule=st.sampled_from(["saekit:constant", "saekit:cosine", CosineConfig(), CosineConfig(end=0.1)]),
    training=st.builds(TrainingConfig, lr=positive, seed=st.integers(0, 2**31), verbose=st.booleans()),
    evals=st.builds(
        EvalsConfig, split=st.one_of(st.none(), texts), run=st.sampled_from([(), ("saekit:reconstruction",)])
    ),
    trackers=st.sampled_from([("saekit:jsonl",), (), ("saekit:jsonl", WandbConfig(mode="offline", tags=("a", "b")))]),
    checkpoints=st.builds(CheckpointsConfig, name=st.one_of(st.none(), texts)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.sampled_from(["toml", "yaml", "json"]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig, form: str) -> None:
    path = tmp_path_factory.mktemp("round") / f"run.{form}"
    path.write_text(dump_config(config, form), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(config) == config


def test_dumps_write_qualified_keys() -> None:
    text = dump_config(TrainConfig(lr_schedule="cosine", sae=StandardConfig(activation="tanh-relu")), "json")
    table = json.loads(text)
    assert table["lr_schedule"] == "saekit:cosine"
    assert table["sae"]["name"] == "saekit:standard"
    assert table["sae"]["activation"] == "saekit:tanh-relu"


def test_a_plugin_may_be_a_key_a_table_or_an_options_object() -> None:
    assert load_config({"lr_schedule": "cosine"}).lr_schedule == "saekit:cosine"
    assert load_config({"lr_schedule": {"name": "cosine", "end": 0.1}}).lr_schedule == CosineConfig(end=0.1)
    assert load_config({"lr_schedule": CosineConfig(end=0.1)}).lr_schedule == CosineConfig(end=0.1)
    assert load_config(TrainConfig(lr_schedule={"name": "cosine", "end": 1})).lr_schedule == CosineConfig(end=1.0)


def problems_of(table: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(table)  # type: ignore[arg-type]
    return dict(caught.value.problems)


def test_every_fault_is_reported_at_once_with_its_path() -> None:
    found = problems_of(
        {
            "modle": {},
            "training": {"lr": "fast", "seed": 3.9, "verbose": "false", "training_tokens": -5, "lr_warm_up": 3},
            "sae": {"name": "standard", "l1_coeficient": 5, "dtype": "float31", "activation": "rellu"},
            "lr_schedule": "cosin",
            "trackers": ["jsonl", {"name": "wandb", "mode": "off-line"}],
            "site": {"hook_head_index": True},
            "dataset": {"context_size": 1, "begin_sequence_token": "box"},
        }
    )
    assert found["modle"] == "is not an option. Did you mean 'model'?"
    assert found["training.lr"] == "expected a number, found 'fast'"
    assert found["training.seed"] == "expected a whole number, found 3.9"
    assert found["training.verbose"] == "expected true or false, found 'false'"
    assert found["training.training_tokens"] == "must be 1 or more, found -5"
    assert "Did you mean 'lr_warm_up_steps'" in found["training.lr_warm_up"]
    assert "Did you mean 'l1_coefficient'" in found["sae.l1_coeficient"]
    assert "Did you mean 'float32'" in found["sae.dtype"]
    assert "Did you mean 'relu'" in found["sae.activation"]
    assert "Did you mean 'cosine'" in found["lr_schedule"]
    assert "Did you mean 'offline'" in found["trackers[1].mode"]
    assert found["site.hook_head_index"] == "expected a whole number, found True"
    assert found["dataset.context_size"] == "must be 2 or more, found 1"
    assert '"bos", "eos", "sep"' in found["dataset.begin_sequence_token"]


@pytest.mark.parametrize(
    ("table", "path", "message"),
    [
        ({"sae": {"d_sae": 8, "expansion_factor": 2}}, "sae.expansion_factor", "not both"),
        ({"sae": {"decoder_heuristic_init": True}}, "sae.decoder_heuristic_init", "sae.normalize_sae_decoder=false"),
        (
            {"sae": {"scale_sparsity_penalty_by_decoder_norm": True}},
            "sae.scale_sparsity_penalty_by_decoder_norm",
            "no effect",
        ),
        ({"training": {"training_tokens": 10, "lr_warm_up_steps": 9}}, "training.lr_warm_up_steps", "more than the 1"),
        ({"dataset": {"begin_batch_token": "eos"}}, "dataset.begin_batch_token", "prepend_bos"),
        ({"sae": {"name": "standard", "d_sae": 0}}, "sae.d_sae", "1 or more"),
        ({"model": []}, "model", "expected a table"),
        ({"lr_schedule": 3}, "lr_schedule", "expected a plugin's key"),
        ({"trackers": "jsonl"}, "trackers", "expected a list"),
        ({"model": {"backend": {"name": "HookedMamba", "from_pretrained_kwargs": {"fold_ln": True}}}},
         "model.backend.from_pretrained_kwargs", "does not take 'fold_ln'"),
    ],
)  # fmt: skip
def test_contradictions_and_wrong_shapes(table: dict, path: str, message: str) -> None:
    assert message in problems_of(table)[path]


def test_objects_made_in_code_are_checked_as_strictly() -> None:
    config = TrainConfig(training=TrainingConfig(verbose="yes"), sae=StandardConfig(dtype="f32"))  # type: ignore[arg-type]
    found = problems_of(config)
    assert set(found) == {"training.verbose", "sae.dtype"}
    with pytest.raises(ConfigError, match="lr: must be above 0, found -1"):
        TrainingConfig(lr=-1.0)


def test_overrides() -> None:
    table = {"sae": "standard", "training": {"lr": 1.0}}
    config = load_config(table, ["sae.l1_coefficient=5", "training.lr=1e-4", "model.name=gpt2", "sae.d_sae=none"])
    assert config.sae == StandardConfig(l1_coefficient=5.0)
    assert config.training.lr == 1e-4
    assert config.model.name == "gpt2"
    assert table == {"sae": "standard", "training": {"lr": 1.0}}, "the input is left alone"
    assert apply_overrides({}, ["a.b.c=[1, 2]"]) == {"a": {"b": {"c": [1, 2]}}}


@pytest.mark.parametrize(
    ("override", "message"), [("training.lr", "section.option=value"), ("training..lr=1", "is not")]
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({}, [override])
    with pytest.raises(ConfigError, match="has no options to set"):
        load_config({"training": {"lr": 1}}, ["training.lr.x=1"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "a = ", "is not valid TOML"),
        ("run.json", "{", "is not valid JSON"),
        ("run.yaml", "a: [", "is not valid YAML"),
        ("run.ini", "", "must end in .toml"),
        ("run.json", "[1]", "must hold a table"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("run.toml", "\n"), ("run.yaml", ""), ("run.json", " ")])
def test_an_empty_file_is_no_configuration(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name} is empty: it has no option.*`saekit config > run.toml` writes one"):
        load_config(tmp_path / name, ["sae.name=topk"])
    assert load_config({}) == load_config(TrainConfig())


@pytest.mark.parametrize(("name", "text"), [("run.toml", "# all"), ("run.yaml", "# all\n"), ("run.json", "{}")])
def test_a_file_that_says_nothing_is_all_defaults(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_config(tmp_path / name) == load_config(TrainConfig())


def test_a_missing_file_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(
        ConfigError, match=r"there is no configuration file .*runn.toml; in that folder there are run.toml"
    ):
        load_config(tmp_path / "runn.toml")


def test_the_commented_default_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(commented_toml(), encoding="utf-8")
    config = load_config(path)
    plugins = saekit.default_manager()
    assert plugins.options("sae_architectures", config.sae) == StandardConfig()
    assert plugins.options("activation_sources", config.activations.source) == LiveConfig()
    assert plugins.options("optimizers", config.optimizer) == AdamConfig()
    assert attrs.evolve(config, sae=TrainConfig().sae, activations=TrainConfig().activations,
                        model=TrainConfig().model, evals=TrainConfig().evals, optimizer=TrainConfig().optimizer,
                        trackers=TrainConfig().trackers) == TrainConfig()  # fmt: skip


@pytest.mark.parametrize("cls", every_config_class(), ids=lambda cls: cls.__qualname__)
def test_every_option_is_explained(cls: type) -> None:
    for field in describe_fields(cls):
        assert field.doc, f"{cls.__qualname__}.{field.name} has no docstring line"


@pytest.mark.parametrize("cls", every_config_class(), ids=lambda cls: cls.__qualname__)
def test_what_may_be_none_is_none_by_default(cls: type) -> None:
    """TOML has no null: an option left out must mean None."""
    attrs.resolve_types(cls)
    for field in attrs.fields(cls):
        if type(None) in typing.get_args(field.type):
            assert field.default is None, f"{cls.__qualname__}.{field.name}"


def test_an_options_class_of_no_plugin() -> None:
    with pytest.raises(
        UnknownKeyError, match=r"LiveConfig is not the options class of any LR schedule. Registered: Const"
    ):
        plain_config(TrainConfig(lr_schedule=LiveConfig()), saekit.default_manager())


def test_configs_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        TrainConfig().training.lr = 1.0  # type: ignore[misc]
