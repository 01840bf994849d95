"""SAEs by release and id, from a Hub that has them where the registry says: what the peer computes is what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fake_hub import FakeHub
from support.formats import FIXTURES, copied, edit_json
from support.hub_releases import Published, hub_of

import saekit
from saekit import SAE
from saekit.errors import ConfigError, SAEFormatError, UnknownKeyError
from saekit.pretrained.catalog import Catalog

ONE_OF_EACH = {
    "sae_lens": Published("gpt2-small-res-jb", "blocks.0.hook_resid_pre", "sae_lens_3.0.0_standard"),
    "connor_rob_hook_z": Published(
        "gpt2-small-hook-z-kk",
        "blocks.0.hook_z",
        "connor_rob_hook_z",
        at="gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds64_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9",
        beside=True,
    ),
    "deepseek_r1": Published(
        "deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", "deepseek_r1", beside=True
    ),
    "dictionary_learning_1": Published(
        "sae_bench_pythia70m_sweep_topk_ctx128_0730",
        "blocks.3.hook_resid_post__trainer_0",
        "dictionary_learning_0.1.0_topk",
    ),
    "gemma_2": Published(
        "gemma-scope-2b-pt-res",
        "layer_7/width_16k/average_l0_36",
        "gemma_scope_2_npz",
        at="layer_7/width_16k/average_l0_30",
    ),
    "gemma_2_transcoder": Published(
        "gemma-scope-2b-pt-transcoders",
        "layer_7/width_16k/average_l0_70",
        "gemma_2_transcoder",
        at="layer_5/width_16k/average_l0_41",
    ),
    "gemma_3": Published(
        "gemma-scope-2-1b-pt-res-all",
        "layer_9_width_16k_l0_small",
        "gemma_scope_3",
        at="resid_post/layer_9_width_16k_l0_small",
    ),
    "goodfire": Published("goodfire-llama-3.1-8b-instruct", "layer_19", "goodfire", beside=True),
    "llama_scope": Published("llama_scope_lxr_8x", "l3r_8x", "llama_scope", at="Llama3_1-8B-Base-L3R-8x"),
    "llama_scope_r1_distill": Published(
        "llama_scope_r1_distill",
        "l3r_800m_slimpajama",
        "llama_scope_r1_distill",
        at="800M-Slimpajama-0-OpenR1-Math-220k/L3R",
    ),
    "mntss_clt_layer_transcoder": Published(
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_4", "mntss_clt_layer", beside=True
    ),
    "mwhanna_transcoder": Published(
        "mwhanna-qwen3-0.6b-transcoders-lowl0", "layer_6", "mwhanna_transcoder", beside=True
    ),
    "qwen_scope": Published(
        "qwen-scope-3-1.7b-base-w32k-l50",
        "layer0",
        "qwen_scope",
        beside=True,
        loader={"name": "qwen_scope", "k": 9},  # the fixture's; the repository of the registry is of 50
    ),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with hub_of(tmp_path_factory.mktemp("hub"), *ONE_OF_EACH.values()) as hub:
        yield hub


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_every_loader_of_the_registry_is_there() -> None:
    used = {release.loader for release in Catalog().releases}
    keys = {item.entry.name for item in saekit.default_manager().registry("pretrained_loaders").items}
    assert used - keys <= {"temporal"}
    assert used - {"temporal"} == set(ONE_OF_EACH)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_release_of_each_loader(hub: FakeHub, name: str) -> None:
    one = ONE_OF_EACH[name]
    release = Catalog().find(one.release)
    sae = SAE.from_pretrained(one.release, one.sae_id, loader=one.loader)
    expected = load_file(FIXTURES / one.fixture / "expected.safetensors")
    x = expected["x"]
    if name == "llama_scope_r1_distill":  # recorded with a factor of 0.5, and the registry has another
        x = x * 0.5 / release.saes[one.sae_id].norm_scaling_factor
    close(sae.encode(x), expected["encode"])
    found = sae.info.provenance
    assert (found["release"], found["sae_id"]) == (f"saekit:{one.release}", one.sae_id)
    assert found["repo"] == release.repo
    assert found["loader"] == f"saekit:{name}"
    assert len(found["revision"]) == 40
    assert release.saes[one.sae_id].neuronpedia == sae.info.metadata.get("neuronpedia_id")
