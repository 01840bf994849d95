"""What other libraries write with every option, and every folder of theirs: saekit computes what they do.

``tests/golden_variants/make_variants.py`` made the variants.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.formats import FIXTURES, GIVEN, copied, edit_json, edit_tensors
from support.saved import sae_lens_python

from saekit import SAE
from saekit.errors import SAEFormatError

VARIANTS = Path(__file__).parents[1] / "golden_variants"
ARCHITECTURES = {
    "sae_lens_topk": "topk",
    "sae_lens_abstopk": "abstopk",
    "sae_lens_pursuit": "matching_pursuit",
    "sae_lens_temporal": "temporal",
    "sparsify_groupmax": "groupmax",
    "sparsify_groupmax_skip": "groupmax_transcoder",
    "sparsify_groupmax_transcoder": "groupmax_transcoder",
    "sparsify_groupmax_skip_around": "groupmax_transcoder",
    "sparsify_topk": "topk",
    "sparsify_topk_skip_around": "topk_transcoder",
    "sparsify_topk_transcoder": "topk_transcoder",
    "dictionary_learning_batchtopk": "batchtopk",
    "dictionary_learning_matryoshka": "matryoshka",
    "dictionary_learning_topk": "topk",
}
"""By the beginning of a variant's name, the longest that fits."""


def variants() -> list[str]:
    return sorted(path.name for path in VARIANTS.iterdir() if (path / "expected.safetensors").exists())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", variants())
def test_every_option_of_the_peers(tmp_path: Path, name: str) -> None:
    expected = load_file(VARIANTS / name / "expected.safetensors")
    x = expected["x"]
    loaded = SAE.load(VARIANTS / name)
    key = max((begin for begin in ARCHITECTURES if name.startswith(begin)), key=len)
    assert loaded.info.architecture == f"saekit:{ARCHITECTURES[key]}"
    for sae in (loaded, SAE.load(loaded.save(tmp_path / "again"))):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                features = sae.encode(x)
                assert features.dtype == expected["encode"].dtype
                close(features, expected["encode"])
                close(sae.decode(features, like=x), expected["decode"].to(x.dtype))
                close(sae(x), expected["forward"].to(x.dtype))
        close(sae.encode_sparse(x).dense().reshape(features.shape), expected["encode"])


def test_the_variants_differ_where_their_options_do() -> None:
    """Else a wrong option would pass: rows fire as often as they may, some features are below zero, and so on."""
    of = {name: load_file(VARIANTS / name / "expected.safetensors")["encode"] for name in variants()}
    assert all(
        (of[f"sae_lens_abstopk_{name}"] < 0).any() for name in ("rescaled", "not_rescaled", "heads", "checkpoint")
    )
    assert ((of["sae_lens_pursuit_iterations"] != 0).sum(-1) == 3).all()
    assert (of["sae_lens_pursuit_duplicates"] != 0).sum(-1).max() < 12
    assert (of["sae_lens_temporal_relu"] != 0).sum(-1).min() > 5
    assert len({(of["sae_lens_pursuit_threshold"][row] != 0).sum().item() for row in range(12)}) > 2


# ---- every folder

