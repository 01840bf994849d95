"""What each format says in its own way, and what it must say or is refused."""

from __future__ import annotations

import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.formats import FIXTURES, GIVEN, copied, edit_json, edit_pickle, edit_tensors

from saekit import SAE
from saekit.errors import SAEFormatError

X = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# ---- Llama Scope


def test_the_threshold_of_llama_scope_is_in_raw_units() -> None:
    """θ·s, then s is folded into the weights: as many features as in the equation, exactly."""
    folder = FIXTURES / "llama_scope/Llama3_1-8B-Base-L3R-8x"
    weights = {name: value.float() for name, value in load_file(folder / "checkpoints/final.safetensors").items()}
    s = math.sqrt(16) / 7.25
    pre = (s * X) @ weights["encoder.weight"].T + weights["encoder.bias"]
    expected = pre.relu() * (pre > 0.52 * s)
    sae = SAE.load(folder)
    assert torch.equal((sae.encode(X) > 0).sum(1), (expected > 0).sum(1))
    close(sae.encode(X), expected)
    close(sae(X), (expected @ weights["decoder.weight"].T + weights["decoder.bias"]) / s)
    assert sae.info.metadata["activation_scale"] == s
    assert SAE.load(folder, loader={"name": "llama_scope", "activation_scale": s}).info == sae.info
    with pytest.raises(SAEFormatError, match="activation_scale is 0.7, but .* says 0.55"):
        SAE.load(folder, loader={"name": "llama_scope", "activation_scale": 0.7})


def test_the_distilled_ones_need_their_factor() -> None:
    with pytest.raises(SAEFormatError, match=r"no file of this release says which.* Give it: loader"):
        SAE.load(FIXTURES / "llama_scope_r1_distill")


