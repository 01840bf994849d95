"""Exports: what a loader writes it reads again to the last bit, and what a format has no place for is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import yaml
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import TopKTranscoderConfig, TranscoderConfig
from safetensors.torch import load_file
from support.formats import FIXTURES, edit_json
from support.saved import make, names, other, sae_lens_python, thesis

import saekit
from saekit import SAE, Ports, Site, Sites
from saekit.errors import PlaceError, SAEFormatError, StorageError
from saekit.pretrained import formats
from saekit.sae.build import build_module

FED = {
    "model_name": "google/gemma-2-2b", "context_size": 96, "prepend_bos": False, "dataset_path": "a/b",
    "model_from_pretrained_kwargs": {"center_writing_weights": False}, "training_tokens": 512,
}  # fmt: skip
D_IN, D_SAE = 12, 30


def sites(read: str, *written: str) -> Sites:
    one = Site(hook_name=read)
    return Sites((one,), tuple(Site(hook_name=name) for name in written)) if written else Sites.one(one)


def sae_of(config: Any, at: Sites | None = None, dtype: torch.dtype = torch.float32) -> SAE:
    """An SAE with weights of random numbers, at the sites."""
    plugins = saekit.default_manager()
    at = at or sites("blocks.3.hook_resid_post")
    ports = Ports.of(at, dict.fromkeys(at.all, D_IN))
    sae = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs_() if name == "threshold" else
                            torch.randn(parameter.shape, generator=generator))  # fmt: skip
        if isinstance(config, BatchTopKConfig):
            sae.threshold_average.fill_(0.8)
            sae.threshold_updates.fill_(torch.inf)
        if len(at.targets) > 1:
            sae.b_dec[D_IN:] = 0
    sae.info = attrs.evolve(sae.info, sites=at, metadata=FED)
    return sae.to(dtype)


MLP = sites("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")
LATER = sites("blocks.5.hook_resid_mid", *(f"blocks.{layer}.hook_mlp_out" for layer in (5, 6, 7)))
PLAIN: dict[str, Any] = {"d_sae": D_SAE, "normalize_sae_decoder": False}
CHOOSES: dict[str, Any] = {
    "d_sae": D_SAE,
    "k": 4,
    "rescale_acts_by_decoder_norm": False,
    "normalize_sae_decoder": False,
}
MADE: dict[str, tuple[str, Any]] = {
    "AutoEncoder": ("dictionary_learning", lambda: make(hook_name="blocks.3.hook_mlp_out")),
    "AutoEncoderNew": ("dictionary_learning", lambda: make(apply_b_dec_to_input=False)),
    "AutoEncoderTopK": ("dictionary_learning", lambda: sae_of(TopKConfig(**CHOOSES))),
    "BatchTopKSAE": ("dictionary_learning", lambda: sae_of(BatchTopKConfig(**CHOOSES))),
    "JumpReluAutoEncoder": ("dictionary_learning", lambda: sae_of(JumpReLUConfig(**PLAIN, apply_b_dec_to_input=False))),
    "GatedAutoEncoder": ("dictionary_learning", lambda: sae_of(GatedConfig(**PLAIN))),
    "MatryoshkaBatchTopKSAE": ("dictionary_learning", lambda: sae_of(MatryoshkaConfig(**CHOOSES, widths=(10, 20)))),
    "AutoEncoder in float64": ("dictionary_learning", lambda: make().to(torch.float64)),
    "AutoEncoderTopK in bfloat16": ("dictionary_learning", lambda: sae_of(TopKConfig(**CHOOSES), None, torch.bfloat16)),
    "sparsify": ("sparsify", lambda: sae_of(TopKConfig(**CHOOSES), sites("blocks.3.hook_attn_out"))),
    "sparsify, groupmax": ("sparsify", lambda: sae_of(GroupMaxConfig(**CHOOSES | {"k": 6}))),
    "sparsify, of the embedding": ("sparsify", lambda: sae_of(TopKConfig(**CHOOSES), sites("hook_embed"))),
    "sparsify, a transcoder": ("sparsify", lambda: sae_of(TopKTranscoderConfig(**CHOOSES), MLP)),
    "sparsify, with a skip": ("sparsify", lambda: sae_of(TopKTranscoderConfig(**CHOOSES, skip_connection=True), MLP)),
    "mwhanna": ("mwhanna", lambda: sae_of(TranscoderConfig(d_sae=D_SAE), MLP)),
    "mwhanna, with a skip": ("mwhanna", lambda: sae_of(TranscoderConfig(d_sae=D_SAE, skip_connection=True), MLP)),
    "mntss": ("mntss", lambda: sae_of(TranscoderConfig(d_sae=D_SAE), LATER)),
    "mntss, of one layer": ("mntss", lambda: sae_of(TranscoderConfig(d_sae=D_SAE), MLP)),
    "sae_lens": ("sae_lens", lambda: sae_of(BatchTopKConfig(**CHOOSES))),
    "saekit": ("saekit", lambda: make(activation="tanh-relu")),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_is_read_again_to_the_last_bit(tmp_path: Path, name: str) -> None:
    form, build = MADE[name]
    sae = build()
    assert sae.export(tmp_path / "out", format=form) == tmp_path / "out"
    again = SAE.load(tmp_path / "out")
    assert again.info.provenance["loader"] in (f"saekit:{form}", "saekit")
    x = torch.randn(9, sae.d_in, dtype=sae.dtype)
    for key, value in sae.public_tensors().items():
        assert torch.equal(again.public_tensors()[key], value), key
    with torch.no_grad():
        for ours, theirs in ((again.encode(x), sae.encode(x)), (again(x), sae(x))):
            if sae.dtype == torch.float64:  # where the last digits depend on how matrices lie in memory
                assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(ours, theirs)
    assert again.info.sites == sae.info.sites
    for field in ("model_name", "context_size", "prepend_bos"):
        assert again.info.metadata[field] == sae.info.metadata[field]
    assert again.dtype == sae.dtype
    assert again.info.architecture == sae.info.architecture


@pytest.mark.parametrize("name", MADE)
def test_an_sae_of_which_nothing_else_is_known_comes_back_so(tmp_path: Path, name: str) -> None:
    form, build = MADE[name]
    sae = build()
    sae.info = attrs.evolve(sae.info, metadata={})
    again = SAE.load(sae.export(tmp_path / "out", format=form))
    assert dict(again.info.metadata) == {}
    assert again.info.sites == sae.info.sites


FILES = {
    "dictionary_learning_0.1.0_standard": "dictionary_learning",
    "dictionary_learning_0.1.0_autoencodernew": "dictionary_learning",
    "dictionary_learning_0.1.0_topk": "dictionary_learning",
    "dictionary_learning_0.1.0_batchtopk": "dictionary_learning",
    "dictionary_learning_0.1.0_jumprelu": "dictionary_learning",
    "dictionary_learning_0.1.0_matryoshka": "dictionary_learning",
    "dictionary_learning_0.1.0_gated": "dictionary_learning",
    "sparsify_1.3.3_topk": "sparsify",
    "sparsify_1.3.3_skip_transcoder": "sparsify",
    "mwhanna_transcoder": "mwhanna",
    "mntss_clt_layer": "mntss",
}


@pytest.mark.parametrize("name", FILES)
def test_the_peers_own_files_come_out_as_they_were(tmp_path: Path, name: str) -> None:
    """The same tensors, of the same names, types and layouts, and what their libraries read of the rest."""
    SAE.load(FIXTURES / name).export(tmp_path, FILES[name])
    for path in (FIXTURES / name).rglob("*"):
        written = tmp_path / path.relative_to(FIXTURES / name)
        if path.name == "expected.safetensors" or path.suffix not in (".safetensors", ".pt"):
            continue
        read = load_file if path.suffix == ".safetensors" else lambda file: torch.load(file, weights_only=True)
        ours, theirs = read(written), read(path)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        unset = "threshold" if name.endswith("_topk") else ""
        assert all(torch.equal(ours[key], value) for key, value in theirs.items() if key != unset)


def test_what_dictionary_learning_reads(tmp_path: Path) -> None:
    """What its `load_dictionary` goes by."""
    sae_of(BatchTopKConfig(**CHOOSES)).export(tmp_path, "dictionary_learning")
    config, state = (
        json.loads((tmp_path / "config.json").read_text()),
        torch.load(tmp_path / "ae.pt", weights_only=True),
    )
    assert config["trainer"] == {
        "dict_class": "BatchTopKSAE", "activation_dim": D_IN, "dict_size": D_SAE, "k": 4, "layer": 3,
        "submodule_name": "resid_post_layer_3", "lm_name": "google/gemma-2-2b",
    }  # fmt: skip
    assert config["buffer"]["ctx_len"] == 96
    assert (state["k"].dtype, state["k"].shape, state["k"].item()) == (torch.int32, torch.Size([]), 4)
    assert state["threshold"].item() == pytest.approx(0.8)
    assert state["encoder.weight"].shape == (D_SAE, D_IN)
    assert (tmp_path / "ae.pt").stat().st_size < 3 * 4 * 2 * D_IN * D_SAE, "no storage of something else"


def test_what_circuit_tracing_reads(tmp_path: Path) -> None:
    """Of FORMATS.md, 14: only the encoder lies the other way."""
    sae = sae_of(TranscoderConfig(d_sae=D_SAE), MLP)
    sae.export(tmp_path / "plt", "mwhanna")
    tensors = load_file(tmp_path / "plt/layer_5.safetensors")
    assert torch.equal(tensors["W_enc"], sae.W_enc.T)
    assert torch.equal(tensors["W_dec"], sae.W_dec)
    config = yaml.safe_load((tmp_path / "plt/config.yaml").read_text())
    assert {name: value for name, value in config.items() if name != "saekit_metadata"} == {
        "model_kind": "transcoder_set", "model_name": "google/gemma-2-2b", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    run = yaml.safe_load((tmp_path / "plt/wandb-config.yaml").read_text())
    assert run == {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 96}}
    clt = sae_of(TranscoderConfig(d_sae=D_SAE), LATER)
    clt.export(tmp_path / "clt", "mntss")
    encoder, decoder = (load_file(tmp_path / f"clt/W_{part}_5.safetensors") for part in ("enc", "dec"))
    assert {name: list(value.shape) for name, value in (encoder | decoder).items()} == {
        "W_enc_5": [D_SAE, D_IN], "b_enc_5": [D_SAE], "b_dec_5": [D_IN], "W_dec_5": [D_SAE, 3, D_IN],
    }  # fmt: skip
    x = torch.randn(4, D_IN)
    features = (x @ encoder["W_enc_5"].T + encoder["b_enc_5"]).relu()
    written = clt.ports.split_target(clt(x))["blocks.6.hook_mlp_out"]
    assert (features @ decoder["W_dec_5"][:, 1] - written).abs().max() < 1e-4
    config = yaml.safe_load((tmp_path / "clt/config.yaml").read_text())
    assert config["model_kind"] == "cross_layer_transcoder"


def test_a_scaling_factor_is_a_part_of_the_decoder(tmp_path: Path) -> None:
    """Other libraries know none; outputs are the same."""
    sae = make()
    sae.add_scaling_factor()
    with torch.no_grad():
        sae.scaling_factor.copy_(torch.rand(30) + 0.5)
    again = SAE.load(sae.export(tmp_path / "out", "dictionary_learning"))
    x = torch.randn(5, 12)
    assert (again(x) - sae(x)).abs().max() < 1e-5 * sae(x).abs().max()


def test_norms_that_count_are_folded(tmp_path: Path) -> None:
    config = TopKConfig(**CHOOSES | {"rescale_acts_by_decoder_norm": True})
    sae, x = sae_of(config), torch.randn(9, D_IN)
    again = SAE.load(sae.export(tmp_path / "out", "sparsify"))
    assert (again.encode(x) - sae.encode(x)).abs().max() < 1e-5 * sae.encode(x).abs().max()
    with pytest.raises(SAEFormatError, match=r"in bfloat16 norms cannot be folded .*export sae.to\(torch.float32\)"):
        sae.to(torch.bfloat16).export(tmp_path / "other", "sparsify")


def with_bias_of_later_layers() -> SAE:
    sae = sae_of(TranscoderConfig(d_sae=D_SAE), LATER)
    with torch.no_grad():
        sae.b_dec.fill_(1)
    return sae


def of_unknown_scale() -> SAE:
    sae = make()
    sae.info = sae.info.with_scale(None)
    return sae


def of_several_thresholds() -> SAE:
    sae = sae_of(BatchTopKConfig(**CHOOSES))
    sae.public_tensors = lambda: {**type(sae).public_tensors(sae), "threshold": torch.rand(D_SAE)}
    return sae


JUMP = JumpReLUConfig(**PLAIN, apply_b_dec_to_input=False)
REFUSED: dict[str, tuple[str, Any, str]] = {
    "architecture": ("sparsify", lambda: sae_of(JUMP),
                     "sparsify has no place for the architecture saekit:jumprelu; it has for saekit:groupmax, "),
    "activation": ("dictionary_learning", lambda: make(activation="tanh-relu"),
                   "dictionary_learning has no place for the activation 'saekit:tanh-relu'; it has for saekit:relu"),
    "an unknown scale": ("dictionary_learning", of_unknown_scale,
                         r"scaled by a factor that nobody knows, .* Call sae.fold_activation_scale\(factor\) first"),
    "a hook": ("dictionary_learning", lambda: make(hook_name="blocks.1.hook_resid_pre"),
               "no place for the hook blocks.1.hook_resid_pre; it has for hook_resid_post, hook_attn_out, "),
    "a hook of no layer": ("dictionary_learning", lambda: make(hook_name="ln_final.hook_normalized"),
                           "no place for the hook ln_final.hook_normalized, expected one of a layer"),
    "a head": ("dictionary_learning", lambda: make(head=2), "no place for one head alone .*head2"),
    "the bias of inputs": ("dictionary_learning", lambda: sae_of(JumpReLUConfig(**PLAIN)),
                           "saekit:jumprelu with apply_b_dec_to_input = false alone, and this has true"),
    "a fraction": ("dictionary_learning", lambda: sae_of(BatchTopKConfig(**CHOOSES | {"k": 4.5})),
                   "no place for k = 4.5; it has for whole numbers"),
    "several thresholds": ("dictionary_learning", of_several_thresholds, "no place for thresholds of several values"),
    "several sites": ("dictionary_learning", lambda: sae_of(TopKConfig(**CHOOSES), Sites((*LATER.targets,))),
                      "no place for other sites than one"),
    "sparsify without a bias": ("sparsify", lambda: sae_of(TopKConfig(**CHOOSES, apply_b_dec_to_input=False)),
                                "sparsify has no place for apply_b_dec_to_input = false in an SAE"),
    "sparsify elsewhere": ("sparsify", lambda: sae_of(TopKConfig(**CHOOSES), sites("blocks.3.hook_resid_mid")),
                           "no place for what reads blocks.3.hook_resid_mid and writes blocks.3.hook_resid_mid"),
    "sparsify from elsewhere": ("sparsify", lambda: sae_of(TopKTranscoderConfig(**CHOOSES),
                                                          sites("blocks.4.mlp.hook_in", "blocks.5.hook_mlp_out")),
                                "no place for what reads blocks.4.mlp.hook_in and writes blocks.5.hook_mlp_out"),
    "sparsify to several": ("sparsify", lambda: sae_of(TopKTranscoderConfig(**CHOOSES), LATER),
                            "no place for 1 inputs of width 12 and 3 targets of width 36"),
    "another layer": ("mwhanna", lambda: sae_of(TranscoderConfig(d_sae=D_SAE),
                                                sites("blocks.4.mlp.hook_in", "blocks.5.hook_mlp_out")),
                      "mwhanna has no place for what reads layer 4 and writes layer 5"),
    "layers in one file": ("mwhanna", lambda: sae_of(TranscoderConfig(d_sae=D_SAE), LATER), "no place for the sites "),
    "layers with a gap": ("mntss", lambda: sae_of(TranscoderConfig(d_sae=D_SAE), sites(
        "blocks.5.hook_resid_mid", "blocks.5.hook_mlp_out", "blocks.7.hook_mlp_out")),
        "mntss has no place for what writes blocks.5.hook_mlp_out, blocks.7.hook_mlp_out"),
    "a bias of later layers": ("mntss", with_bias_of_later_layers, "no place for a b_dec of later layers"),
    "a skip": ("mntss", lambda: sae_of(TranscoderConfig(d_sae=D_SAE, skip_connection=True), MLP),
               "mntss has no place for a skip connection"),
    "not sae-lens's": ("sae_lens", lambda: make(activation="tanh-relu"), "sae_lens has no place for this saekit:"),
    "a format that is read alone": ("goodfire", make, "saekit:goodfire only reads; what can be written is saekit, "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused(tmp_path: Path, name: str) -> None:
    form, build, message = REFUSED[name]
    with pytest.raises(SAEFormatError, match=message):
        build().export(tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


@pytest.mark.parametrize("form", ["saekit", "sae_lens"])
def test_an_export_as_saekit_has_it_replaces_no_other_sae(tmp_path: Path, form: str) -> None:
    first, second = make(), other()
    first.export(tmp_path / "out", form)
    first.export(tmp_path / "out", form)  # the very same
    with pytest.raises(PlaceError, match=r"there is another file of that name, .* Move it away, or"):
        second.export(tmp_path / "out", form)
    assert torch.equal(SAE.load(tmp_path / "out").W_dec, first.W_dec)


def test_what_a_killed_export_leaves_is_no_sae(tmp_path: Path) -> None:
    sae = sae_of(TopKConfig(**CHOOSES))
    sae.export(tmp_path / "out", "sparsify")
    half = tmp_path / "out/.export.4075be75.tmp"
    half.mkdir()
    sae.export(half / "whole", "sparsify")
    assert torch.equal(SAE.load(tmp_path / "out").W_dec, sae.W_dec)
    (tmp_path / ".new.4075be75.tmp").mkdir()
    sae.export(tmp_path / "new", "sparsify")
    assert names(tmp_path).isdisjoint({".new.4075be75.tmp"})


def test_layers_share_a_folder_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for layer in (5, 6):
        at = sites(f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
        sae_of(TranscoderConfig(d_sae=D_SAE), at).export(tmp_path / "set", "mwhanna")
    assert names(tmp_path / "set") == {"config.yaml", "wandb-config.yaml", "layer_5.safetensors", "layer_6.safetensors"}
    layer = SAE.load(tmp_path / "set/layer_6.safetensors")
    assert layer.info.site.hook_name == "blocks.6.mlp.hook_in"
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "set").iterdir()}
    layer.export(tmp_path / "set", "mwhanna")  # the very same
    with torch.no_grad():
        layer.W_dec.mul_(2)
    with pytest.raises(
        PlaceError, match=r"there is another file of that name, .*layer_6.safetensors. Move it away, or"
    ):
        layer.export(tmp_path / "set", "mwhanna")
    layer.info = attrs.evolve(layer.info, sites=sites("blocks.7.mlp.hook_in", "blocks.7.hook_resid_post"))
    with pytest.raises(PlaceError, match=r"another file of that name, .*config.yaml"):
        layer.export(tmp_path / "set", "mwhanna")
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "set").iterdir()} == before


def test_files_of_others_stay(tmp_path: Path) -> None:
    folder = thesis(tmp_path / "work")
    before = names(folder)
    make().export(folder, "dictionary_learning")
    assert names(folder) == before | {"ae.pt", "config.json"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PlaceError, match="there is a file of that name"):
        make().export(tmp_path / "file", "dictionary_learning")
    (tmp_path / "run/x").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text('{"saes": {"sae": "."}}')
    with pytest.raises(PlaceError, match="it is a run folder; choose another folder"):
        make().export(tmp_path / "run", "sae_lens")


def test_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.files import storage

    real, moved = storage._rename, []

    def rename(path: Path, to: Path) -> None:
        if moved:
            raise OSError(28, "No space left on device")
        moved.append(to)
        real(path, to)

    folder = thesis(tmp_path / "work")
    before = names(folder)
    monkeypatch.setattr(storage, "_rename", rename)
    with pytest.raises(StorageError, match="No space left on device"):
        make().export(folder, "dictionary_learning")
    assert moved
    assert names(folder) == before


def test_metadata_that_somebody_has_edited(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", "dictionary_learning")
    edit_json(folder / "config.json", lambda table: table.update(saekit_metadata=[1]))
    with pytest.raises(
        SAEFormatError, match=r"saekit_metadata in config.json beside ae.pt .*expected the metadata of an"
    ):
        SAE.load(folder)


@pytest.mark.parametrize("name", ["/tmp/layers.3", "../layers.3", "a/../../layers.3", "layers.3/seed1/../../x"])
def test_metadata_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    sae = sae_of(TopKConfig(**CHOOSES))
    sae.info = attrs.evolve(sae.info, metadata={"hf_hook_name": name})
    sae.export(tmp_path / "out", "sparsify")
    assert names(tmp_path) == {"out", "out/config.json", "out/layers.3", *(
        f"out/layers.3/{file}" for file in ("cfg.json", "sae.safetensors"))}  # fmt: skip


def test_a_transform_of_inputs_has_no_place(tmp_path: Path) -> None:
    sae = make()
    sae.input_transform = "layer norm"
    with pytest.raises(SAEFormatError, match="no place for what is done to rows before they are encoded: layer norm"):
        sae.export(tmp_path / "out", "dictionary_learning")


def test_every_format_that_can_be_written() -> None:
    keys = (
        "dictionary_learning",
        "dictionary_learning_1",
        "mntss",
        "mntss_clt_layer_transcoder",
        "mwhanna",
        "mwhanna_transcoder",
        "sae_lens",
        "sparsify",
    )
    assert formats() == ["saekit", *(f"saekit:{key}" for key in keys)]


# ---- the peers themselves, where they are

READER = """
import sys, unittest.mock, datasets
for name in ("nnsight", "zstandard"):
    sys.modules[name] = unittest.mock.MagicMock()
