"""Loaders of other people's formats, from a folder and from a fake Hub on loopback."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from saekit_plugins.loaders.connor_rob_hook_z import ConnorRobConfig
from safetensors.torch import save_file
from support.fake_hub import FakeHub, fake_hub
from support.foreign import CONNOR, NEW, OLD, reconstruct, tensors, write, write_connor
from support.formats import FIXTURES, copied, edit_json

import saekit
from saekit import SAE, Site
from saekit.errors import SAEFormatError


@pytest.mark.parametrize(
    ("config", "tanh"),
    [
        (OLD, False),
        (OLD | {"activation_fn": "tanh-relu"}, True),
        (OLD | {"activation_fn_str": "tanh-relu"}, True),
        (NEW, False),
    ],
)
def test_sae_lens_of_every_age(tmp_path: Path, config: dict, tanh: bool) -> None:
    weights, x = tensors(), torch.randn(4, 6)
    sae = SAE.load(write(tmp_path, config, weights | {"scaling_factor": torch.ones(10)}))
    assert torch.allclose(sae(x), reconstruct(weights, x, tanh), atol=1e-6)
    assert sae.info.site == saekit.Site(hook_name="blocks.2.hook_resid_pre")
    assert sae.info.metadata["model_name"] == "gpt2-small"
    assert sae.log_sparsity is None


def test_sae_lens_6_need_not_name_a_hook(tmp_path: Path) -> None:
    """As of SAEs that were made by hand, or trained on somebody's own activations."""
    bare = FIXTURES / "sae_lens_6.54.12_bare_standard"
    sae = SAE.load(bare)
    assert sae.info.site is None
    assert sae.ports == SAE.from_dict({"name": "standard", "d_in": 16, "d_sae": 64}).ports, "as what is made here"
    named = SAE.load(bare, loader={"name": "sae_lens", "hook_name": "blocks.2.hook_resid_pre"})
    assert (
        named.info.site == SAE.load(named.save(tmp_path / "a")).info.site == Site(hook_name="blocks.2.hook_resid_pre")
    )
    for form in ("sae_lens", "dictionary_learning"):
        assert SAE.load(sae.export(tmp_path / form, form)).info.site is None
    assert "hook_name" not in json.loads((tmp_path / "sae_lens/cfg.json").read_text())["metadata"]
    with pytest.raises(
        SAEFormatError, match="option hook_name is 'a', but cfg.json in .* says 'blocks.2.hook_resid_pr"
    ):
        SAE.load(write(tmp_path / "b", NEW, tensors()), loader={"name": "sae_lens", "hook_name": "a"})


def test_transcoders_of_sae_lens_6_need_not_name_hooks(tmp_path: Path) -> None:
    bare = FIXTURES / "sae_lens_6.54.12_bare_transcoder"
    sae = SAE.load(bare)
    assert (sae.info.sites, sae.ports) == (None, saekit.Ports({"input": 16}, {"output": 16}))
    assert SAE.load(sae.export(tmp_path / "a", "sae_lens")).ports == sae.ports
    folder = copied(bare.name, tmp_path / "b")
    edit_json(folder / "cfg.json", lambda table: table["metadata"].update(hook_name_out="blocks.2.hook_mlp_out"))
    half = SAE.load(folder)
    assert (half.info.sites, half.info.metadata["hook_name_out"]) == (None, "blocks.2.hook_mlp_out")
    whole = SAE.load(folder, loader={"name": "sae_lens", "hook_name": "blocks.2.hook_mlp_in"})
    assert whole.info.sites == saekit.Sites(
        (Site(hook_name="blocks.2.hook_mlp_in"),), (Site(hook_name="blocks.2.hook_mlp_out"),)
    )


def test_sae_lens_details(tmp_path: Path) -> None:
    weights, x, factor = tensors(), torch.randn(4, 6), torch.linspace(0.5, 2, 10)
    folder = write(tmp_path / "a", OLD | {"apply_b_dec_to_input": False}, weights | {"scaling_factor": factor})
    save_file({"sparsity": torch.arange(10.0)}, folder / "sparsity.safetensors")
    sae = SAE.load(folder, loader="saekit:sae_lens")
    f = (x @ weights["W_enc"] + weights["b_enc"]).relu()
    assert torch.allclose(sae(x), f * factor @ weights["W_dec"] + weights["b_dec"], atol=1e-5), (
        "a learned scale is kept"
    )
    assert torch.equal(sae.log_sparsity, torch.arange(10.0))
    with pytest.raises(SAEFormatError, match=r"lacks d_in, hook_name"):
        SAE.load(write(tmp_path / "b", {"d_sae": 10}, weights))
    with pytest.raises(
        SAEFormatError, match="architecture in cfg.json in .* is 'unheard_of'; this loader reads standard, topk"
    ):
        SAE.load(write(tmp_path / "c", OLD | {"architecture": "unheard_of"}, weights))
    with pytest.warns(UserWarning, match="does not hold the factor"):
        SAE.load(write(tmp_path / "d", OLD | {"normalize_activations": "expected_average_only_in"}, weights))
    for value, message in (
        ("covariance_whitening", "is a checkpoint of a training whose map of activations is not in these files"),
        ("batch_norm", "is 'batch_norm', expected one of 'none', 'expected_average_only_in', 'layer_norm', 'constant"),
    ):
        with pytest.raises(SAEFormatError, match=f"normalize_activations in cfg.json in .*{message}"):
            SAE.load(write(tmp_path / "e", OLD | {"normalize_activations": value}, weights))
    with pytest.raises(SAEFormatError, match=r"W_enc has shape \[6, 10\], expected \[6, 11\]"):
        SAE.load(write(tmp_path / "f", OLD | {"d_sae": 11}, weights))


