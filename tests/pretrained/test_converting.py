"""Configurations of sae-lens runs: what comes out loads and means the same, and every key is accounted for."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

import saekit
from saekit.converted import ConvertedConfig as Converted
from saekit.errors import ConfigError, PluginWarning, SaekitError, StorageError
from saekit.for_sae_lens import NO_PROCESSING
from saekit.kinds import PRETRAINED_LOADERS
from saekit.pretrained.converting import convert_config as convert
from saekit.pretrained.converting import write_new
from saekit.testing import fake_plugin

TESTS = Path(__file__).parents[1]
OF_2 = TESTS / "fixtures/sae_lens_2.1.3_folder/cfg.json"
OF_6 = {path.stem: path for path in sorted((TESTS / "golden_runner_configs").glob("*.json"))}


FLAT = {path.stem: path for path in sorted((TESTS / "golden_flat_configs").glob("*.json"))}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def keys_of(source: dict[str, Any]) -> set[str]:
    flat = {key for key in source if key not in ("sae", "logger")}
    return flat | {f"{part}.{key}" for part in ("sae", "logger") for key in source.get(part, {})}


def options_of(table: Any) -> set[str]:
    if not isinstance(table, dict):
        return set()
    return {*table, *(name for value in table.values() for name in options_of(value))}


def unaccounted(source: dict[str, Any], found: Converted) -> set[str]:
    """Keys that are neither an option of the same name nor reported."""
    told = {*found.renamed, *found.dropped, *found.lost}
    same = options_of(found.table)
    return {key for key in keys_of(source) - told if key.rpartition(".")[2] not in same}


def of_3(**changes: Any) -> dict[str, Any]:
    """As 3.0.0 saves it: what 2.1.3 does, by other names."""
    source = read(OF_2)
    for old, new in (("hook_point", "hook_name"), ("hook_point_layer", "hook_layer"), ("hook_point_eval", "hook_eval"),
                     ("hook_point_head_index", "hook_head_index")):  # fmt: skip
        source[new] = source.pop(old)
    more = {"sae_lens_version": "3.0.0", "act_store_device": "with_model", "autocast_lm": False}
    return source | more | changes


@pytest.mark.parametrize(
    "path", [OF_2, *OF_6.values(), *FLAT.values()], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_key_is_accounted_for_and_the_file_loads(path: Path, tmp_path: Path) -> None:
    source = read(path)
    found = convert(source)
    assert unaccounted(source, found) == set()
    assert set(found.lost) == ({"architecture"} if "jumprelu" in path.stem and path in FLAT.values() else set())
    (tmp_path / "run.toml").write_text(found.toml)
    loaded = saekit.load_config(tmp_path / "run.toml")
    assert loaded == saekit.load_config(dict(found.table))
    lines = "\n".join(found.report())
    assert all(f": {key}" in lines for key in (*found.renamed, *found.changed, *found.dropped))


def test_how_activations_are_normalized() -> None:
    for theirs, ours in (
        ("layer_norm", "layer_norm"), ("constant_norm_rescale", "constant_norm"), ("covariance_whitening", "whitening")
    ):  # fmt: skip
        found = convert(of_3(normalize_activations=theirs))
        assert found.table["activations"]["normalize_activations"] == f"saekit:{ours}"
        assert saekit.load_config(dict(found.table)).activations.normalize_activations.key == f"saekit:{ours}"
    assert "there are none, expected_average_only_in, layer_norm, constant" in str(
        convert(of_3(normalize_activations="batch")).lost
    )


def test_a_flat_one_means_the_same() -> None:
    config = saekit.load_config(
        dict(convert(of_3(lr_scheduler_name="cosineannealing", lr_end=None, act_store_device="cpu", dtype="float64",
                          hook_head_index=3, normalize_activations=True, eval_batch_size_prompts=5)).table)
    )  # fmt: skip
    assert (config.site.hook_name, config.site.hook_head_index) == ("blocks.0.hook_resid_pre", 3)
    assert config.sae.key == "saekit:standard"
    options = config.sae.options
    assert (options.d_in, options.d_sae, options.l1_coefficient, options.dtype) == (16, 64, 1e-3, "float64")
    assert (options.normalize_sae_decoder, options.init_encoder_as_decoder_transpose) == (True, False)
    assert options.b_dec_init_method == "geometric_median"
    assert options.mse_loss_normalization == "none"
    assert config.activations.normalize_activations.key == "saekit:expected_average_only_in"
    source = config.activations.source.options
    assert (source.store_batch_size_prompts, source.n_batches_in_buffer) == (32, 20)
    assert (source.act_store_device, source.dtype) == ("cpu", "float64")
    assert config.optimizer.options.beta1 == 0.0
    assert config.lr_schedule.options.end == pytest.approx(3e-5), "a tenth of the rate, where nothing is said"
    assert config.evals.n_contexts == 10 * 5, "batches of prompts there, contexts here"
    assert config.evals.every_n_steps == 100 * 10, "logs there, steps here"
    assert [(one.key, one.options.batch_size_prompts) for one in config.evals.run] == [
        ("saekit:reconstruction", 5), ("saekit:downstream", 5)
    ]  # fmt: skip
    assert config.model.backend.options.from_pretrained_kwargs == {}
    assert config.trackers == ()


def test_one_of_6_means_the_same() -> None:
    config = saekit.load_config(dict(convert(read(OF_6["standard"])).table))
    options = config.sae.options
    assert (options.normalize_sae_decoder, options.scale_sparsity_penalty_by_decoder_norm) == (False, True)
    assert (options.decoder_heuristic_init, options.init_encoder_as_decoder_transpose) == (True, True)
    assert (options.b_dec_init_method, options.l1_coefficient, options.l1_warm_up_steps) == ("zeros", 2, 10)
    kwargs = config.model.backend.options.from_pretrained_kwargs
    assert kwargs["center_writing_weights"] is kwargs["fold_ln"] is False, "sae-lens 6 does not process weights"
    assert config.optimizer.options.beta1 == 0.9
    assert config.trackers[0].options.project == "sae_lens_training"
    assert config.activations.source.options.prefetch is False
    assert config.dataset.sequence_separator_token == "bos"
    jumprelu = saekit.load_config(dict(convert(read(OF_6["jumprelu"])).table)).sae.options
    assert (jumprelu.initial_threshold, jumprelu.bandwidth, jumprelu.l0_coefficient) == (0.01, 0.05, 3)
    assert (jumprelu.aux_loss_coefficient, jumprelu.ste_to_input, jumprelu.sparsity_loss) == (0, False, "l0")
    topk = saekit.load_config(dict(convert(read(OF_6["batchtopk"])).table)).sae.options
    assert (topk.k, topk.aux_loss_coefficient, topk.aux_loss_normalization) == (16.5, 1.0, "none")
    assert topk.threshold_lr == 0.01
    gated = saekit.load_config(dict(convert(read(OF_6["gated"])).table)).sae.options
    assert (gated.l1_coefficient, gated.normalize_sae_decoder, gated.aux_loss_trains_decoder) == (3, False, True)
    assert gated.scale_sparsity_penalty_by_decoder_norm
    nested = saekit.load_config(dict(convert(read(OF_6["matryoshka_batchtopk"])).table)).sae
    assert (nested.key, nested.options.widths) == ("saekit:matryoshka", (64, 512))
    assert (nested.options.level_loss, nested.options.aux_loss_levels) == ("sum", "whole")


def test_what_is_not_here_is_said() -> None:
    found = convert(of_3(seqpos_slice=[5, -5], disable_concat_sequences=True, madeup=3, dead_feature_threshold=1e-6))
    assert set(found.lost) == {"madeup"}
    assert "NOT THE SAME: madeup: is 3, of which saekit knows nothing" in found.report()
    cached = convert(of_3(use_cached_activations=True, cached_activations_path="acts"))
    assert cached.table["activations"]["source"] == {"name": "saekit:cached", "folder": "acts"}
    assert "saekit cache" in cached.lost["use_cached_activations"]
    tanh = convert(read(OF_6["jumprelu"]) | {"sae": read(OF_6["jumprelu"])["sae"] | {"decoder_init_norm": 0.5}})
    assert list(tanh.lost) == ["sae.decoder_init_norm"]


@pytest.mark.parametrize("version", ["3", "6"])
def test_which_tokens_count_is_kept(version: str) -> None:
    given = {"seqpos_slice": [5, -5], "disable_concat_sequences": True, "is_dataset_tokenized": False}
    source = of_3(**given) if version == "3" else read(OF_6["standard"]) | given
    if version == "6":
        source |= {"exclude_special_tokens": [3, 7], "use_chat_formatting": True}
    found = convert(source)
    config = saekit.load_config(dict(found.table))
    assert found.lost == {}
    assert config.tokens.seqpos_slice == (5, -5)
    assert config.dataset.disable_concat_sequences is True
    if version == "6":
        assert config.tokens.exclude_special_tokens == (3, 7)
        assert config.dataset.chat_template is True
        everything = saekit.load_config(dict(convert(source | {"exclude_special_tokens": True}).table))
        assert everything.tokens.exclude_special_tokens is True
        assert "pad, sep and decoder_start" in convert(source | {"exclude_special_tokens": True}).lost[
            "exclude_special_tokens"
        ]  # fmt: skip
    assert "tokens" not in convert(read(OF_6["standard"])).table, "where all count, nothing is said"


def test_a_topk_of_4_is_a_topk() -> None:
    """One by its activation alone has no AuxK there, and still the penalty."""
    source = of_3(
        sae_lens_version="4.4.5", architecture="standard", activation_fn="topk", activation_fn_kwargs={"k": 7}
    )
    assert "a penalty beside the k" in convert(source).lost["l1_coefficient"]
    assert convert(source | {"l1_coefficient": 0}).lost == {}
    options = saekit.load_config(dict(convert(source).table)).sae
    assert options.key == "saekit:topk"
    assert (options.options.k, options.options.rescale_acts_by_decoder_norm) == (7, False)
    assert (options.options.aux_loss_coefficient, options.options.normalize_sae_decoder) == (0, True)


@pytest.mark.parametrize("version", ["4.4.5", "5.11.0"])
def test_the_architectures_of_4_and_5_mean_the_same(version: str) -> None:
    def options(name: str, **changes: Any) -> Any:
        loaded = saekit.load_config(dict(convert(read(FLAT[f"{version}_{name}"]) | changes).table))
        assert loaded.sae.key == f"saekit:{name}"
        return loaded.sae.options

    gated = options("gated")
    assert (gated.l1_coefficient, gated.normalize_sae_decoder, gated.aux_loss_trains_decoder) == (3, False, True)
    assert gated.scale_sparsity_penalty_by_decoder_norm, "always, whatever the option says"
    on_the_sphere = options("gated", normalize_sae_decoder=True, decoder_heuristic_init=False)
    assert not on_the_sphere.scale_sparsity_penalty_by_decoder_norm
    jumprelu = options("jumprelu")
    assert (jumprelu.l0_coefficient, jumprelu.l0_warm_up_steps) == (4, 20), "called l1 there"
    assert (jumprelu.initial_threshold, jumprelu.bandwidth, jumprelu.aux_loss_coefficient) == (0.001, 0.05, 0)
    assert (jumprelu.ste_to_input, jumprelu.sparsity_loss) == (False, "l0")
    topk = options("topk")
    assert (topk.k, topk.aux_loss_coefficient, topk.aux_loss_normalization) == (16, 1, "none")
    standard = options("standard")
    assert (standard.l1_coefficient, standard.l1_warm_up_steps, standard.lp_norm) == (2, 10, 1)


def test_options_of_another_architecture_are_told_where_they_counted() -> None:
    found = convert(read(FLAT["5.11.0_standard"]))
    assert found.dropped["jumprelu_bandwidth"] == "is of another architecture"
    assert found.lost == {}
    noisy = convert(read(FLAT["5.11.0_gated"]) | {"noise_scale": 0.1, "mse_loss_normalization": "dense_batch"})
    assert noisy.lost == {
        "noise_scale": "is 0.1, which gated does not have here",
        "mse_loss_normalization": "is 'dense_batch', which gated does not have here",
    }
    wide = convert(read(FLAT["5.11.0_gated"]) | {"decoder_heuristic_init_norm": 0.3})
    assert "start here at norm 0.1" in wide.lost["decoder_heuristic_init_norm"]


def with_sae(name: str, **changes: Any) -> dict[str, Any]:
    source = read(OF_6[name])
    return source | {"sae": source["sae"] | changes}


def test_abstopk_has_the_defaults_of_topk() -> None:
    source = with_sae("topk", architecture="abstopk")
    del source["sae"]["k"], source["sae"]["aux_loss_coefficient"]
    found = convert(source)
    assert (found.assumed["sae.k"], found.assumed["sae.aux_loss_coefficient"]) == (100, 1)
    sae = saekit.load_config(dict(found.table)).sae
    assert sae.key == "saekit:abstopk"
    assert (sae.options.k, sae.options.aux_loss_coefficient, sae.options.aux_loss_normalization) == (100, 1, "none")


def test_tanh_without_a_scale_has_the_default() -> None:
    found = convert(with_sae("jumprelu", jumprelu_sparsity_loss_mode="tanh", jumprelu_tanh_scale=None))
    options = saekit.load_config(dict(found.table)).sae.options
    assert (options.sparsity_loss, options.tanh_scale) == ("tanh", 4)
    assert found.dropped["sae.jumprelu_tanh_scale"] == "is null, and left out here"


@pytest.mark.parametrize("name", ["matching_pursuit", "temporal"])
def test_what_cannot_be_trained_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"sae.architecture: is '{name}', which saekit reads and cannot train"):
        convert(with_sae("standard", architecture=name))


def test_values_that_are_others_here_are_told() -> None:
    found = convert(of_3(normalize_activations="constant_norm_rescale"))
    assert "is activations.normalize_activations = 'constant_norm'" in found.changed["normalize_activations"]
    assert "the loss is of rows as they are there" in found.lost["normalize_activations"]
    layer = convert(with_sae("standard", normalize_activations="layer_norm"))
    assert "of normalized ones" in layer.lost["sae.normalize_activations"]
    white = convert(with_sae("standard", normalize_activations="covariance_whitening"))
    assert "rotates them back" in white.lost["sae.normalize_activations"]
    assert "NOT THE SAME: sae.normalize_activations: covariance_whitening leaves rows" in "\n".join(white.report())
    nested = convert(read(OF_6["matryoshka_batchtopk"]))
    assert nested.changed["sae.architecture"] == "'matryoshka_batchtopk' is sae.name = 'matryoshka'"
    assert nested.changed["n_eval_batches"] == "10 is evals.n_contexts = 320"
    assert "dtype" not in nested.changed


def test_a_model_of_transformers_is_loaded_as_there() -> None:
    """sae-lens writes ``model_kwargs`` whether there are any or not."""
    source = read(OF_6["standard"]) | {"model_class_name": "AutoModelForCausalLM", "model_kwargs": {"x": 1}}
    plain = convert(source | {"model_from_pretrained_kwargs": {}})
    assert plain.table["model"]["backend"] == {"name": "saekit:AutoModelForCausalLM"}
    assert (plain.lost, plain.dropped["model_kwargs"]) == ({}, "reaches no model of transformers there")
    given = {"torch_dtype": "torch.bfloat16", "attn_implementation": "eager", "variant": "fp16", "revision": "v2"}
    found = convert(source | {"model_from_pretrained_kwargs": given})
    model = saekit.load_config(dict(found.table)).model
    options = model.backend.options
    assert (model.dtype, options.attn_implementation, options.revision) == ("bfloat16", "eager", "v2")
    assert options.from_pretrained_kwargs == {"variant": "fp16"}
    assert found.lost == {}
    other = {"dtype": "auto", "device_map": "auto", "trust_remote_code": True}
    told = convert(source | {"model_from_pretrained_kwargs": other}).lost["model_from_pretrained_kwargs"]
    assert told == (
        "dtype is 'auto', which has no place here; device_map is 'auto', and the model is on one here (model.device); "
        "trust_remote_code is refused: no code that comes with a model is run"
    )


def test_what_is_passed_to_other_models() -> None:
    mamba = read(OF_6["standard"]) | {"model_class_name": "HookedMamba", "model_from_pretrained_kwargs": {"a": 1}}
    found = convert(mamba | {"model_kwargs": {"fast_ssm": True, "b": 2}})
    assert found.table["model"]["backend"] == {"name": "saekit:HookedMamba", "forward_kwargs": {"fast_ssm": True}}
    assert found.lost == {"model_from_pretrained_kwargs": "a is 1, which has no place here",
                          "model_kwargs": "has b, which HookedMamba's forward does not take"}  # fmt: skip
    lens = convert(read(OF_6["standard"]) | {"model_from_pretrained_kwargs": {"dtype": "bfloat16", "n_devices": 2}})
    assert lens.table["model"]["dtype"] == "bfloat16"
    assert lens.lost == {"model_from_pretrained_kwargs": "n_devices is 2, and the model is on one here (model.device)"}


@pytest.mark.parametrize("name", sorted(OF_6))
def test_a_run_from_a_saved_sae_chooses_no_start(name: str) -> None:
    found = convert(with_sae(name, decoder_init_norm=0.5) | {"from_pretrained_path": "sae"})
    defaults = attrs.fields_dict(type(saekit.load_config(dict(found.table)).sae.options))
    start = {"decoder_heuristic_init", "b_dec_init_method", "init_encoder_as_decoder_transpose"}
    assert start <= defaults.keys()
    assert start & found.table["sae"].keys() == set()
    assert "training starts from a saved SAE" in found.dropped["sae.decoder_init_norm"]
    assert set(found.lost) == {"from_pretrained_path"}


def test_a_warm_up_that_outlasts_the_run_gets_as_far() -> None:
    for name, λ in (("standard", "l1"), ("jumprelu", "l0")):
        sae = {f"{λ}_coefficient": 5, f"{λ}_warm_up_steps": 100}
        found = convert(with_sae(name, **sae) | {"training_tokens": 39 * 64 + 1, "train_batch_size_tokens": 64})
        options = saekit.load_config(dict(found.table)).sae.options
        assert getattr(options, f"{λ}_coefficient") == 2.0
        assert getattr(options, f"{λ}_warm_up_steps") == 40
        assert f"5 is sae.{λ}_coefficient = 2: the warm-up is longer" in found.changed[f"sae.{λ}_coefficient"]


def test_a_name_that_sae_lens_made_is_not_kept() -> None:
    generated = "standard-16384-LR-5e-05-Tokens-1.229e+08", "64-L1-0.001-LR-0.0003-Tokens-2.000e+06"
    source = read(OF_6["standard"])
    for name in generated:
        found = convert(source | {"logger": source["logger"] | {"run_name": name}})
        assert "name" not in found.table["checkpoints"]
        assert "by the date and the site" in found.dropped["logger.run_name"]
    mine = convert(source | {"logger": source["logger"] | {"run_name": "mine"}})
    assert mine.table["checkpoints"]["name"] == "mine"


def test_no_separator_is_told_as_what_it_is() -> None:
    found = convert(read(OF_6["standard"]) | {"sequence_separator_token": None})
    assert saekit.load_config(dict(found.table)).dataset.sequence_separator_token == "none"
    assert found.changed["sequence_separator_token"] == "null is dataset.sequence_separator_token = 'none'"
    assert "sequence_separator_token" not in found.dropped


class Theirs:
    """A stranger's loader that knows a configuration of its own."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def detects(self, files: Any) -> bool:
        return False

    def load(self, files: Any) -> Any:
        raise NotImplementedError

    def convert_config(self, table: Any) -> Any:
        return self.said if "theirs" in table else None