import torch
from safetensors.torch import load_file, save_file

x = load_file(sys.argv[2])["x"]
with torch.no_grad():
    if sys.argv[1].endswith("dictionary_learning"):
        from dictionary_learning.utils import load_dictionary
        sae, _ = load_dictionary(sys.argv[1], "cpu")
        features, output = sae.encode(x), sae(x)
    else:
        from sparsify import SparseCoder
        sae = SparseCoder.load_from_disk(sys.argv[1] + "/layers.3")
        found = sae.encode(x)
        features = torch.zeros(len(x), sae.num_latents).scatter(-1, found.top_indices, found.top_acts)
        output = sae(x).sae_out
save_file({"features": features.contiguous(), "output": output.contiguous()}, sys.argv[3])
"""


def peers_python(package: str) -> str:
    """A Python that has the library; it stands where sae-lens does."""
    python = sae_lens_python()
    check = f"import importlib.metadata as m; m.version('{package}')"
    if python is None or subprocess.run([python, "-c", check], capture_output=True).returncode:
        pytest.skip(f"{package} is not installed; name a Python that has it and sae-lens in SAEKIT_SAE_LENS_PYTHON")
    return python


@pytest.mark.parametrize(
    ("form", "package"), [("dictionary_learning", "dictionary-learning"), ("sparsify", "eai-sparsify")]
)
def test_what_the_peer_computes(tmp_path: Path, form: str, package: str) -> None:
    python, sae, x = peers_python(package), sae_of(TopKConfig(**CHOOSES)), torch.randn(20, D_IN)
    folder = sae.export(tmp_path / form, form)
    from safetensors.torch import save_file

    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, folder, tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ""})
    assert found.returncode == 0, found.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        assert (theirs["features"] - sae.encode(x)).abs().max() < 1e-5
        assert (theirs["output"] - sae(x)).abs().max() < 1e-5 * sae(x).abs().max()