SUMMED = {"mntss_clt_layer"}
"""Of which the peer adds up what is written to several layers."""
TOGETHER = {"sae_lens_6.54.12_training_batchtopk", "sae_lens_6.54.12_training_matryoshka_batchtopk"}
"""Of which the peer chooses features of a whole batch, as in training."""
ELSEWHERE = {"sae_lens_2.1.3_group_folder"}
"""Which other tests load."""
FOLDERS = sorted({path.parent.name for path in FIXTURES.glob("*/expected.safetensors")} - TOGETHER - ELSEWHERE)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_gives_the_peers_features_and_reconstruction(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    sae, x = SAE.load(FIXTURES / name, loader=GIVEN.get(name)), expected["x"]
    features = sae.encode(x)
    close(features, expected["encode"])
    decoded, forward = sae.decode(features, like=x), sae(x)
    if name in SUMMED:
        decoded, forward = sae.ports.sum_of_targets(decoded), sae.ports.sum_of_targets(forward)
    close(decoded, expected["decode"])
    if "forward" in expected:
        close(forward, expected["forward"])
    for field, wanted in said(FIXTURES / name):
        site = sae.info.sites and sae.info.sites.inputs[0]
        places = {} if site is None else {"hook_name": site.hook_name, "hook_head_index": site.hook_head_index}
        assert (places | dict(sae.info.metadata)).get(field) == wanted, field


def said(folder: Path) -> Iterator[tuple[str, Any]]:
    """Hook, head, context and BOS as ``cfg.json`` says them, where it does."""
    if not (folder / "cfg.json").exists():
        return
    table = json.loads((folder / "cfg.json").read_text())
    table |= table.get("metadata", {})
    for field, names in {
        "hook_name": ("hook_name", "hook_point"),
        "hook_head_index": ("hook_head_index", "hook_point_head_index"),
        "context_size": ("context_size",),
        "prepend_bos": ("prepend_bos",),
        "model_name": ("model_name",),
    }.items():
        for name in names:
            if table.get(name) is not None:
                yield field, table[name]


# ---- what is refused, and what must not be read as something else


@pytest.mark.parametrize("name", ["sae_lens_4.4.5_standard_topk", "sae_lens_5.11.0_standard_topk"])
def test_a_standard_with_the_activation_of_topk_is_a_topk(tmp_path: Path, name: str) -> None:
    """Never ReLU: at most k features of a row are active; and without k it is refused."""
    folder = copied(name, tmp_path)
    table = json.loads((folder / "cfg.json").read_text())
    assert (table["architecture"], table["activation_fn_str"]) == ("standard", "topk")
    sae = SAE.load(folder)
    x = load_file(FIXTURES / name / "expected.safetensors")["x"]
    assert ((sae.encode(x) != 0).sum(-1) <= table["activation_fn_kwargs"]["k"]).all()
    assert ((sae.pre_activations(x) > 0).sum(-1) > table["activation_fn_kwargs"]["k"]).any()
    edit_json(folder / "cfg.json", lambda changed: changed["activation_fn_kwargs"].pop("k"))
    with pytest.raises(SAEFormatError, match=r"k \(or activation_fn_kwargs.k\) in cfg.json in .* is None, expected"):
        SAE.load(folder)


@pytest.mark.parametrize("name", ["3.0.0_standard", "4.4.5_standard", "4.4.5_topk", "5.11.0_jumprelu", "5.11.0_topk"])
def test_factors_of_fine_tuning(tmp_path: Path, name: str) -> None:
    """Features are multiplied by them before they are decoded, and come out of ``encode`` as they were."""
    folder = copied(f"sae_lens_{name}", tmp_path)
    edit_json(folder / "cfg.json", lambda table: table.update(finetuning_scaling_factor=True))
    with pytest.raises(
        SAEFormatError, match="cfg.json in .* says finetuning_scaling_factor, and the weights beside it"
    ):
        SAE.load(folder)
    factors = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    edit_tensors(folder / "sae_weights.safetensors", lambda tensors: tensors.update(finetuning_scaling_factor=factors))
    expected = load_file(FIXTURES / f"sae_lens_{name}/expected.safetensors")
    plain, loaded = SAE.load(FIXTURES / f"sae_lens_{name}"), SAE.load(folder)
    for sae in (loaded, SAE.load(loaded.save(tmp_path / "again"))):
        features = sae.encode(expected["x"])
        close(features, expected["encode"])
        close(sae.decode(features), features * factors @ plain.W_dec + plain.b_dec)
        close(sae(expected["x"]), sae.decode(features))


@pytest.mark.parametrize("name", ["3.0.0_standard", "4.4.5_standard", "5.11.0_standard"])
def test_tanh_relu_is_no_relu(tmp_path: Path, name: str) -> None:
    folder = copied(f"sae_lens_{name}", tmp_path)
    edit_json(folder / "cfg.json", lambda table: table.update(activation_fn_str="tanh-relu"))
    expected = load_file(FIXTURES / f"sae_lens_{name}/expected.safetensors")
    sae = SAE.load(folder)
    close(sae.encode(expected["x"]), expected["encode"].tanh())
    close(sae(expected["x"]), expected["encode"].tanh() @ sae.W_dec + sae.b_dec)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "abstopk without k": ("sae_lens_abstopk_rescaled", {"k": None}, "is None, expected a whole number from 1 to d_sae"),
    "a threshold of another kind": (
        "sae_lens_pursuit_threshold", {"residual_threshold": "small"}, "residual_threshold in .* is 'small', expected",
    ),
    "a flag of another kind": (
        "sae_lens_pursuit_threshold", {"stop_on_duplicate_support": 1}, "stop_on_duplicate_support in .* is 1, exp",
    ),
    "no iterations": ("sae_lens_pursuit_threshold", {"max_iterations": 0}, "max_iterations in .* is 0, expected a"),
    "no heads": ("sae_lens_temporal_relu", {"n_heads": None}, "n_heads in .* is None, expected a whole number of 1"),
    "heads that do not divide": ("sae_lens_temporal_relu", {"n_heads": 5}, "n_heads = 15 must divide"),
    "no tie": ("sae_lens_temporal_relu", {"tied_weights": None}, "tied_weights in .* is None, expected true or false"),
    "untied without an encoder": ("sae_lens_temporal_relu", {"tied_weights": False}, "W_enc is missing"),
    "one layer more": ("sae_lens_temporal_relu", {"n_attn_layers": 2}, "attention_1_k_ctx_weight is missing"),
    "another kind of features": ("sae_lens_temporal_relu", {"sae_diff_type": "nice"}, "sae_diff_type in .* is 'nice'"),
    "a factor of 0": (
        "sae_lens_temporal_scaled", {"activation_normalization_factor": 0}, "normalization_factor in .* is 0, expected",
    ),
    "a scale that is temporal's alone": (
        "sae_lens_topk_rescaled", {"normalize_activations": "constant_scalar_rescale"}, "'constant_scalar_rescale'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, what: str) -> None:
    name, changes, message = REFUSED[what]
    folder = copied_variant(name, tmp_path)
    edit_json(folder / "cfg.json", lambda table: table.update(changes))
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)


def copied_variant(name: str, folder: Path) -> Path:
    for path in (VARIANTS / name).iterdir():
        if path.name != "expected.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_threshold_below_0_stops_nothing(tmp_path: Path) -> None:
    folder = copied_variant("sae_lens_pursuit_iterations", tmp_path)
    edit_json(folder / "cfg.json", lambda table: table.update(residual_threshold=-1.0))
    expected = load_file(VARIANTS / "sae_lens_pursuit_iterations/expected.safetensors")
    close(SAE.load(folder)(expected["x"]), expected["forward"])


CONF: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "another width": ({"llm": {"dimin": 8}}, r"D beside .* has shape \[64, 16\], and that says \[32, 8\]"),
    "no factor": ({"sae": {"scaling_factor": None}}, "scaling_factor in .* is None, expected a number above 0"),
    "topk without k": ({"sae": {"kval_topk": None}}, "kval_topk in .* is None, expected a whole number of 1 or more"),
    "untied": ({"sae": {"tied_weights": False}}, "lacks E; expected D, b, E"),
    "a tie that is none": ({"sae": {"tied_weights": 1}}, "tied_weights in .* is 1, expected true or false"),
    "another kind": ({"sae": {"sae_diff_type": "jump"}}, "sae_diff_type in .* is 'jump', expected 'relu' or 'topk'"),
}


