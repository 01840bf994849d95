"""What Gemma Scope's folders say in their own way: embeddings, hooks, transcoders, layers of cross-layer ones."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.formats import FIXTURES, copied, edit_json, edit_tensors

from saekit import SAE, Site
from saekit.errors import SAEFormatError

X = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# ---- Gemma Scope

OLD, NEW = "layer_7/width_16k/average_l0_30", "resid_post/layer_9_width_16k_l0_small"


def test_the_embedding_is_read_unscaled(tmp_path: Path) -> None:
    place = tmp_path / "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    shutil.copytree(FIXTURES / "gemma_scope_2_npz" / OLD, place)
    sae, plain = SAE.load(place), SAE.load(FIXTURES / "gemma_scope_2_npz", loader="gemma_2")
    assert sae.info.site == Site(hook_name="hook_embed")
    close(sae.encode(X), plain.encode(X / 4))
    close(sae.W_dec, plain.W_dec * 4)
    assert torch.equal(sae.threshold, plain.threshold)
    assert torch.equal(sae.b_dec, plain.b_dec)


@pytest.mark.parametrize(
    ("kind", "hook"), [("att", "attn.hook_z"), ("mlp", "hook_mlp_out"), ("res", "hook_resid_post")]
)
def test_the_repository_says_the_hook(tmp_path: Path, kind: str, hook: str) -> None:
    for repo, loader in ((f"google/gemma-scope-9b-it-{kind}", None), ("x", f"google/gemma-scope-9b-it-{kind}")):
        folder = copied("gemma_scope_2_npz", tmp_path / "gemma-scope-2b-pt-transcoders" / kind, repo) / repo
        sae = SAE.load(folder, loader=loader and {"name": "gemma_2", "repo": loader})
        assert sae.info.site == Site(hook_name=f"blocks.7.{hook}")
        assert sae.info.metadata["model_name"] == "gemma-2-9b-it"
    assert SAE.load(FIXTURES / "gemma_scope_2_npz", loader="gemma_2").info.site is None, "nothing is invented"


KINDS = {
    "google/gemma-scope-2b-pt-transcoders": True,
    "models--google--gemma-scope-2b-pt-transcoders/snapshots/abc": True,
    "models--google--gemma-scope-2b-pt-transcoders": True,
    "models--google--gemma-scope-9b-it-res/snapshots/abc": False,
    "transcoders/a/gemma-scope-2b-pt-mlp": False,
    "gemma-scope-2b-pt-mlp/mlp": False,
}
"""What the names of the Hub's repositories say: whether it is a transcoder."""
GUESSES = {
    "gemma_2_transcoder": True,
    "Transcoders/gemma-2": True,
    "gemma-scope-2b/transcoders": True,
    "gemma-scope-2b-pt-res/my-transcoders": True,
    "transcoders/gemma-scope-2b-pt-mlp-canonical": False,
    "gemma-scope-2b-x/a/b/c": False,
    "my-gemma-scope-2b-pt-res": False,
    "gemma_scope_tc": False,
    "gemma-scope-downloads/tc": False,
    "mine/2b-pt-att": False,
    "transcoder-comparison/res": False,
    "transcoder-study/saes": False,
    "transcoders/a/b": False,
    "2b-pt-att/a/b": False,
    "residuals": False,
}
"""What people's own folders make likely, which is said."""


@pytest.mark.parametrize("place", [*KINDS, *GUESSES])
def test_the_path_tells_transcoders_from_saes(tmp_path: Path, place: str) -> None:
    """Their files are alike, and what is a guess is said, once, and not where the loader is named."""
    folder = copied("gemma_2_transcoder", tmp_path / "x/y", place) / place
    transcoder = (KINDS | GUESSES)[place]
    read, other = ("gemma_2_transcoder", "gemma_2")[:: 1 if transcoder else -1]
    for at in (folder, next(folder.rglob("params.npz"))):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sae = SAE.load(at)
        assert sae.info.architecture == f"saekit:jumprelu{'_transcoder' if transcoder else ''}"
        assert len(told) == (place in GUESSES)
        for one in told:
            assert f"may be for {other} [" in str(one.message)
            assert f"loader={other!r} reads it as that one does, and loader={read!r} says" in str(one.message)
            assert one.filename == __file__
    for loader in ("gemma_2", "gemma_2_transcoder"):
        expected = loader.replace("gemma_2", "saekit:jumprelu")
        assert SAE.load(folder, loader=loader).info.architecture == expected