def llama(change: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: edit_json(next(folder.rglob("hyperparams.json")), lambda table: table.update(change))


def distilled(change: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: edit_json(next(folder.rglob("config.json")), lambda table: table.update(change))


# ---- dictionary_learning


def test_dictionary_learning_where_the_class_lies() -> None:
    assert SAE.load(FIXTURES / "dictionary_learning_0.1.0_autoencodernew").config.apply_b_dec_to_input is False
    assert SAE.load(FIXTURES / "dictionary_learning_0.1.0_standard").config.apply_b_dec_to_input is True


@pytest.mark.parametrize(
    ("submodule", "layer", "hook", "defaulted"),
    [
        ("attn_out_layer_3", 3, "blocks.3.hook_attn_out", None),
        ("mlp_out_layer_3", 3, "blocks.3.hook_mlp_out", None),
        ("resid_post_layer_4", 3, "blocks.4.hook_resid_post", None),
        (None, 3, "blocks.3.hook_resid_post", ["hook_name"]),
        ("something", 3, None, None),
    ],
)
def test_dictionary_learning_says_its_submodule(
    tmp_path: Path, submodule: str | None, layer: int, hook: str | None, defaulted: list[str] | None
) -> None:
    folder = copied("dictionary_learning_0.1.0_standard", tmp_path)
    edit_json(folder / "config.json", lambda table: table["trainer"].update(submodule_name=submodule, layer=layer))
    info = SAE.load(folder).info
    assert (info.site and info.site.hook_name) == hook
    assert info.provenance.get("defaulted") == defaulted
    assert info.metadata["model_name"] == "pythia-70m-deduped"
    assert info.metadata["context_size"] == 128


def test_a_threshold_that_was_never_set(tmp_path: Path) -> None:
    folder = copied("dictionary_learning_0.1.0_batchtopk", tmp_path)
    edit_pickle(folder / "ae.pt", lambda state: state.update(threshold=torch.tensor(-1.0)))
    sae = SAE.load(folder)
    pre = sae.pre_activations(X)
    close(sae.encode(X), pre.relu())


def test_two_classes_of_the_same_tensors(tmp_path: Path) -> None:
    folder = copied("dictionary_learning_0.1.0_topk", tmp_path)
    edit_pickle(folder / "ae.pt", lambda state: state.update(threshold=torch.tensor(0.2)))
    (folder / "config.json").unlink()
    with pytest.raises(SAEFormatError, match="may be an AutoEncoderTopK or a BatchTopKSAE, which have"):
        SAE.load(folder)
    for name, key in (("AutoEncoderTopK", "topk"), ("BatchTopKSAE", "batchtopk")):
        sae = SAE.load(folder, loader={"name": "dictionary_learning_1", "dict_class": name})
        assert sae.info.architecture == f"saekit:{key}"


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_k_that_the_configuration_alone_says(tmp_path: Path, name: str) -> None:
    fixture = f"dictionary_learning_0.1.0_{name}"
    folder = copied(fixture, tmp_path)
    edit_pickle(folder / "ae.pt", lambda state: state.pop("k"))
    expected, sae = load_file(FIXTURES / fixture / "expected.safetensors"), SAE.load(folder)
    assert sae.config.k == json.loads((folder / "config.json").read_text())["trainer"]["k"]
    close(sae.encode(expected["x"]), expected["encode"])
    edit_json(folder / "config.json", lambda table: table["trainer"].pop("k"))
    with pytest.raises(SAEFormatError, match="neither ae.pt in .* nor the config.json beside it says k"):
        SAE.load(folder)


def without_k(folder: Path) -> None:
    edit_json(folder / "config.json", lambda table: table["trainer"].pop("k"))
    edit_pickle(folder / "ae.pt", lambda state: (state.pop("k"), state.pop("threshold")))


def trainer(**change: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda table: table["trainer"].update(change))


def state(**change: Any) -> Callable[[Path], object]:
    return lambda folder: edit_pickle(next(folder.rglob("*.pt*")), lambda found: found.update(change))


# ---- sparsify


@pytest.mark.parametrize(
    ("hook_point", "hook"),
    [
        ("layers.5", "blocks.5.hook_resid_post"),
        ("layers.5.mlp", "blocks.5.hook_mlp_out"),
        ("h.3.attn", "blocks.3.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("layers.5.mlp/seed1", "blocks.5.hook_mlp_out"),
        ("layers.5.odd", None),
    ],
)
def test_sparsify_hook_points(tmp_path: Path, hook_point: str, hook: str | None) -> None:
    shutil.copytree(FIXTURES / "sparsify_1.3.3_topk/layers.2", tmp_path / hook_point)
    (tmp_path / "config.json").write_text('{"model": "EleutherAI/pythia-70m", "ctx_len": 512, "dataset": "a/b"}')
    info = SAE.load(tmp_path).info
    assert (info.site and info.site.hook_name) == hook
    wanted = {"model_name": "EleutherAI/pythia-70m", "context_size": 512, "dataset_path": "a/b"}
    assert info.metadata == wanted | {"hf_hook_name": hook_point}


def test_what_a_transcoder_reads_is_kept_where_nothing_says_what_it_writes(tmp_path: Path) -> None:
    folder = copied("sae_lens_6.54.12_skip_transcoder", tmp_path / "copy")
    edit_json(folder / "cfg.json", lambda table: table["metadata"].pop("hook_name_out"))
    sae = SAE.load(folder)
    again = SAE.load(sae.save(tmp_path / "again"))
    for one in (sae, again):
        assert one.info.sites is None
        assert one.info.metadata["hook_name"] == "blocks.0.ln2.hook_normalized"
    said = json.loads((tmp_path / "again/cfg.json").read_text())["metadata"]
    assert said["hook_name"] == "blocks.0.ln2.hook_normalized", "which sae-lens reads"


def test_sites_that_nothing_says_are_not_invented_by_saving(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "sparsify_1.3.3_skip_transcoder/layers.2.mlp", tmp_path / "layers.2.mlp.odd")
    sae = SAE.load(tmp_path)
    again = SAE.load(sae.save(tmp_path / "again"))
    assert again.info.sites is sae.info.sites is None
    assert again.ports == sae.ports
    edit_json(
        tmp_path / "again/cfg.json", lambda table: (table["saekit"].update(placed="no"), table["saekit"].pop("seal"))
    )
    with pytest.raises(SAEFormatError, match="saekit.placed in cfg.json of .* found 'no', expected true or false"):
        SAE.load(tmp_path / "again")


def test_a_skip_connection_around_an_sae(tmp_path: Path) -> None:
    """It writes what it reads, and a bias that is taken from inputs is in that of the encoder, also in bfloat16."""
    variant = FIXTURES.parent / "golden_variants/sparsify_topk_skip_around"
    expected, place = load_file(variant / "expected.safetensors"), tmp_path / "layers.5.mlp"
    shutil.copytree(variant, place)
    sae = SAE.load(tmp_path)
    assert sae.info.sites is not None
    assert sae.info.sites.same
    assert sae.info.sites.name == "blocks.5.hook_mlp_out"
    assert not sae.config.apply_b_dec_to_input
    again = SAE.load(sae.save(tmp_path / "again"))
    assert again.info.sites == sae.info.sites
    close(again(expected["x"]), expected["forward"])
    edit_tensors(place / "sae.safetensors", lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    own, rounded = load_file(place / "sae.safetensors"), SAE.load(place)
    assert rounded.W_enc.dtype == torch.float32
    centered = expected["x"].double() - own["b_dec"].double()
    pre = centered @ own["encoder.weight"].double().T + own["encoder.bias"].double()
    close(rounded.pre_activations(expected["x"]), pre.float())


def test_sparsify_transcodes_without_a_skip(tmp_path: Path) -> None:
    folder = copied("sparsify_1.3.3_skip_transcoder", tmp_path)
    edit_json(folder / "layers.2.mlp/cfg.json", lambda table: table.update(skip_connection=False))
    with pytest.raises(SAEFormatError, match="has W_skip, of which this format knows nothing"):
        SAE.load(folder)
    edit_tensors(folder / "layers.2.mlp/sae.safetensors", lambda tensors: tensors.pop("W_skip"))
    expected = load_file(FIXTURES / "sparsify_1.3.3_skip_transcoder/expected.safetensors")
    close(SAE.load(folder)(expected["x"]), expected["decode"])


def sparsify(**change: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "layers.2/cfg.json", lambda table: table.update(change))


# ---- the others


def test_mwhanna_with_a_misspelt_name_and_no_config(tmp_path: Path) -> None:
    """As in one of the repositories."""
    folder = copied("mwhanna_transcoder", tmp_path / "copy")
    (folder / "wandb-config.yaml").rename(folder / "wanb-config.yaml")
    bare = copied("mwhanna_transcoder", tmp_path / "mwhanna/qwen3-0.6b-transcoders-lowl0")
    (bare / "config.yaml").unlink()
    assert SAE.load(bare).info.metadata["model_name"] == "Qwen/Qwen3-0.6B"
    (folder / "config.yaml").unlink()
    info = SAE.load(folder).info
    assert info.sites.name == "blocks.6.mlp.hook_in-to-blocks.6.hook_mlp_out"
    assert info.metadata["context_size"] == 2048
    assert "model_name" not in info.metadata


def test_qwen_scope_needs_its_k() -> None:
    with pytest.raises(SAEFormatError, match=r"does not say k: only the name of the repository does .* Give it"):
        SAE.load(FIXTURES / "qwen_scope")
    with pytest.raises(SAEFormatError, match="k of the SAE in .* is 65, expected 1 to d_sae = 64"):
        SAE.load(FIXTURES / "qwen_scope", loader={"name": "qwen_scope", "k": 65})


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an unknown dict_class": (
        "dictionary_learning_0.1.0_topk",
        trainer(dict_class="New"),
        "dict_class of .* is 'New', which this",
    ),
    "another dict_class": (
        "dictionary_learning_0.1.0_topk",
        trainer(dict_class="JumpReluAutoEncoder"),
        "is 'JumpReluAutoEncoder', and its tensors",
    ),
    "no k": ("dictionary_learning_0.1.0_topk", without_k, "neither ae.pt .* says k, without which it is no topk SAE"),
    "another k": ("dictionary_learning_0.1.0_topk", trainer(k=7), "k of .* is 6, and config.json beside it says 7"),
    "too large a k": (
        "dictionary_learning_0.1.0_topk",
        state(k=torch.tensor(65)),
        "expected a whole number from 1 to 64",
    ),
    "several ks": (
        "dictionary_learning_0.1.0_topk",
        state(k=torch.tensor([1, 2])),
        r"k of .* should be one finite number, found \[2\]",
    ),
    "a k that is no tensor": (
        "dictionary_learning_0.1.0_topk",
        state(k="6"),
        "k of .* should be one finite number, found '6'",
    ),
    "a NaN threshold": (
        "dictionary_learning_0.1.0_batchtopk",
        state(threshold=torch.tensor(math.nan)),
        "threshold of .* one finite",
    ),
    "a tensor too many": (
        "dictionary_learning_0.1.0_standard",
        state(more=torch.ones(1)),
        "more, which are the tensors of none of",
    ),
    "a gated one that says it is another": (
        "dictionary_learning_0.1.0_gated",
        trainer(dict_class="AutoEncoder"),
        "dict_class of .* is 'AutoEncoder', and its tensors are those of GatedAutoEncoder",
    ),
    "groups that do not add up": (
        "dictionary_learning_0.1.0_matryoshka",
        state(group_sizes=torch.tensor([16, 47])),
        r"group_sizes of .* should be whole numbers that add up to 64, found \[16, 47\]",
    ),
    "groups of another kind": (
        "dictionary_learning_0.1.0_matryoshka",
        state(group_sizes=torch.tensor([16.0, 48.0])),
        r"group_sizes of .* should be whole numbers that add up to 64, found \[16.0, 48.0\]",
    ),
    "weights of other groups": (
        "dictionary_learning_0.1.0_matryoshka",
        trainer(group_weights=[1.0, "2"]),
        r"group_weights in config.json beside .* is \[1.0, '2'\], expected a number for each of the 3 groups",
    ),
    "a trainer that is a text": (
        "dictionary_learning_0.1.0_topk",
        lambda folder: (folder / "config.json").write_text('{"trainer": "x"}'),
        "trainer in .* is 'x', expected an object",
    ),
    "transcoders of Llama Scope": (
        "llama_scope",
        llama({"dataset_average_activation_norm": {"in": 7.25, "out": 3}}),
        "has the norms 7.25 in and 3 out",
    ),
    "another output": (
        "llama_scope",
        llama({"hook_point_out": "x"}),
        "expected one hook: this loader reads SAEs, and no",
    ),
    "no norms": ("llama_scope", llama({"dataset_average_activation_norm": None}), "is None, expected an object"),
    "a norm of 0": (
        "llama_scope",
        llama({"dataset_average_activation_norm": {"in": 0, "out": 0}}),
        "in in .* is 0, expected a number above 0",
    ),
    "a threshold below 0": ("llama_scope", llama({"jump_relu_threshold": -1}), "is -1, expected a number of 0 or more"),
    "another act_fn": (
        "llama_scope",
        llama({"act_fn": "topk"}),
        "act_fn in .* is 'topk', and this loader reads 'jumprelu' alone",
    ),
    "other sizes": ("llama_scope", llama({"d_sae": 65}), r"is for \[16, 64\], and that says \[16, 65\]"),
    "another act_fn, distilled": ("llama_scope_r1_distill", distilled({"act_fn": "relu"}), "act_fn in .* is 'relu'"),
    "another activation": (
        "sparsify_1.3.3_topk",
        sparsify(activation="softmax"),
        "activation in .* is 'softmax', which this loader cannot read; it reads 'topk' and 'groupmax'",
    ),
    "signed": ("sparsify_1.3.3_topk", sparsify(signed=True), "signed in .* is true"),
    "a skip in an SAE": (
        "sparsify_1.3.3_topk",
        sparsify(skip_connection=True),
        "lacks W_skip; expected encoder.weight",
    ),
    "a flag that is a number": (
        "sparsify_1.3.3_topk",
        sparsify(transcode=1),
        "transcode in .* is 1, expected true or false",
    ),
    "no k, sparsify": (
        "sparsify_1.3.3_topk",
        sparsify(k=None),
        "k in .* is None, expected a whole number from 1 to 64",
    ),
    "other latents": ("sparsify_1.3.3_topk", sparsify(num_latents=65), r"has shape \[64, 16\], and .* says \[65, 16\]"),
    "k of OpenAI": (
        "openai_v5_topk",
        state(activation_state_dict={"k": 65, "postact_fn": "ReLU"}),
        "activation_state_dict.k of .* is 65, expected a whole number from 1 to 64",
    ),
    "what follows TopK of OpenAI": (
        "openai_v5_topk",
        state(activation_state_dict={"k": 8, "postact_fn": "Identity"}),
        "activation_state_dict.postact_fn of .* is 'Identity', expected 'ReLU'",
    ),
    "another activation of OpenAI": (
        "openai_v1_relu",
        state(activation="Tanh"),
        "activation of .* is 'Tanh', expected 'ReLU' or 'TopK'",
    ),
    "other sizes, mwhanna": (
        "mwhanna_transcoder",
        lambda folder: (folder / "wandb-config.yaml").write_text("d_model: {value: 17}"),
        "d_model beside .* is 17, and the enc",
    ),
    "another architecture of Gemma 3": (
        "gemma_scope_3",
        distilled({"architecture": "topk"}),
        "architecture in .* is 'topk', expected 'jump_relu'",
    ),
    "decoders of another layer": (
        "mntss_clt_layer",
        lambda folder: (folder / "W_dec_4.safetensors").rename(folder / "W_dec_5.safetensors"),
        "no loader recognizes|has no W_dec_4",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, what: str) -> None:
    name, change, message = REFUSED[what]
    folder = copied(name, tmp_path)
    change(folder)
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder, loader=GIVEN.get(name))


# ---- archives and YAML


def npy(shape: tuple[int, ...], data: bytes = b"", dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def archive(folder: Path, members: dict[str, bytes], packed: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder / "layer_7/width_16k/average_l0_30/params.npz"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", packed) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return folder


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"W_enc.npy": npy((1 << 20, 1 << 20))},
            "should be numbers of type float32 and shape .*, which 128 bytes cannot be",
        ),
        ({"W_enc.npy": npy((2,), b"\0" * 8, "|O")}, "should be numbers of type object"),
        ({"W_enc.npy": npy((2,), b"\0" * 8, "|S4")}, "should be numbers of type"),
        ({"W_enc.npy": b"no array"}, "is not a readable .npz file"),
        ({}, "W_enc, b_enc, W_dec, b_dec, threshold"),
        ({"../W_enc.npy": npy((1,), b"\0" * 4)}, "has ../W_enc, of which this format knows nothing"),
    ],
)
def test_archives_that_hold_no_arrays(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(archive(tmp_path, members), loader="gemma_2")


def test_an_archive_that_unpacks_to_more_than_there_is_room_for(tmp_path: Path) -> None:
    zeros = npy((1 << 25,)) + b"\0" * (1 << 27)
    with pytest.raises(SAEFormatError, match="says that it unpacks to 134,217,.*no weights can be packed like that"):
        SAE.load(archive(tmp_path, {"W_enc.npy": zeros}), loader="gemma_2")
    folder = copied("goodfire", tmp_path / "b")
    path = next(folder.glob("*.pth"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", zeros)
    with pytest.raises(SAEFormatError, match="no weights can be packed like that"):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_model: [", "is not valid YAML"),
        ("- 1", "holds list, expected a table"),
        ("a: !!python/object/apply:os.system [false]", "is not valid YAML: could not determine a constructor"),
        ("a: " + "[" * 70 + "]" * 70, "is nested too deeply"),
        ("a: " + "x" * (1 << 20), "expected at most 1,048,576"),
        (
            "a: &a [x,x,x,x,x,x,x,x]\n"
            + "".join(f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 8)}]\n" for c in "bcdefgh"),
            "holds more than 100,000 values",
        ),
        ("a: &a [*a]", "holds more than 100,000 values"),
        ("a: \0", "is not valid YAML"),
        ("a: 2020-99-99", "is not valid YAML"),
    ],
)
def test_yaml_of_strangers(tmp_path: Path, text: str, message: str) -> None:
    folder = copied("mwhanna_transcoder", tmp_path)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)
