"""SAEs that other libraries saved: what they compute with them is what saekit computes, also when saved again."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import hooked_transformer, run_config

import saekit
from saekit import SAE
from saekit.errors import ConfigError, SAEFormatError
from saekit.for_sae_lens import NO_PROCESSING
from saekit.tokens import TokenChoice

FIXTURES = Path(__file__).parents[1] / "fixtures"
LOADED = {
    "sae_lens_2.1.3_folder_scaled": "saekit:standard",
    "sae_lens_3.0.0_standard": "saekit:standard",
    "sae_lens_4.4.5_standard": "saekit:standard",
    "sae_lens_5.11.0_standard": "saekit:standard",
    "sae_lens_6.54.12_standard": "saekit:standard",
    "sae_lens_4.4.5_topk": "saekit:topk",
    "sae_lens_4.4.5_standard_topk": "saekit:topk",
    "sae_lens_5.11.0_topk": "saekit:topk",
    "sae_lens_6.54.12_topk": "saekit:topk",
    "sae_lens_6.54.12_training_topk": "saekit:topk",
    "sae_lens_6.54.12_abstopk": "saekit:abstopk",
    "sae_lens_6.54.12_matching_pursuit": "saekit:matching_pursuit",
    "sae_lens_6.54.12_temporal": "saekit:temporal",
    "sae_lens_4.4.5_training_standard": "saekit:standard",
    "sae_lens_5.11.0_training_standard": "saekit:standard",
    "sae_lens_5.11.0_standard_topk": "saekit:topk",
    "sae_lens_6.54.12_batchtopk": "saekit:batchtopk",
    "sae_lens_6.54.12_matryoshka_batchtopk": "saekit:matryoshka",
    "sae_lens_4.4.5_jumprelu": "saekit:jumprelu",
    "sae_lens_5.11.0_jumprelu": "saekit:jumprelu",
    "sae_lens_6.54.12_jumprelu": "saekit:jumprelu",
    "sae_lens_6.54.12_training_jumprelu": "saekit:jumprelu",
    "sae_lens_4.4.5_gated": "saekit:gated",
    "sae_lens_5.11.0_gated": "saekit:gated",
    "sae_lens_6.54.12_gated": "saekit:gated",
    "sae_lens_6.54.12_training_gated": "saekit:gated",
    "connor_rob_hook_z": "saekit:standard",
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", list(LOADED))
def test_what_the_peer_computes(tmp_path: Path, name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    sae = SAE.load(FIXTURES / name)
    assert sae.info.architecture == LOADED[name]
    for loaded in (sae, SAE.load(sae.save(tmp_path / "again"))):
        features = loaded.encode(expected["x"])
        close(features, expected["encode"])
        close(loaded.decode(features, like=expected["x"]), expected["decode"])
        close(loaded.encode_sparse(expected["x"]).dense(), expected["encode"].reshape(-1, 64))


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_of_batchtopk(tmp_path: Path, kind: str) -> None:
    """The peer chooses the largest of these rows together, as in training; alone, the threshold decides."""
    folder = FIXTURES / f"sae_lens_6.54.12_training_{kind}"
    expected, sae = load_file(folder / "expected.safetensors"), SAE.load(folder)
    with torch.no_grad():
        features = sae.training_features(sae.pre_activations(expected["x"]))
        close(features, expected["encode"])
        close(sae.decode(features), expected["decode"])
    assert sae.threshold == load_file(folder / "sae_weights.safetensors")["topk_threshold"].float()
    assert sae.config.k == 8
    again = SAE.load(sae.save(tmp_path / "again"))
    assert again.info.architecture == sae.info.architecture == f"saekit:{kind.partition('_')[0]}"
    close(again(expected["x"]), sae(expected["x"]))


def test_a_matryoshka_trains_on_as_it_was_trained() -> None:
    sae = SAE.load(FIXTURES / "sae_lens_6.54.12_training_matryoshka_batchtopk")
    config = sae.config
    assert (sae.ends, sae.factors) == ((16, 32, 64), (1, 1, 1))
    assert (config.aux_loss_levels, config.aux_loss_coefficient, config.aux_loss_normalization) == ("each", 1.0, "none")
    other = SAE.load(FIXTURES / "dictionary_learning_0.1.0_matryoshka")
    assert (other.ends, other.factors) == ((16, 32, 64), (1 / 9, 1 / 9, 1 / 9))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (None, "matryoshka_widths in cfg.json in .* is None, expected a list of whole numbers from 1 to d_sae = 64"),
        ([16, 65], r"is \[16, 65\], expected a list of whole numbers from 1 to d_sae = 64"),
        ([16.5], r"is \[16.5\], expected a list of whole numbers"),
        ([32, 16], r"matryoshka_widths in cfg.json in .* are \[32, 16\], expected widths that rise"),
    ],
)
def test_widths_that_do_not_fit(tmp_path: Path, widths: Any, message: str) -> None:
    folder = copied(tmp_path, "sae_lens_6.54.12_training_matryoshka_batchtopk", {"matryoshka_widths": widths})
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)


def test_a_matryoshka_whose_levels_are_not_said_is_a_batchtopk(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sae_lens_6.54.12_matryoshka_batchtopk")
    table = json.loads((folder / "cfg.json").read_text())
    del table["metadata"]["training_architecture_details"]["matryoshka_widths"]
    (folder / "cfg.json").write_text(json.dumps(table))
    assert SAE.load(folder).info.architecture == "saekit:batchtopk"


def copied(tmp_path: Path, name: str, changes: dict[str, Any] | None = None, to: torch.dtype | None = None) -> Path:
    """A copy of a fixture; changes of top-level fields of its cfg.json (None: removed), weights of another type."""
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "cfg.json").read_text()) | (changes or {})
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if to is not None:
        weights = {key: value.to(to) for key, value in load_file(folder / "sae_weights.safetensors").items()}
        save_file(weights, folder / "sae_weights.safetensors")
    return folder


def test_a_jumprelu_trains_on_as_it_was_trained() -> None:
    sae = SAE.load(FIXTURES / "sae_lens_6.54.12_training_jumprelu")
    found = (sae.config.bandwidth, sae.config.initial_threshold, sae.config.l0_coefficient, sae.config.sparsity_loss)
    assert found == (0.05, 0.01, 1.0, "l0")
    assert sae.config.aux_loss_coefficient == 0


def test_a_jumprelu_by_its_thresholds_alone(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sae_lens_6.54.12_jumprelu")
    table = json.loads((folder / "cfg.json").read_text())
    for name in ("training_architecture", "training_architecture_details"):
        del table["metadata"][name]
    (folder / "cfg.json").write_text(json.dumps(table))
    assert SAE.load(folder).info.architecture == "saekit:jumprelu"
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["threshold"].fill_(0.3)
    save_file(tensors, folder / "sae_weights.safetensors")
    assert SAE.load(folder).info.architecture == "saekit:batchtopk", "which is saved so"
    table["metadata"]["training_architecture"] = "jumprelu"
    (folder / "cfg.json").write_text(json.dumps(table))
    assert SAE.load(folder).info.architecture == "saekit:jumprelu"


def test_logarithms_of_thresholds(tmp_path: Path) -> None:
    """Training checkpoints of the first sae-lens 6."""
    folder = copied(tmp_path, "sae_lens_6.54.12_training_jumprelu")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, folder / "sae_weights.safetensors")
    expected = load_file(folder / "expected.safetensors")
    close(SAE.load(folder).encode(expected["x"]), expected["encode"])


@pytest.mark.parametrize("k", [None, 0, 65, 2.5, "8", True])
def test_a_topk_needs_its_k(tmp_path: Path, k: object) -> None:
    folder = copied(tmp_path, "sae_lens_6.54.12_topk", {"k": k})
    with pytest.raises(SAEFormatError, match=rf"k \(or activation_fn_kwargs.k\) in cfg.json in .* is {k!r}, expected"):
        SAE.load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sae_lens_6.54.12_standard", "sae_lens_6.54.12_batchtopk"])
def test_the_type_of_the_weights_is_kept(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    folder = copied(tmp_path, name, to=dtype)
    own = torch.float32 if dtype == torch.float16 else dtype  # saekit computes in none smaller than bfloat16
    sae = SAE.load(folder)
    assert {value.dtype for value in sae.parameters()} == {own}
    assert sae.config.dtype == str(own).removeprefix("torch.")
    again = SAE.load(sae.save(tmp_path / "again"))
    assert {value.dtype for value in again.parameters()} == {own}
    assert load_file(tmp_path / "again/sae_weights.safetensors")["W_dec"].dtype == own
    assert json.loads((tmp_path / "again/cfg.json").read_text())["dtype"] == str(own).removeprefix("torch.")
    assert torch.equal(again.W_enc, sae.W_enc)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sae_lens_6.54.12_standard", "sae_lens_6.54.12_topk", "sae_lens_6.54.12_batchtopk"])
def test_an_sae_that_was_moved_to_another_type(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    sae = SAE.load(FIXTURES / name).to(dtype)
    again = SAE.load(sae.save(tmp_path / "again"))
    config = json.loads((tmp_path / "again/cfg.json").read_text())
    weights = load_file(tmp_path / "again/sae_weights.safetensors")
    saved = weights["W_dec"].dtype
    assert saved == dtype or "topk" in name  # whose norms are folded, which may need a wider one
    assert config["dtype"] == str(saved).removeprefix("torch.")
    assert again.W_dec.dtype == (torch.float32 if saved == torch.float16 else saved)
    assert again.config.dtype == str(again.W_dec.dtype).removeprefix("torch.")
    assert torch.equal(again.W_dec.to(saved), weights["W_dec"])


# ---- activations that were scaled in training

SCALED = {"normalize_activations": "expected_average_only_in"}


@pytest.mark.parametrize("name", ["sae_lens_6.54.12_standard", "sae_lens_6.54.12_training_topk",
                                  "sae_lens_6.54.12_training_batchtopk"])  # fmt: skip
def test_the_peers_scaler_file(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path, name, SCALED)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 1.7}')
    plain, sae = SAE.load(FIXTURES / name), SAE.load(folder)
    x = load_file(FIXTURES / name / "expected.safetensors")["x"]
    close(sae(x), plain(1.7 * x) / 1.7)
    assert sae.info.metadata["activation_scale"] == 1.7
    assert not sae.info.scale_is_unknown
    again = SAE.load(sae.save(tmp_path / "again"))
    close(again(x), sae(x))
    assert again.info.metadata["activation_scale"] == 1.7
    assert json.loads((tmp_path / "again/cfg.json").read_text())["normalize_activations"] == "none"


def test_a_factor_into_bfloat16_is_not_rounded(tmp_path: Path) -> None:
    name = "sae_lens_6.54.12_standard"
    folder = copied(tmp_path, name, SCALED, to=torch.bfloat16)
    sae = SAE.load(folder, loader={"name": "sae_lens", "activation_scale": 1.7})
    weights = load_file(folder / "sae_weights.safetensors")
    assert torch.equal(sae.W_enc, weights["W_enc"].float() * 1.7)


@pytest.mark.parametrize("scaler", [None, '{"scaling_factor": null}'])
def test_an_unknown_factor_stays_known_to_be_unknown(tmp_path: Path, scaler: str | None) -> None:
    folder = copied(tmp_path, "sae_lens_6.54.12_standard", SCALED)
    if scaler:
        (folder / "activation_scaler.json").write_text(scaler)
    with pytest.warns(UserWarning, match=r"copy was trained on .* does not hold the factor: scale its input"):
        sae = SAE.load(folder)
    sae.save(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again/cfg.json").read_text())["normalize_activations"]
        == SCALED["normalize_activations"]
    )
    with pytest.warns(UserWarning, match=r"again was trained on .* does not hold the factor: scale its input"):
        again = SAE.load(tmp_path / "again")
    with pytest.warns(UserWarning, match="does not hold the factor"):  # other readers are told, too
        SAE.load(tmp_path / "again", loader="sae_lens")
    x = load_file(FIXTURES / "sae_lens_6.54.12_standard/expected.safetensors")["x"]
    before = again(2 * x)
    again.fold_activation_scale(2.0)
    close(again(x), before / 2)
    once_more = SAE.load(again.save(tmp_path / "folded"))  # and says nothing
    close(once_more(x), before / 2)
    assert once_more.info.metadata["activation_scale"] == 2.0


@pytest.mark.parametrize(
    ("config", "scaler", "option", "message"),
    [
        (SCALED, '{"scaling_factor": "1"}', None, "scaling_factor in activation_scaler.json of .* is '1', expected a"),
        (SCALED, '{"scaling_factor": -1}', None, "is -1, expected a number above 0, or null"),
        (SCALED, '{"scaling_factor": NaN}', None, "is nan, expected"),
        (SCALED, "{", None, "activation_scaler.json in .* is not valid JSON"),
        (SCALED, '{"scaling_factor": 2}', 3.0, "activation_scale is 3.0, but activation_scaler.json in .* says 2.0"),
        ({}, '{"scaling_factor": 2}', None, "says that activations were not scaled, and activation_scaler.json says 2"),
        ({}, None, 3.0, "says that activations were not scaled, and activation_scale is 3.0"),
    ],
)
def test_factors_that_cannot_be(
    tmp_path: Path, config: dict[str, Any], scaler: str | None, option: float | None, message: str
) -> None:
    folder = copied(tmp_path, "sae_lens_6.54.12_standard", config)
    if scaler is not None:
        (folder / "activation_scaler.json").write_text(scaler)
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder, loader={"name": "sae_lens", "activation_scale": option})


# ---- what the SAE is fed


def test_metadata_is_kept_saved_and_shown(tmp_path: Path) -> None:
    fed = {
        "model_name": "gpt2", "model_class_name": "HookedTransformer", "context_size": 64, "prepend_bos": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": False}, "sequence_separator_token": "eos",
        "exclude_special_tokens": [0, 1], "seqpos_slice": [1, None], "dataset_path": "a/b", "hook_name_out": "x",
    }  # fmt: skip
    site = {"hook_name": "blocks.0.hook_resid_pre", "sae_lens_version": "6.54.12"}
    new = SAE.load(copied(tmp_path / "new", "sae_lens_6.54.12_standard", {"metadata": fed | site}))
    fed["model_from_pretrained_kwargs"] = {**NO_PROCESSING}  # in full
    assert dict(new.info.metadata) == fed
    chosen = TokenChoice(exclude={0, 1}, seqpos_slice=(1, None))
    assert TokenChoice.of_metadata(new.info.metadata, special={7}) == chosen
    assert chosen.metadata().items() <= fed.items(), "and as it is written here"
    again = SAE.load(new.save(tmp_path / "again"))
    assert again.info.metadata == new.info.metadata
    public = json.loads((tmp_path / "again/cfg.json").read_text())["metadata"]
    assert fed.items() <= public.items()
    assert public["sae_lens_version"] == "6.0.0"
    assert repr(again) == "StandardSAE(d_in=16, d_sae=64, blocks.0.hook_resid_pre of gpt2, float32 on cpu)"
    shown = html.unescape(again._repr_html_())
    assert all(text in shown for text in ("center_writing_weights", "'eos'", "[0, 1]", "blocks.0.hook_resid_pre"))
    del fed["hook_name_out"]
    old = SAE.load(copied(tmp_path / "old", "sae_lens_5.11.0_standard", fed | {"hook_layer": 0, "l1_coefficient": 3}))
    assert dict(old.info.metadata) == fed | {"hook_layer": 0, "sae_lens_training_version": "5.11.0"}


def test_what_the_file_does_not_state_is_not_invented(tmp_path: Path) -> None:
    weights = load_file(FIXTURES / "sae_lens_3.0.0_standard/sae_weights.safetensors")
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text('{"d_in": 16, "d_sae": 64, "hook_point": "blocks.0.hook_resid_pre"}')
    sae = SAE.load(tmp_path)
    assert dict(sae.info.metadata) == {"defaulted": ["architecture", "apply_b_dec_to_input", "activation_fn"]}
    assert sae.config.apply_b_dec_to_input
    stated = SAE.load(FIXTURES / "sae_lens_3.0.0_standard").info.metadata
    assert stated["defaulted"] == ["architecture"]
    assert stated["prepend_bos"] is True
    assert "defaulted" not in SAE.load(FIXTURES / "sae_lens_6.54.12_batchtopk").info.metadata


def test_a_run_says_what_its_sae_is_fed(tmp_path: Path) -> None:
    backend = {"name": "HookedTransformer", "forward_kwargs": {"prepend_bos": False}}
    config = run_config(tmp_path, model={"backend": backend}, dataset={"sequence_separator_token": "eos"})
    config["training"]["training_tokens"] = 512
    metadata = SAE.load(saekit.train(config).folder).info.metadata
    expected = {
        "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {}, "model_autocast": False,
        "model_forward_kwargs": {"prepend_bos": False}, "sequence_separator_token": "eos", "prepend_bos": True,
    }  # fmt: skip
    assert expected.items() <= metadata.items()


def test_a_run_from_an_sae_whose_factor_is_unknown(tmp_path: Path) -> None:
    """Its weights are for scaled activations as they are."""
    source = SAE.load(FIXTURES / "sae_lens_6.54.12_standard")
    folder = copied(tmp_path, "sae_lens_6.54.12_standard", SCALED)
    config = run_config(
        tmp_path,
        training={"training_tokens": 256, "from_pretrained_path": str(folder), "lr": 1e-30},
        sae={"d_sae": 64, "normalize_sae_decoder": False},
        site={"hook_name": "blocks.0.hook_resid_pre"},
    )
    model = hooked_transformer()
    with (
        pytest.warns(UserWarning, match="does not hold the factor"),
        pytest.raises(ConfigError, match="activations.normalize_activations: is 'none', but the SAE in .* by a factor"),
    ):
        saekit.train(config, model=model)
    config["activations"]["normalize_activations"] = "expected_average_only_in"
    with pytest.warns(UserWarning, match="does not hold the factor"):
        sae = saekit.train(config, model=model).sae
    scale = sae.info.metadata["activation_scale"]
    assert scale != 1
    close(sae.W_enc, source.W_enc * scale)
    close(sae.b_dec, source.b_dec / scale)
    assert not sae.info.scale_is_unknown
