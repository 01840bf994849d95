"""The formats of other libraries: what their own code computes is what saekit computes, and whose it is is read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from support.formats import FIXTURES, GIVEN, copied, edit_json, edit_pickle

import saekit
from saekit import SAE, SAEFiles
from saekit.errors import ConfigError, SAEFormatError
from saekit.testing import fake_plugin, isolated_manager

READ = {
    "deepseek_r1": ("deepseek_r1", "standard"),
    "dictionary_learning_0.1.0_autoencodernew": ("dictionary_learning", "standard"),
    "dictionary_learning_0.1.0_batchtopk": ("dictionary_learning", "batchtopk"),
    "dictionary_learning_0.1.0_gated": ("dictionary_learning", "gated"),
    "dictionary_learning_0.1.0_jumprelu": ("dictionary_learning", "jumprelu"),
    "dictionary_learning_0.1.0_matryoshka": ("dictionary_learning", "matryoshka"),
    "dictionary_learning_0.1.0_standard": ("dictionary_learning", "standard"),
    "dictionary_learning_0.1.0_standard_april": ("dictionary_learning", "standard"),
    "dictionary_learning_0.1.0_topk": ("dictionary_learning", "topk"),
    "gemma_scope_2_npz": ("gemma_2", "jumprelu"),
    "gemma_scope_3": ("gemma_3", "jumprelu"),
    "goodfire": ("goodfire", "standard"),
    "llama_scope": ("llama_scope", "jumprelu"),
    "llama_scope_r1_distill": ("llama_scope_r1_distill", "jumprelu"),
    "mwhanna_transcoder": ("mwhanna", "transcoder"),
    "openai_v1_relu": ("openai", "standard"),
    "openai_v5_topk": ("openai", "topk"),
    "qwen_scope": ("qwen_scope", "topk"),
    "sae_lens_2.1.3_folder": ("sae_lens", "standard"),
    "sparsify_1.3.3_skip_transcoder": ("sparsify", "topk_transcoder"),
    "sparsify_1.3.3_topk": ("sparsify", "topk"),
    "temporal": ("temporal", "temporal"),
}
"""Fixture: the loader that knows it and the architecture that it becomes."""


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", READ)
def test_what_the_peer_computes(tmp_path: Path, name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    x = expected["x"]
    loaded = SAE.load(FIXTURES / name, loader=GIVEN.get(name))
    loader, architecture = READ[name]
    assert loaded.info.provenance["loader"] == f"saekit:{loader}"
    assert loaded.info.architecture == f"saekit:{architecture}"
    for sae in (loaded, SAE.load(loaded.save(tmp_path / "again"))):
        for context in (torch.enable_grad(), torch.no_grad()):  # by autograd, and by what is fast
            with context:
                features = sae.encode(x)
                close(features, expected["encode"])
                close(sae.decode(features, like=x), expected["decode"])
                close(sae(x), expected["forward"])
        close(sae.encode_sparse(x).dense(), expected["encode"].flatten(0, -2))


def test_a_layer_of_a_cross_layer_transcoder_names_its_targets(tmp_path: Path) -> None:
    """The peer adds up what it writes to all layers."""
    expected = load_file(FIXTURES / "mntss_clt_layer/expected.safetensors")
    loaded = SAE.load(FIXTURES / "mntss_clt_layer")
    decoders = load_file(FIXTURES / "mntss_clt_layer/W_dec_4.safetensors")["W_dec_4"]
    for sae in (loaded, SAE.load(loaded.save(tmp_path / "again"))):
        features = sae.encode(expected["x"])
        close(features, expected["encode"])
        written = sae.ports.split_target(sae.decode(features))
        assert list(written) == ["blocks.4.hook_mlp_out", "blocks.5.hook_mlp_out"]
        close(written["blocks.5.hook_mlp_out"], features @ decoders[:, 1])
        close(sae.ports.sum_of_targets(sae.decode(features)), expected["decode"])
        for target, values in written.items():
            assert torch.equal(sae.decode(features, target=target), values)
            assert torch.equal(sae.decode(features, target=target, like=expected["x"]), values)
        with pytest.raises(
            ConfigError, match=r"there is no target 'blocks.3.hook_mlp_out'; there are blocks.4.hook_mlp_"
        ):
            sae.decode(features, target="blocks.3.hook_mlp_out")
    assert loaded.info.site.hook_name == "blocks.4.hook_resid_mid"


PLACES = {
    "deepseek_r1": "",
    "gemma_2_transcoder": "google/gemma-scope-2b-pt-transcoders",
    "gemma_scope_2_npz": "google/gemma-scope-2b-pt-res",
    "gemma_scope_3": "google/gemma-scope-2-1b-pt",
    "goodfire": "",
    "llama_scope": "",
    "llama_scope_r1_distill": "",
    "mntss_clt_layer": "",
    "mwhanna_transcoder": "",
    "qwen_scope": "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_9",
}
"""Fixture: the repository that it is of, where nothing else says what it is for."""


@pytest.mark.parametrize("name", PLACES)
def test_what_it_is_for(tmp_path: Path, name: str) -> None:
    """As the peer's configuration says, in a copy that the Hub's cache or a person has made."""
    peer = json.loads((FIXTURES / name / "peer_cfg.json").read_text())
    wanted = peer["metadata"]
    repo = PLACES[name] or "somebody/something"
    places = {repo: None, f"models--{repo.replace('/', '--')}/snapshots/abc": repo}
    for number, (place, known) in enumerate(places.items()):
        folder = copied(name, tmp_path / str(number), place) / place
        sae = SAE.load(folder, loader=GIVEN[name] if name == "llama_scope_r1_distill" else None)
        assert sae.info.sites.inputs[0].hook_name == wanted["hook_name"]
        if "hook_name_out" in wanted:
            assert sae.info.sites.targets[0].hook_name == wanted["hook_name_out"]
        for field in ("model_name", "context_size", "prepend_bos", "model_from_pretrained_kwargs"):
            assert sae.info.metadata.get(field) == wanted.get(field), field
        assert sae.config.apply_b_dec_to_input == peer["apply_b_dec_to_input"]
        assert sae.info.provenance.get("repo") == known
        assert sae.info.provenance.get("revision") == (known and "abc")


# ---- whose it is


def test_provenance_says_what_was_read(tmp_path: Path) -> None:
    sae = SAE.load(copied("dictionary_learning_0.1.0_topk", tmp_path / "a"))
    sums = {name: hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() for name in ("ae.pt", "config.json")}
    renamed = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
    expected: dict[str, Any] = {"loader": "saekit:dictionary_learning", "files": sums, "renamed": renamed}
    unknown = sae.info.provenance["not_stated"]
    assert "aux_loss_coefficient" in unknown
    assert not {"d_in", "d_sae", "k", "dtype"} & {*unknown}
    expected["not_stated"] = unknown
    assert sae.info.provenance == expected
    again = SAE.load(SAE.load(sae.save(tmp_path / "b")).save(tmp_path / "c"))
    assert again.info.provenance == expected, "it is that of the weights, however often they are saved"
    own = SAE.load(copied("sae_lens_3.0.0_standard", tmp_path / "d")).info.provenance
    assert own["defaulted"] == ["architecture"]
    edit_json(tmp_path / "c/cfg.json", lambda table: table["saekit"].pop("seal"))
    edit_json(tmp_path / "c/cfg.json", lambda table: table["saekit"].update(provenance=[]))
    with pytest.raises(SAEFormatError, match=r"saekit.provenance in cfg.json of .* is missing or of the wrong kind"):
        SAE.load(tmp_path / "c")


def test_an_own_folder_says_so_and_no_more(tmp_path: Path) -> None:
    sae = SAE.load(copied("sae_lens_6.54.12_topk", tmp_path / "a"))
    sae.info = saekit.SAEInfo(architecture=sae.info.architecture, options=sae.info.options)
    own = SAE.load(sae.save(tmp_path / "b")).info.provenance
    assert own["loader"] == "saekit"
    assert set(own["files"]) == {"cfg.json", "sae_weights.safetensors"}
    assert (
        "provenance"
        not in json.loads((SAE.load(tmp_path / "b").save(tmp_path / "c") / "cfg.json").read_text())["saekit"]
    )


def test_one_file_of_several(tmp_path: Path) -> None:
    """A path of a file, or the option, says which."""
    folder = copied("goodfire", tmp_path)
    first = next(folder.glob("*.pth"))
    edit_pickle(first, lambda state: None)
    second = folder / "Llama-3.3-70B-Instruct-SAE-l50.pth"
    second.write_bytes(first.read_bytes())
    with pytest.raises(SAEFormatError, match=r"holds 2 SAEs; say which, as in loader=\{'name': 'goodfire', 'sae': 'Ll"):
        SAE.load(folder)
    for path, loader in ((second, None), (folder, {"name": "goodfire", "sae": second.name})):
        sae = SAE.load(path, loader=loader)
        assert sae.info.site.hook_name == "blocks.50.hook_resid_post"
        assert list(sae.info.provenance["files"]) == [second.name]
    with pytest.raises(SAEFormatError, match="has no SAE 'else'; it has Llama-3.1-8B"):
        SAE.load(folder, loader={"name": "goodfire", "sae": "else"})


def test_a_group_of_2(tmp_path: Path) -> None:
    folder, name = (
        FIXTURES / "sae_lens_2.1.3_group_folder",
        "saekit_tiny-python_blocks.0.hook_resid_pre_64_l1_coefficient_",
    )
    expected = load_file(folder / "expected.safetensors")
    with pytest.raises(
        SAEFormatError, match="holds 2 SAEs; name the folder of one of them: saes/saekit_tiny-python_blocks.0"
    ):
        SAE.load(folder)
    for sae in (
        SAE.load(folder / f"saes/{name}0.001"),
        SAE.load(folder, loader={"name": "sae_lens", "sae": f"saes/{name}0.001"}),
    ):
        close(sae.encode(expected["x"]), expected["encode"])
        close(sae(expected["x"]), expected["forward"])


class Stranger:
    def __init__(self, score: object) -> None:
        self.score = score

    def detects(self, files: SAEFiles) -> Any:
        return self.score

    def load(self, files: SAEFiles) -> saekit.PretrainedSAE:
        return saekit.PretrainedSAE(options={}, tensors={})


def strangers(**scores: object) -> saekit.PluginManager:
    plugins = [
        fake_plugin(
            "pretrained_loaders",
            name=name,
            config=attrs.make_class(f"Of{name}", {}, frozen=True),
            build=lambda config, score=score: Stranger(score),
        )
        for name, score in scores.items()
    ]
    return isolated_manager(*plugins)


def detected(folder: Path, **scores: object) -> str:
    from saekit.pretrained.detecting import detected as choose

    return choose(SAEFiles.in_folder(folder), strangers(**scores)).entry.name


def test_the_surest_loader_reads(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert detected(tmp_path, a=0.4, b=0.6, c=0) == "b"
    assert detected(tmp_path, a=0.9, b=True, c=False) == "b", "true is sure"
    assert detected(tmp_path, a=0.7, b=0.8) == "b", "sure enough for no warning"
    two = (
        r"read by b \[\], and may be for a \[\]: both find it likely, and none is sure \(b 0.75, a 0.5; 1 is sure\)\. "
        "loader='a' reads it as that one does, and loader='b' says that this is right$"
    )
    with pytest.warns(UserWarning, match=two):
        assert detected(tmp_path, a=0.5, b=0.75, c=0.4) == "b"
    three = (
        r"may be for a \[\] or c \[\]: all 3 find it likely, and none is sure \(b 0.75, a 0.6, c 0.5; 1 is sure\)\. "
        "loader='a' or loader='c' reads it as that one does"
    )
    with pytest.warns(UserWarning, match=three):
        assert detected(tmp_path, a=0.6, b=0.75, c=0.5) == "b"
    with pytest.raises(SAEFormatError) as error:
        detected(tmp_path, a=0.6, b=0.6, c=0.5)
    assert "several loaders recognize" in str(error.value)
    assert "They are equally sure (0.6 of 1; less sure: " in str(error.value)
    assert str(error.value).endswith("Name one: loader=...")


@pytest.mark.parametrize("score", [2, -0.5, math.nan, math.inf])
def test_what_is_no_score_is_the_loaders_fault(tmp_path: Path, score: object) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(SAEFormatError, match="detects returned .*expected true, false or a number from 0 to 1"):
        detected(tmp_path, a=score)
    with pytest.warns(UserWarning, match="detects returned"):
        assert detected(tmp_path, a=score, b=0.1) == "b"