@pytest.mark.parametrize("what", CONF)
def test_confs_of_temporal_saes_that_cannot_be(tmp_path: Path, what: str) -> None:
    import yaml

    changes, message = CONF[what]
    path = copied("temporal", tmp_path) / "layer_12/temporal/conf.yaml"
    table = yaml.safe_load(path.read_text())
    for part, changed in changes.items():
        table[part] |= changed
    path.write_text(yaml.safe_dump(table))
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(tmp_path)


def test_a_temporal_sae_that_has_lost_its_path(tmp_path: Path) -> None:
    folder = copied("temporal", tmp_path) / "layer_12/temporal"
    whole = SAE.load(tmp_path)
    assert whole.info.site is not None
    assert whole.info.site.hook_name == "blocks.12.hook_resid_post"
    assert whole.info.metadata["model_name"] == "google/gemma-2-2b"
    assert whole.info.provenance["loader"] == "saekit:temporal"
    elsewhere = tmp_path / "plain"
    folder.rename(elsewhere)
    assert SAE.load(elsewhere).info.site is None
    edit_tensors(
        elsewhere / "latest_ckpt.safetensors", lambda tensors: tensors.update(attn_layers_else=1 * tensors["b"])
    )
    with pytest.raises(SAEFormatError, match="has attn_layers_else, of which this format knows nothing"):
        SAE.load(elsewhere)


def test_groups_that_latents_do_not_make(tmp_path: Path) -> None:
    folder = copied_variant("sparsify_groupmax", tmp_path)
    edit_json(folder / "cfg.json", lambda table: table.update(k=7))
    with pytest.raises(SAEFormatError, match="k in .* is 7, and 24 latents are not so many groups of one size"):
        SAE.load(folder)


@pytest.mark.slow
def test_sae_lens_6_reads_what_is_saved(tmp_path: Path) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    names = [name for name in variants() if name.startswith("sae_lens") and "bfloat16" not in name]
    for name in names:
        SAE.load(VARIANTS / name).save(tmp_path / name)
        save_file({"x": load_file(VARIANTS / name / "expected.safetensors")["x"]}, tmp_path / f"{name}.safetensors")
    found = subprocess.run([python, "-c", READER, tmp_path, *names], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for name in names:
        theirs, expected = (load_file(f) for f in (tmp_path / f"{name}.out", VARIANTS / name / "expected.safetensors"))
        assert torch.allclose(theirs["features"], expected["encode"], atol=1e-5)
        assert torch.allclose(theirs["out"], expected["forward"], atol=1e-5)


READER = """
import sys
from pathlib import Path
from sae_lens import SAE
from safetensors.torch import load_file, save_file

place = Path(sys.argv[1])
for name in sys.argv[2:]:
    sae, x = SAE.load_from_disk(place / name), load_file(place / f"{name}.safetensors")["x"]
    found = {"out": sae(x).detach().contiguous(), "features": sae.encode(x).detach().contiguous()}
    save_file(found, place / f"{name}.out")
"""
