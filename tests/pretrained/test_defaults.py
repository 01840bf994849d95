"""What loaders say of defaults: nothing that no file states is passed off as known."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from support.formats import FIXTURES, GIVEN, copied, edit_json

import saekit
from saekit import SAE

STATED: dict[str, tuple[str, Collection[str]]] = {
    "connor_rob_hook_z": ("connor_rob_hook_z", {"model_name", "hook_layer", "context_size"}),
    "deepseek_r1": ("deepseek_r1", {"model_name"}),
    "dictionary_learning_0.1.0_topk": ("dictionary_learning", {"model_name", "context_size", "submodule_name"}),
    "gemma_2_transcoder": ("gemma_2_transcoder", ()),
    "gemma_scope_2_npz": ("gemma_2", ()),
    "gemma_scope_3": ("gemma_3", {"model_name", "hf_hook_name"}),
    "goodfire": ("goodfire", {"model_name"}),
    "llama_scope": ("llama_scope", {"model_name", "activation_scale"}),
    "llama_scope_r1_distill": ("llama_scope_r1_distill", {"activation_scale"}),
    "mntss_clt_layer": ("mntss", {"model_name"}),
    "mwhanna_transcoder": ("mwhanna", {"model_name", "context_size"}),
    "openai_v1_relu": ("openai", ()),
    "openai_v5_topk": ("openai", ()),
    "qwen_scope": ("qwen_scope", {"hf_hook_name"}),
    "sae_lens_2.1.3_legacy_pt": ("sae_lens_legacy", SAE_LENS := {
        "model_name", "hook_layer", "context_size", "prepend_bos", "dataset_path", "is_dataset_tokenized",
        "model_class_name", "model_kwargs", "model_from_pretrained_kwargs", "training_architecture",
        "training_architecture_details", "sae_lens_training_version", "l1_coefficient",
    }),
    "sae_lens_6.54.12_standard": ("sae_lens", SAE_LENS),
    "sparsify_1.3.3_skip_transcoder": ("sparsify", {"hf_hook_name"}),
    "sparsify_1.3.3_topk": ("sparsify", {"hf_hook_name", "model_name", "dataset_path", "context_size"}),
    "temporal": ("temporal", {"model_name"}),
}  # fmt: skip
"""Fixture: its loader, and the metadata that a file of it states, in its contents, its name or its folders',
or an option of the loader says."""
OTHER_NAMES = {"dictionary_learning_1", "mntss_clt_layer_transcoder", "mwhanna_transcoder"}


def loaded(name: str, folder: Path | None = None) -> SAE:
    return SAE.load(folder or FIXTURES / name, loader=GIVEN.get(name))


def test_all_loaders_are_here() -> None:
    keys = {item.entry.name for item in saekit.default_manager().registry("pretrained_loaders").items}
    assert keys == {loader for loader, _ in STATED.values()} | OTHER_NAMES


@pytest.mark.parametrize("name", STATED)
def test_what_no_file_states_is_said_to_be_a_default(tmp_path: Path, name: str) -> None:
    loader, stated = STATED[name]
    sae = loaded(name)
    for one in (sae, SAE.load(sae.save(tmp_path))):
        assert one.info.provenance["loader"] == f"saekit:{loader}"
        unstated = set(one.info.metadata) - {*stated, "defaulted"}
        found = one.info.provenance.get("defaulted", [])
        assert unstated <= {*found}
        assert not {*found} & {*stated}
        assert len(found) == len({*found})


def test_what_a_file_leaves_out_is_one_more(tmp_path: Path) -> None:
    folder = copied("connor_rob_hook_z", tmp_path)
    edit_json(next(folder.glob("*_cfg.json")), lambda table: (table.pop("seq_len"), table.pop("model_name")))
    info = loaded("connor_rob_hook_z", folder).info
    assert info.metadata["context_size"] == 128
    assert info.provenance["defaulted"] == ["model_name", "context_size", "prepend_bos"]
    folder = copied("mwhanna_transcoder", tmp_path / "b")
    for path in folder.glob("*.yaml"):
        path.unlink()
    info = loaded("mwhanna_transcoder", folder).info
    assert "model_name" not in info.metadata
    assert info.provenance["defaulted"] == [
        "feature_input_hook", "feature_output_hook", "prepend_bos", "dataset_path", "model_class_name",
        "model_from_pretrained_kwargs",
    ]  # fmt: skip
    (tmp_path / "c").mkdir()
    folder = copied("mntss_clt_layer", tmp_path / "c")
    (folder / "config.yaml").unlink()
    assert loaded("mntss_clt_layer", folder).info.provenance["defaulted"][:2] == [
        "feature_input_hook", "feature_output_hook",
    ]  # fmt: skip


RENAMED = {
    "connor_rob_hook_z": {"act_size": "d_in", "seq_len": "context_size"},
    "gemma_scope_3": {"w_enc": "W_enc", "hf_hook_point_in": "hf_hook_name"},
    "llama_scope": {"encoder.weight": "W_enc.T", "jump_relu_threshold": "threshold", "d_model": "d_in"},
    "mntss_clt_layer": {"W_enc_4": "W_enc.T", "W_dec_4": "W_dec"},
    "mwhanna_transcoder": {"W_enc": "W_enc.T", "batch_size": "context_size"},
    "openai_v1_relu": {"pre_bias": "b_dec", "latent_bias": "b_enc"},
    "qwen_scope": {"W_enc": "W_enc.T", "W_dec": "W_dec.T"},
    "temporal": {"D": "W_dec", "model_hf_name": "model_name"},
}


@pytest.mark.parametrize("name", RENAMED)
def test_their_names_for_what_is_called_otherwise_here(name: str) -> None:
    found = loaded(name).info.provenance["renamed"]
    assert found.items() >= RENAMED[name].items()
    assert all(theirs != ours for theirs, ours in found.items())