OPTIONS = [attrs.make_class(f"Options{number}", {}, frozen=True, kw_only=True) for number in range(2)]


def managed(*said: Any) -> saekit.PluginManager:
    """With a stranger's loader for each, which says that."""
    plugins = saekit.PluginManager()
    for number, one in enumerate(said):
        plugin = fake_plugin(
            PRETRAINED_LOADERS, f"theirs_{number}", build=partial(_theirs, one), config=OPTIONS[number]
        )
        plugins.register(plugin, name=f"stranger{number}")
    return plugins


def _theirs(said: Any, config: object) -> Theirs:
    return Theirs(said)


def test_what_is_chosen_is_written_by_qualified_keys() -> None:
    table = {
        "site": {"hook_name": "x"},
        "sae": {"name": "topk", "k": 3, "activation": "relu"},
        "lr_schedule": "constant",
        "evals": {"run": ["reconstruction", {"name": "downstream"}]},
    }
    assert convert({"theirs": 1}, plugins=managed(Converted(table=table))).table == {
        "site": {"hook_name": "x"},
        "sae": {"name": "saekit:topk", "k": 3, "activation": "saekit:relu"},
        "lr_schedule": "saekit:constant",
        "evals": {"run": ["saekit:reconstruction", {"name": "saekit:downstream"}]},
    }