def test_gemma_3_without_its_path(tmp_path: Path) -> None:
    """Its config.json says what it is, or the option; what neither says is said."""
    folder = tmp_path / "layer_9_width_16k_l0_small"
    shutil.copytree(FIXTURES / "gemma_scope_3" / NEW, folder)
    for read, site in {
        "output": "hook_resid_post", "self_attn.o_proj.input": "attn.hook_z",
        "post_feedforward_layernorm.output": "hook_mlp_out",
    }.items():  # fmt: skip
        edit_json(folder / "config.json", lambda table, at=read: table.update(hf_hook_point_in=f"model.layers.9.{at}"))
        assert SAE.load(folder).info.site == Site(hook_name=f"blocks.9.{site}")
    written = {"hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}
    for hooks in ({"hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output"}, written):
        edit_json(folder / "config.json", lambda table, hooks=hooks: table.update({"hf_hook_point_in": "x"} | hooks))
        assert SAE.load(folder).info.sites.name == "blocks.9.hook_mlp_in-to-blocks.9.hook_mlp_out"
    (folder / "config.json").unlink()
    with pytest.warns(
        UserWarning, match="is read as an SAE, and may be a transcoder: .* 'kind': 'transcoder'}"
    ) as told:
        assert SAE.load(folder).info.site is None
    assert [one.filename for one in told] == [__file__]
    said = {"name": "gemma_3", "kind": "transcoder"}
    assert SAE.load(folder, loader=said).info.architecture == "saekit:jumprelu_transcoder"
    said["kind"] = "mlp_out"
    assert SAE.load(folder, loader=said).info.site == Site(hook_name="blocks.9.hook_mlp_out")
    edit_tensors(folder / "params.safetensors", lambda tensors: tensors.update(affine_skip_connection=torch.eye(16)))
    with pytest.raises(SAEFormatError, match="kind is 'mlp_out', but params.safetensors in .* has a skip connection"):
        SAE.load(folder, loader=said)


def test_gemma_3_without_its_config(tmp_path: Path) -> None:
    folder = copied("gemma_scope_3", tmp_path, "gemma-scope-2-1b-pt/google/gemma-scope-2-270m-it")
    (config,) = folder.rglob("config.json")
    config.unlink()
    sae = SAE.load(folder)
    assert sae.info.site == Site(hook_name="blocks.9.hook_resid_post")
    assert sae.info.metadata["model_name"] == "google/gemma-3-270m-it"


@pytest.mark.parametrize(("kind", "hook"), [("attn_out_all", "attn.hook_z"), ("mlp_out", "hook_mlp_out")])
def test_gemma_3_at_other_hooks(tmp_path: Path, kind: str, hook: str) -> None:
    place = tmp_path / "transcoder/layer_5" / kind / "layer_3_width_16k_l0_big_seed_1"
    shutil.copytree(FIXTURES / "gemma_scope_3" / NEW, place)
    assert SAE.load(tmp_path).info.site == Site(hook_name="blocks.9.hook_resid_post"), "its config.json goes before"
    (place / "config.json").unlink()
    assert SAE.load(tmp_path).info.site == Site(hook_name=f"blocks.3.{hook}"), "the nearest folders"
    write_transcoder_config(place, 4)
    assert SAE.load(tmp_path).info.sites.name == "blocks.4.hook_mlp_in-to-blocks.4.hook_mlp_out"


def write_transcoder_config(place: Path, layer: int) -> None:
    """Have the ``config.json`` in ``place`` be that of a transcoder."""
    read = f"model.layers.{layer}.pre_feedforward_layernorm.output"
    (place / "config.json").write_text(json.dumps({"architecture": "jump_relu", "hf_hook_point_in": read}))


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_3_transcoders_with_and_without_a_skip(tmp_path: Path, affine: bool) -> None:
    place = tmp_path / f"transcoder_all/layer_2_width_16k_l0_small{'_affine' * affine}"
    shutil.copytree(FIXTURES / "gemma_scope_3" / NEW, place)
    skip = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    write_transcoder_config(place, 2)
    edit_json(place / "config.json", lambda table: table.update(affine_connection=affine))
    if affine:
        with pytest.raises(SAEFormatError, match="lacks affine_skip_connection, which the config.json beside it says"):
            SAE.load(place)
        edit_tensors(place / "params.safetensors", lambda tensors: tensors.update(affine_skip_connection=skip))
    sae, plain = SAE.load(place), SAE.load(FIXTURES / "gemma_scope_3")
    assert sae.info.architecture == "saekit:jumprelu_transcoder"
    assert sae.info.sites.name == "blocks.2.hook_mlp_in-to-blocks.2.hook_mlp_out"
    close(sae.encode(X), plain.encode(X))
    close(sae(X), plain(X) + (X @ skip if affine else 0))


@pytest.mark.parametrize("layers", [3, 18])
def test_gemma_3_cross_layer_transcoders(tmp_path: Path, layers: int) -> None:
    """Written are the layers from its own on, or all of the model's where there are so many."""
    place = tmp_path / "google/gemma-scope-2-270m-pt/clt/width_16k"
    place.mkdir(parents=True)
    tensors = load_file(FIXTURES / "gemma_scope_3" / NEW / "params.safetensors")
    decoders = torch.randn(64, layers, 16, generator=torch.Generator().manual_seed(2))
    save_file({**tensors, "w_dec": decoders}, place / "layer_4_l0_big.safetensors")
    sae = SAE.load(tmp_path)
    first = 0 if layers == 18 else 4
    features = sae.encode(X)
    close(features, SAE.load(FIXTURES / "gemma_scope_3").encode(X))
    written = sae.ports.split_target(sae.decode(features))
    assert list(written) == [f"blocks.{layer}.hook_mlp_out" for layer in range(first, first + layers)]
    close(sum(written.values()), features @ decoders.sum(1) + tensors["b_dec"])
    close(written["blocks.5.hook_mlp_out"], features @ decoders[:, 5 - first])
    close(written["blocks.4.hook_mlp_out"], features @ decoders[:, 4 - first] + tensors["b_dec"])


@pytest.mark.parametrize(("layers", "each"), [(3, False), (18, False), (3, True), (18, True)])
def test_gemma_3_cross_layer_transcoders_with_a_skip(tmp_path: Path, layers: int, each: bool) -> None:
    """One for the layer itself, or one for every layer that is written."""
    place = tmp_path / "google/gemma-scope-2-270m-pt/clt/width_16k_l0_big_affine"
    place.mkdir(parents=True)
    tensors = load_file(FIXTURES / "gemma_scope_3" / NEW / "params.safetensors")
    generator = torch.Generator().manual_seed(2)
    decoders = torch.randn(64, layers, 16, generator=generator)
    skip = torch.randn(16, layers if each else 1, 16, generator=generator)
    given = {**tensors, "w_dec": decoders, "affine_skip_connection": skip if each else skip[:, 0].contiguous()}
    save_file(given, place / "params_layer_4.safetensors")
    sae = SAE.load(tmp_path)
    added = sae.ports.split_target(sae(X) - sae.decode(sae.encode(X)))
    close(added["blocks.4.hook_mlp_out"], X @ skip[:, 4 if layers == 18 and each else 0])
    close(sum(added.values()), X @ skip.sum(1))
    save_file(given | {"affine_skip_connection": torch.zeros(16, 2, 16)}, place / "params_layer_4.safetensors")
    with pytest.raises(SAEFormatError, match=r"affine_skip_connection of .* has shape \[16, 2, 16\], expected \[d_in"):
        SAE.load(tmp_path)


def test_what_a_named_loader_does_not_find_is_said(tmp_path: Path) -> None:
    folder = copied("sae_lens_6.54.12_topk", tmp_path)
    for loader, names in {
        "gemma_2": "params.npz", "gemma_3": r"params.safetensors or clt\*/\*layer_N\*.safetensors",
        "sae_lens_legacy": r"\*.\(pt or pkl or pkl.gz\)", "goodfire": r"Llama-3\*-SAE-lN.pt",
    }.items():  # fmt: skip
        expected = f"{loader} reads {names}, and there is no such file in .*, which has cfg.json, sae_weights.safetens"
        with pytest.raises(SAEFormatError, match=expected):
            SAE.load(folder, loader=loader)
