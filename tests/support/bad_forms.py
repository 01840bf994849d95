"""The good files of which bad ones are made: those of every format that is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from support.formats import FIXTURES, GIVEN, copied
from support.saved import make as own_sae

EVIL = "../../evil"


@attrs.frozen
class Form:
    """Files of a format, as a fixture has them."""

    fixture: str
    """The folder; "" is saekit's own."""
    weights: str
    """The file of weights, below it."""
    config: str = ""
    """The file that says what they are, if there is one."""
    matrix: str = "W_enc"
    bias: str = "b_enc"
    loader: Mapping[str, Any] | None = None


LINEAR = {"matrix": "encoder.weight", "bias": "encoder.bias"}
_CONNOR = "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds64_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
_DISTILL = "800M-Slimpajama-0-OpenR1-Math-220k/L3R"
_SAE = "sae_weights.safetensors"
_LLAMA = "Llama3_1-8B-Base-L3R-8x"
FORMS = {
    "saekit": Form("", "sae_weights.safetensors", "cfg.json"),
    "sae_lens": Form("sae_lens_6.54.12_standard", "sae_weights.safetensors", "cfg.json"),
    "sae_lens 2": Form("sae_lens_2.1.3_folder_scaled", "sae_weights.safetensors", "cfg.json"),
    "gemma_3": Form(
        "gemma_scope_3",
        "resid_post/layer_9_width_16k_l0_small/params.safetensors",
        "resid_post/layer_9_width_16k_l0_small/config.json",
        "w_enc",
    ),
    "llama_scope": Form(
        "llama_scope", f"{_LLAMA}/checkpoints/final.safetensors", f"{_LLAMA}/hyperparams.json", **LINEAR
    ),
    "llama_scope_r1_distill": Form(
        "llama_scope_r1_distill",
        f"{_DISTILL}/sae_weights.safetensors",
        f"{_DISTILL}/config.json",
        loader=GIVEN["llama_scope_r1_distill"],
        **LINEAR,
    ),
    "sparsify": Form("sparsify_1.3.3_topk", "layers.2/sae.safetensors", "layers.2/cfg.json", **LINEAR),
    "mwhanna": Form("mwhanna_transcoder", "layer_6.safetensors", "config.yaml"),
    "mntss": Form("mntss_clt_layer", "W_enc_4.safetensors", "config.yaml", "W_enc_4", "b_enc_4"),
    "connor_rob_hook_z": Form("connor_rob_hook_z", f"{_CONNOR}.pt", f"{_CONNOR}_cfg.json"),
    "dictionary_learning": Form("dictionary_learning_0.1.0_topk", "ae.pt", "config.json", **LINEAR),
    "deepseek_r1": Form("deepseek_r1", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", **LINEAR),
    "goodfire": Form(
        "goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth", "", "encoder_linear.weight", "encoder_linear.bias"
    ),
    "qwen_scope": Form("qwen_scope", "layer0.sae.pt", loader=GIVEN["qwen_scope"]),
    "openai": Form("openai_v1_relu", "mlp_post_act/autoencoders/3.pt", "", "encoder.weight", "latent_bias"),
    "gemma_2": Form("gemma_scope_2_npz", "", "", "W_enc", loader={"name": "gemma_2"}),
    "gemma_2_transcoder": Form("gemma_2_transcoder", "", "", "W_enc", loader={"name": "gemma_2_transcoder"}),
    "temporal": Form("temporal", "layer_12/temporal/latest_ckpt.safetensors", "layer_12/temporal/conf.yaml", "D", "b"),
    "matching_pursuit": Form("sae_lens_6.54.12_matching_pursuit", _SAE, "cfg.json", "W_dec", "b_dec"),
    "gated": Form("sae_lens_6.54.12_gated", _SAE, "cfg.json", "W_enc", "r_mag"),
    "gated of dictionary_learning": Form(
        "dictionary_learning_0.1.0_gated", "ae.pt", "config.json", "decoder.weight", "mag_bias"
    ),
    "transcoder": Form("sae_lens_6.54.12_transcoder", _SAE, "cfg.json"),
    "skip_transcoder": Form("sae_lens_6.54.12_skip_transcoder", _SAE, "cfg.json", "W_skip"),
    "jumprelu_skip_transcoder": Form(
        "sae_lens_6.54.12_jumprelu_skip_transcoder", _SAE, "cfg.json", "W_dec", "threshold"
    ),
    "transcoder of sparsify": Form(
        "sparsify_1.3.3_skip_transcoder", "layers.2.mlp/sae.safetensors", "layers.2.mlp/cfg.json", "W_skip", "b_dec"
    ),
    "sae_lens_legacy pt": Form("sae_lens_2.1.3_legacy_pt", ""),
    "sae_lens_legacy gz": Form("sae_lens_2.1.3_legacy_pkl_gz", "sae.pkl.gz"),
}


def good(form: Form, folder: Path) -> Path:
    """A copy of the fixture, without the checksums of saekit's own."""
    if form.fixture:
        return copied(form.fixture, folder)
    own_sae().save(folder)
    table = json.loads((folder / "cfg.json").read_text())
    del table["saekit"]["sha256"], table["saekit"]["seal"]
    (folder / "cfg.json").write_text(json.dumps(table))
    return folder


def _at_home(form: Form) -> Form:
    """With the path of its one file of weights, where the fixture's name says too much to be written out."""
    if form.weights or not form.fixture:
        return form
    (path,) = [p for p in (FIXTURES / form.fixture).rglob("*") if p.suffix in (".npz", ".pt", ".pkl")]
    return attrs.evolve(form, weights=path.relative_to(FIXTURES / form.fixture).as_posix())


FORMS = {name: _at_home(form) for name, form in FORMS.items()}