def test_a_strangers_loader_converts_its_own() -> None:
    table = {"training": {"lr": 3e-4}, "site": {"hook_name": "blocks.0.hook_resid_pre"}}
    mine = Converted(table=table, lost={"theirs": "is not here"})
    found = convert({"theirs": 1}, plugins=managed(mine))
    assert list(found.table) == ["site", "training"], "in our order"
    assert found.report() == ["NOT THE SAME: theirs: is not here"]
    with pytest.raises(ConfigError, match="both know this configuration; leave one out"):
        convert({"theirs": 1}, plugins=managed(mine, mine))
    with pytest.raises(SaekitError, match=r"convert_config.*expected a saekit.converted.ConvertedConfig, or None"):
        convert({"theirs": 1}, plugins=managed({"lr": 3}))
    with pytest.warns(PluginWarning, match="theirs_1"):
        assert convert({"theirs": 1}, plugins=managed(mine, 3)).lost == mine.lost
    with pytest.raises(ConfigError, match="madeup"):
        convert({"theirs": 1}, plugins=managed(Converted(table={"training": {"madeup": 1}})))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "run.toml"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match="No space left on device"):
            write_new(target, "seed = 3")
    assert list(tmp_path.iterdir()) == []
    write_new(target, "seed = 3")
    assert target.read_text() == "seed = 3"
    with pytest.raises(ConfigError, match="is there already; choose another name"):
        write_new(target, "seed = 4")


