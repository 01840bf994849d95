"""SAEs by release and id, from a Hub that has them where the registry says: they compute what the peer does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    "temporal": Published("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "temporal", at="layer_12/temporal"),
}


RECORDED = {"llama_scope": 4 / 7.25, "llama_scope_r1_distill": 0.5, "temporal": 0.25}
"""Factors of activations in the fixtures, where the registry has others: those of the published SAEs."""


def with_the_factor_of_the_registry(hub: FakeHub, name: str) -> float:
    """Write it into the files that say one; returns what rows are to be multiplied by for the same features."""
    one = ONE_OF_EACH[name]
    release = Catalog().find(one.release)
    factor = float(release.saes[one.sae_id].norm_scaling_factor or 0)
    folder = hub.root / "models" / str(release.repo) / release.saes[one.sae_id].path
    if name == "llama_scope":
        norms = dict.fromkeys(("in", "out"), 4 / factor)
        threshold = 0.52 * RECORDED[name] / factor  # in units of activations as they are
        changed = {"dataset_average_activation_norm": norms, "jump_relu_threshold": threshold}
        edit_json(folder / "hyperparams.json", lambda table: table.update(changed))
    elif name == "temporal":
        conf = folder / "conf.yaml"
        exact = 1 / 150  # of which the registry has nine digits
        conf.write_text(conf.read_text().replace("scaling_factor: 0.25", f"scaling_factor: {exact}"))
    return RECORDED[name] / factor


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
    assert used <= keys
    assert used == set(ONE_OF_EACH)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_release_of_each_loader(hub: FakeHub, name: str) -> None:
    one = ONE_OF_EACH[name]
    release = Catalog().find(one.release)
    expected = load_file(FIXTURES / one.fixture / "expected.safetensors")
    x = expected["x"] * (with_the_factor_of_the_registry(hub, name) if name in RECORDED else 1)
    sae = SAE.from_pretrained(one.release, one.sae_id, loader=one.loader)
    close(sae.encode(x), expected["encode"])
    found = sae.info.provenance
    assert (found["release"], found["sae_id"]) == (f"saekit:{one.release}", one.sae_id)
    assert found["repo"] == release.repo
    assert found["loader"] == f"saekit:{name}"
    assert len(found["revision"]) == 40
    assert release.saes[one.sae_id].neuronpedia == sae.info.metadata.get("neuronpedia_id")


def test_both_suffixes_of_goodfire(hub: FakeHub) -> None:
    """The file for 70B ends in .pt, the other in .pth."""
    repository = hub.root / "models/Goodfire/Llama-3.3-70B-Instruct-SAE-l50"
    repository.mkdir(parents=True)
    source = FIXTURES / "goodfire/Llama-3.1-8B-Instruct-SAE-l19.pth"
    (repository / "Llama-3.3-70B-Instruct-SAE-l50.pt").write_bytes(source.read_bytes())
    sae = SAE.from_pretrained("goodfire-llama-3.3-70b-instruct")
    assert sae.info.site.hook_name == "blocks.50.hook_resid_post"
    assert sae.info.metadata["model_name"] == "meta-llama/Llama-3.3-70B-Instruct"


def test_transcoders_with_and_without_a_skip_connection_of_one_release(hub: FakeHub) -> None:
    """The format is looked at once, and each file says for itself whether it has one."""
    release = Catalog().find("gemma-scope-2-1b-pt-transcoders-all")
    ids = [f"layer_9_width_16k_l0_small{ending}" for ending in ("", "_affine")]
    weights = load_file(FIXTURES / "gemma_scope_3/resid_post/layer_9_width_16k_l0_small/params.safetensors")
    skip = torch.randn(16, 16)
    for sae_id, more in zip(ids, ({}, {"affine_skip_connection": skip}), strict=True):
        folder = hub.root / "models" / str(release.repo) / release.saes[sae_id].path
        folder.mkdir(parents=True)
        save_file({**weights, **more}, folder / "params.safetensors")
        config = {"architecture": "jump_relu", "affine_connection": bool(more)}
        (folder / "config.json").write_text(json.dumps(config))
    for order in (ids, ids[::-1]):
        found = SAE.from_release(release.name, order)
        plain, skips = (found[sae_id] for sae_id in ids)
        assert [one.info.architecture for one in found.values()] == ["saekit:jumprelu_transcoder"] * 2
        assert (plain.config.skip_connection, skips.config.skip_connection) == (False, True)
        x = torch.randn(5, 16)
        assert torch.equal(plain.encode(x), skips.encode(x))
        assert (skips(x) - plain(x) - x @ skip).abs().max() < 1e-4
        assert skips.info.sites.targets[0].hook_name == "blocks.9.hook_mlp_out"


@pytest.fixture
def releases(hub: FakeHub, tmp_path: Path) -> Path:
    """A user's file, of a repository with 16 SAEs of sae-lens, on two branches, and of a folder here."""
    for branch, file in (("main", "sae_lens_6.54.12_topk"), ("old", "sae_lens_3.0.0_standard")):
        repository = hub.branch("models", "somebody/saes", branch)
        for number in range(16 * (not repository.exists())):
            copied(file, repository, f"layers/{number}")
    copied("sae_lens_2.1.3_folder", tmp_path, "here/first")
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        [mine]
        repo = "somebody/saes"
        model = "a-model"
        [mine.saes]
        zero = "layers/0"
        one = { path = "layers/1", l0 = 3, neuronpedia = "a-model/1" }
        two = { path = "layers/2" }
        three = "layers/3"
        gone = "layers/gone"
        """
        + "\n".join(f'number-{n} = "layers/{n}"' for n in range(4, 16))
        + """

        [older]
        repo = "somebody/saes"
        revision = "old"
        loader = "sae_lens"
        overrides = { model_name = "another", hook_name = "blocks.3.hook_mlp_out", dataset_path = "d" }
        saes = { "layers/0" = {} }

        [local]
        folder = "here"
        saes = { first = {} }
    """
    )
    return path


def test_several_at_once_are_one_lookup_one_listing_and_one_look_at_the_format(
    hub: FakeHub, releases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.pretrained import catalog, detecting

    detected, looked, before = [], [], len(hub.requests)
    real, find = detecting.recognized, catalog.Catalog.find
    monkeypatch.setattr(detecting, "recognized", lambda *a: detected.append(1) or real(*a))
    monkeypatch.setattr(catalog.Catalog, "find", lambda *a: looked.append(1) or find(*a))
    names = ["zero", "two", "one", "three", *(f"number-{n}" for n in range(15, 3, -1))]
    saes = SAE.from_release("mine", names, releases=releases)
    assert list(saes) == names
    assert (len(looked), len(detected)) == (1, 1)
    listings = [line for line in hub.requests[before:] if "/api/models/somebody/saes" in line]
    assert len(listings) == 1, listings
    assert [sae.info.provenance["folder"] for sae in saes.values()] == [
        f"layers/{n}" for n in (0, 2, 1, 3, *range(15, 3, -1))
    ]
    assert saes["one"].info.metadata["neuronpedia_id"] == "a-model/1"
    assert "neuronpedia_id" not in saes["two"].info.metadata
    with pytest.raises(UnknownKeyError, match="has no SAE 'tow'"):  # before anything is fetched
        SAE.from_release("mine", ["zero", "tow"], releases=releases)
    assert list(SAE.from_release("mine", "one", releases=releases)) == ["one"], "an id alone is no list of letters"


def test_what_a_release_says_counts_more_than_the_files(releases: Path, tmp_path: Path) -> None:
    expected = load_file(FIXTURES / "sae_lens_3.0.0_standard/expected.safetensors")
    sae = SAE.from_pretrained("older", releases=releases)
    close(sae.encode(expected["x"]), expected["encode"])
    for one in (sae, SAE.load(sae.save(tmp_path / "again"))):
        fed = one.info.metadata
        assert (fed["model_name"], fed["dataset_path"]) == ("another", "d")
        assert one.info.site.hook_name == "blocks.3.hook_mlp_out"
        assert (one.info.provenance["release"], one.info.provenance["sae_id"]) == ("user:older", "layers/0")
    newer = SAE.from_pretrained("older", releases=releases, revision="main", loader="sae_lens")
    assert newer.info.architecture == "saekit:topk", "what is asked for counts more than the release"


def test_a_factor_of_the_registry_is_folded_in(hub: FakeHub, tmp_path: Path) -> None:
    """Where the files say that activations were scaled, and not by how much; else it is left alone, as by the peer."""
    release = Catalog().find("gpt2-small-mlp-tm")
    sae_ids = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    expected = load_file(FIXTURES / "sae_lens_2.1.3_folder/expected.safetensors")
    for sae_id, scaled in zip(sae_ids, (True, False), strict=True):
        folder = hub.root / "models" / str(release.repo) / release.saes[sae_id].path
        copied("sae_lens_2.1.3_folder", folder)
        edit_json(folder / "cfg.json", lambda table, scaled=scaled: table.update(normalize_activations=scaled))
    scaled, plain = SAE.from_release(release.name, sae_ids).values()
    factor = release.saes[sae_ids[0]].norm_scaling_factor
    close(scaled.encode(expected["x"] / factor), expected["encode"])
    close(scaled(expected["x"] / factor), expected["forward"] / factor)
    assert not scaled.info.scale_is_unknown
    assert scaled.info.metadata["activation_scale"] == factor
    assert scaled.info.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    close(plain.encode(expected["x"]), expected["encode"])
    assert scaled.log_sparsity is not None


@pytest.mark.parametrize(
    ("fixture", "path", "loader", "found"),
    [
        ("temporal", "layer_12/temporal", "temporal", 0.25),
        ("llama_scope", "Llama3_1-8B-Base-L3R-8x", "llama_scope", 4 / 7.25),
        ("sae_lens_6.54.12_training_topk", "", "sae_lens", None),
    ],
)
def test_a_factor_of_the_release_that_is_not_that_of_the_files(
    tmp_path: Path, fixture: str, path: str, loader: str, found: float | None
) -> None:
    folder = copied(fixture, tmp_path / "files")
    if found is None:
        edit_json(folder / "cfg.json", lambda table: table.update(normalize_activations="expected_average_only_in"))
        found = 0.7
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": found}))
    table = tmp_path / "a.json"

    def load(said: float) -> SAE:
        saes = {"one": {"path": path or ".", "norm_scaling_factor": said}}
        table.write_text(json.dumps({"a": {"folder": "files", "loader": loader, "saes": saes}}))
        return SAE.from_pretrained("a", releases=table)

    for wrong in (0.123, found * 1.1, 1):
        with pytest.raises(SAEFormatError, match=f"multiplied by {wrong:g} .*says {found:g}: only one of them can be"):
            load(wrong)
    whole = SAE.load(folder / path, loader=loader)
    for right in (found, found * 1.0005, float(f"{found:.2f}")):  # rounded, as registries are
        x = torch.randn(1, 5, whole.d_in)
        assert torch.equal(load(right)(x), whole(x)), "that of the files is exact"


def test_without_a_registry_entry(hub: FakeHub, releases: Path, tmp_path: Path) -> None:
    for found in (
        SAE.from_pretrained(repo_id="somebody/saes", folder="layers/2", revision="old"),
        SAE.from_pretrained("somebody/saes", "layers/2", revision="old"),
        SAE.from_pretrained("local", "first", releases=releases),
        SAE.from_pretrained(tmp_path / "here/first"),
        SAE.from_pretrained(str(tmp_path / "here"), "first"),
    ):
        assert found.info.architecture == "saekit:standard"
    assert found.info.provenance.get("release") is None


def test_a_repository_that_is_of_a_release_is_one_all_the_same(hub: FakeHub) -> None:
    repo = "jbloom/GPT2-Small-SAEs-Reformatted"
    expected = SAE.from_pretrained("gpt2-small-res-jb", "blocks.0.hook_resid_pre")
    found = SAE.from_pretrained(repo, "blocks.0.hook_resid_pre")
    assert torch.equal(found.W_enc, expected.W_enc)
    assert "release" not in found.info.provenance
    with pytest.raises(SAEFormatError, match="nowhere") as caught:
        SAE.from_pretrained(repo, "nowhere")
    assert caught.value.__notes__ == ["By their ids its SAEs are found by the name of a release: gpt2-small-res-jb."]


def test_every_way_to_load_can_verify(hub: FakeHub, releases: Path) -> None:
    folder = hub.branch("models", "somebody/saes", "main") / "layers/2"
    for ways in (
        lambda: SAE.from_pretrained("mine", "two", releases=releases, verify=True),
        lambda: SAE.from_pretrained("somebody/saes", "layers/2", verify=True),
        lambda: SAE.from_release("mine", ["two"], releases=releases, verify=True)["two"],
    ):
        with pytest.raises(SAEFormatError, match=r"has no probe.safetensors, so that there is nothing to compare"):
            ways()
    sae = SAE.from_pretrained("mine", "two", releases=releases)
    sae.save(folder)
    try:
        for dtype in (None, "bfloat16"):
            assert SAE.from_pretrained("mine", "two", releases=releases, verify=True, dtype=dtype).d_sae == sae.d_sae
        assert [*SAE.from_release("mine", ["two"], releases=releases, verify=True)] == ["two"]
    finally:
        shutil.rmtree(folder)
        copied("sae_lens_6.54.12_topk", folder)


def test_of_what_cannot_be_found_the_message_says_what_to_do(hub: FakeHub, releases: Path) -> None:
    for arguments, error, message in (
        (("gpt2-small-res-jbb", "x"), UnknownKeyError, "'gpt2-small-res-jbb'. Did you mean 'gpt2-small-res-jb'"),
        (("gpt2-small-res-jb", "blocks.8.hook_resid_pr"), UnknownKeyError, "Did you mean 'blocks.8.hook_resid_pre'"),
        (("gpt2-small-res-jb",), UnknownKeyError, r"has 13 SAEs; say which. It has blocks.0"),
        (("jbloom/GPT2-Small-SAEs-Reformatted",), UnknownKeyError, r"\(gpt2-small-res-jb is of that repository\)"),
        (("mine", "gone"), SAEFormatError, "is 'layers/gone' in somebody/saes, which has no such file or folder; "
                                           "there are layers/"),
        ((), ConfigError, "needs a release and an id, repo_id="),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            SAE.from_pretrained(*arguments, releases=releases)
    for options, message in (
        ({"repo_id": "a/b", "release": "c"}, "the release 'c' and repo_id = 'a/b'"),
        ({"repo_id": "a/b", "sae_id": "c"}, "sae_id = 'c', which is of a release,"),
        ({"release": "c", "folder": "d"}, "folder = 'd' goes with repo_id"),
        ({"release": str(releases.parent), "revision": "d"}, "is a path on this machine, and revision is"),
    ):
        with pytest.raises(ConfigError, match=message):
            SAE.from_pretrained(**options)


def test_a_path_that_nobody_understands_and_a_loader_that_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[a]\nrepo = "mntss/clt-gemma-2-2b-2.5M"\nloader = "mntss"\nsaes = { four = "4", five = "5" }\n'
                    '[b]\nrepo = "mntss/clt-gemma-2-2b-2.5M"\nloader = "mntsss"\nsaes = { four = "4" }\n'
                    '[c]\nrepo = "mntss/clt-gemma-2-2b-2.5M"\nloader = "mntss"\nsaes = { four = "4" }\n'
                    'overrides = { normalize_activations = "constant_norm_rescale" }')  # fmt: skip
    assert SAE.from_pretrained("a", "four", releases=path).info.architecture == "saekit:transcoder"
    with pytest.raises(SAEFormatError, match="'five' is '5' in mntss/clt-gemma-2-2b-2.5M, which has no such file"):
        SAE.from_pretrained("a", "five", releases=path)
    with pytest.raises(UnknownKeyError, match="mntsss") as caught:
        SAE.from_pretrained("b", releases=path)
    assert "It is the loader of the release user:b. loader=... names another." in caught.value.__notes__
    with pytest.raises(
        SAEFormatError, match="says normalize_activations = 'constant_norm_rescale', and the loader saekit"
    ):
        SAE.from_pretrained("c", releases=path)


@pytest.mark.parametrize("revision", ["../../../../outside", "/outside", "a/../../b", "..\\outside"])
def test_a_revision_leads_nowhere_else(hub: FakeHub, tmp_path: Path, revision: str) -> None:
    """The cache keeps a file of that name."""
    requests = len(hub.requests)
    with pytest.raises(SAEFormatError, match=r"is no revision of the Hub repository 'somebody/saes': expected a"):
        SAE.from_hub("somebody/saes", "layers/0", revision=revision)
    (path := tmp_path / "a.json").write_text(
        json.dumps({"a": {"repo": "somebody/saes", "revision": revision, "saes": {"layers/0": {}}}})
    )
    with pytest.raises(SAEFormatError, match="is no revision of the Hub repository"):
        SAE.from_pretrained("a", releases=path)
    assert len(hub.requests) == requests


def test_what_it_is_stays_what_was_asked_for(hub: FakeHub) -> None:
    from saekit_plugins.architectures.topk.module import TopKSAE

    with pytest.raises(SAEFormatError, match="this is a StandardSAE, not a TopKSAE"):
        TopKSAE.from_pretrained("gpt2-small-res-jb", "blocks.0.hook_resid_pre")


def test_json_is_enough_to_say_what_it_is(hub: FakeHub, tmp_path: Path) -> None:
    sae = SAE.from_pretrained("gpt2-small-res-jb", "blocks.0.hook_resid_pre")
    saved = json.loads((sae.save(tmp_path / "a") / "cfg.json").read_text())
    assert saved["saekit"]["provenance"]["release"] == "saekit:gpt2-small-res-jb"