@pytest.mark.parametrize("age", [OLD, NEW])
def test_rows_that_sae_lens_normalizes(tmp_path: Path, age: dict) -> None:
    """Where the file says so, and where only the user does, as for releases whose files do not."""
    weights, x = tensors(), torch.randn(4, 6) * 3 + 1
    z = x * 6**0.5 / x.norm(dim=1, keepdim=True)
    expected = reconstruct(weights, z, "tanh" in str(age)) * x.norm(dim=1, keepdim=True) / 6**0.5
    said = {"normalize_activations": "constant_norm_rescale"}
    silent = {name: value for name, value in age.items() if name != "normalize_activations"}
    loader = {"name": "sae_lens", **said}
    for number, (config, given) in enumerate(((age | said, None), (age | said, loader), (silent, loader))):
        sae = SAE.load(write(tmp_path / str(number), config, weights), loader=given)
        assert torch.allclose(sae(x), expected, atol=1e-5)
        assert sae.info.input_transform == "saekit:constant_norm"
    folder = write(tmp_path / "other", age | {"normalize_activations": "layer_norm"}, weights)
    with pytest.raises(
        SAEFormatError, match=r"option normalize_activations is 'constant_norm_rescale', but .* says 'layer"
    ):
        SAE.load(folder, loader=loader)


def test_connor_rob_hook_z(tmp_path: Path) -> None:
    weights = tensors()
    sae = SAE.load(write_connor(tmp_path, weights))
    z = torch.randn(2, 3, 2, 3)
    assert torch.allclose(sae(z), reconstruct(weights, z.flatten(-2)).reshape(z.shape), atol=1e-6)
    assert sae.info.site == saekit.Site(hook_name="blocks.3.attn.hook_z")
    expected = {"model_name": "gpt2-small", "context_size": 128, "hook_layer": 3, "prepend_bos": True}
    assert sae.info.metadata == expected
    write_connor(tmp_path, weights, "another")
    with pytest.raises(SAEFormatError, match=r"holds 2 SAEs of this format; say which.*It has another, gpt2"):
        SAE.load(tmp_path)
    for loader in ({"name": "connor_rob_hook_z", "sae": "another"}, ConnorRobConfig(sae="another")):
        assert torch.equal(SAE.load(tmp_path, loader=loader).W_dec, weights["W_dec"])
    with pytest.raises(saekit.ConfigError, match="saee: is not an option. Did you mean 'sae'"):
        SAE.load(tmp_path, loader={"name": "connor_rob_hook_z", "saee": "another"})


class Bomb:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("state", [Bomb(), {**tensors(), "x": Bomb()}])
def test_a_pickle_that_holds_anything_but_tensors_is_refused(tmp_path: Path, state: object) -> None:
    with pytest.raises(SAEFormatError, match="is not a plain file of tensors, and nothing else is unpickled"):
        SAE.load(write_connor(tmp_path, state))


def test_connor_rob_with_parts_missing(tmp_path: Path) -> None:
    with pytest.raises(
        SAEFormatError, match="must hold W_enc, b_enc, W_dec, b_dec; b_enc, W_dec, b_dec not found, only W_enc"
    ):
        SAE.load(write_connor(tmp_path / "a", {"W_enc": torch.zeros(1)}))
    with pytest.raises(SAEFormatError, match="lacks dict_size, layer"):
        SAE.load(write_connor(tmp_path / "b", tensors(), config={"act_size": 6, "act_name": "x"}))
    (folder := tmp_path / "c").mkdir()
    (folder / "x.pt").write_bytes(pickle.dumps([1]))
    (folder / "x_cfg.json").write_text(json.dumps(CONNOR))
    with pytest.raises(SAEFormatError):
        SAE.load(folder)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub with one repository, ``somebody/saes``."""
    root = tmp_path / "hub"
    write(root / "models/somebody/saes/layer2", OLD, tensors())
    write_connor(root / "models/somebody/saes/attn", tensors(seed=1))
    with fake_hub(root) as hub:
        yield hub


FROM_HUB = """
import torch, saekit
for folder in ("layer2", "attn"):
    sae = saekit.SAE.from_hub("somebody/saes", folder)
    print(sae.info.site.hook_name, sae.W_enc.sum().item())
for repo, folder in (("somebody/saes", "layer9"), ("somebody/else", "x")):
    try:
        saekit.SAE.from_hub(repo, folder)
    except saekit.errors.SAEFormatError as error:
        print(error)
"""


@pytest.mark.slow
def test_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home")
    found = subprocess.run([sys.executable, "-c", FROM_HUB], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].startswith("blocks.2.hook_resid_pre ")
    assert lines[1].startswith("blocks.3.attn.hook_z ")
    assert float(lines[0].split()[1]) == pytest.approx(tensors()["W_enc"].sum().item())
    assert lines[2] == "somebody/saes has no folder 'layer9'; it has attn, layer2"
    assert lines[3].startswith("cannot list the Hub repository 'somebody/else'")