def test_a_coefficient_that_is_assumed_and_lowered_is_told() -> None:
    found = convert({
        "sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_pre", "lr": 1e-3, "training_tokens": 400,
        "train_batch_size_tokens": 10, "sae": {"architecture": "standard", "l1_warm_up_steps": 100},
    })  # fmt: skip
    assert found.assumed["sae.l1_coefficient"] == 1.0
    assert "1.0 is sae.l1_coefficient = 0.4: the warm-up is longer" in found.changed["sae.l1_coefficient"]


def test_of_arguments_that_changed_only_those_that_are_here_are_shown() -> None:
    base = {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_pre", "lr": 1e-3, "sae": {}}
    told = {"device_map": "auto", "torch_dtype": "bfloat16", "n_devices": 2, **NO_PROCESSING, "n_ctx": 8}
    found = convert({**base, "model_from_pretrained_kwargs": told})
    assert found.changed["model_from_pretrained_kwargs"] == "torch_dtype is model.dtype"
    found = convert({**base, "model_from_pretrained_kwargs": {"device_map": "auto", "n_ctx": 8}})
    assert "device_map" not in found.changed["model_from_pretrained_kwargs"]
    assert "device_map" in found.lost["model_from_pretrained_kwargs"]


@pytest.mark.parametrize("version", ["3.0.0_standard", "4.4.5_gated", "5.11.0_training_standard", "6.54.12_topk"])
def test_what_an_sae_states_is_no_run_to_convert(version: str) -> None:
    path = TESTS / f"fixtures/sae_lens_{version}" / "cfg.json"
    with pytest.raises(ConfigError, match=r"what an SAE states about itself.*SAE\.load\(FOLDER\)"):
        saekit.load_config(path)


def test_what_was_not_stated_is_as_sae_lens_has_it() -> None:
    found = convert({"hook_name": "blocks.0.hook_resid_pre", "lr": 1e-3, "sae_lens_version": "3.0.0"})
    config = saekit.load_config(dict(found.table))
    assert config.sae.options.expansion_factor == 4
    assert (config.sae.options.l1_coefficient, config.optimizer.options.beta1) == (1e-3, 0)
    assert found.assumed["l1_coefficient"] == 1e-3
    assert "assumed: adam_beta1 is 0.0, the default there" in found.report()


@pytest.mark.parametrize("path", [OF_2, OF_6["topk"], FLAT["5.11.0_gated"]], ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [[], ["sae.name=topk"]])
def test_one_that_is_not_converted_is_told_in_a_word(path: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        saekit.load_config(path, overrides)
    assert f"{path} is that of a run of sae-lens" in str(caught.value)
    assert f"`saekit convert-config {path} run.toml`" in str(caught.value)
    with pytest.raises(ConfigError, match="lr_scheduler_name: is a name of sae-lens"):
        saekit.load_config({"lr_scheduler_name": "constant", "llm_device": "cpu"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"architecture": "standard", "d_in": 3}, r"those of saekit:sae_lens can, and none of them knows"),
        ({"sae_lens_version": "3.0.0", "lr": 3}, "neither hook_name nor hook_point"),
        ([], "expected a table of options, found list"),
        ({"saes": {}, "hook_names": "x", "sae_lens_version": "6.1.0"}, r"MultiSAETrainingRunnerConfig.*saekit\.grid"),
        ({"hook_name": "x", "new_cached_activations_path": "y"}, "CacheActivationsRunnerConfig.*`saekit cache` writes"),
        ({"hook_name": "x", "d_in": 3, "d_sae": 4}, "it has no options of training"),
        (
            {"d_in": 3, "metadata": {"hook_name": "x", "sae_lens_version": "6.54.12"}},
            "in the runner_cfg.json beside it",
        ),
        ({"d_in": 3, "d_sae": 4, "reshape_activations": "none"}, r"saekit\.SAE\.load\(folder\) reads it"),
        ({"begin_batch_token": "bos", "context_size": 64}, "PretokenizeRunnerConfig.*saekit config --of pretokenize"),
        ({"saekit": {}}, "saekit's own already"),
        ({"hook_name": "x", "lr": 1, "sae_lens_version": "6.1.0"}, "under sae, and this one has no sae"),
        ({"hook_name": "x", "sae": {}, "logger": 3}, "logger: expected a table, found 3"),
    ],
)
def test_what_is_no_configuration_of_a_run(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(source)
