"""The saved folder: back again as it was, readable by sae-lens 6, and never half there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.saved import READER, make, sae_lens_python

import saekit
from saekit import SAE
from saekit.errors import SAEFormatError, StorageError
from saekit.files.storage import new_folder, write_text


@pytest.mark.parametrize(
    "options", [{}, {"activation": "tanh-relu", "apply_b_dec_to_input": False, "dtype": "float64"}]
)
def test_saved_and_loaded(tmp_path: Path, options: dict) -> None:
    sae = make(**options)
    assert sae.save(tmp_path / "sae") == tmp_path / "sae"
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.info == sae.info
    assert attrs.evolve(loaded.config, activation=sae.config.activation) == sae.config
    assert torch.equal(loaded.log_sparsity, sae.log_sparsity)
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), sae(x))
    assert set(load_file(tmp_path / "sae/sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert load_file(tmp_path / "sae/sae_weights.safetensors")["W_enc"].shape == (12, 30)
    sae.save(tmp_path / "sae")  # over itself
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_what_sae_lens_cannot_represent_has_a_name_it_does_not_know(tmp_path: Path) -> None:
    for activation, architecture in {"relu": "standard", "tanh-relu": "saekit:standard"}.items():
        make(activation=activation).save(tmp_path / activation)
        assert json.loads((tmp_path / activation / "cfg.json").read_text())["architecture"] == architecture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook_name", "head", "shape"),
    [
        ("blocks.1.hook_resid_post", None, (7, 12)),
        ("blocks.1.attn.hook_z", None, (2, 5, 3, 4)),
        ("blocks.1.attn.hook_z", 1, (7, 12)),
    ],
)
def test_sae_lens_6_reads_the_folder(tmp_path: Path, hook_name: str, head: int | None, shape: tuple[int, ...]) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    sae = make(hook_name, head=head)
    sae.save(tmp_path / "sae")
    x = torch.randn(shape)
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, tmp_path / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    assert (theirs["out"] - sae(x)).abs().max() < 1e-6 * sae(x).abs().max()
    assert (theirs["features"] - sae.encode(x)).abs().max() < 1e-6 * sae.encode(x).abs().max()
    read = json.loads(found.stdout.splitlines()[-1])
    assert read == {
        "hook_name": hook_name,
        "model": "gpt2-small",
        "prepend_bos": True,
        "reshape": "hook_z" if len(shape) == 4 else "none",
    }


def damaged(tmp_path: Path, change: object) -> Path:
    folder = make().save(tmp_path / "sae")
    change(folder)  # type: ignore[operator]
    return folder


def edit(key: str, value: object) -> object:
    def change(folder: Path) -> None:
        table = json.loads((folder / "cfg.json").read_text())
        node = table["saekit"]
        *path, last = key.split(".")
        for name in path:
            node = node[name]
        node[last] = value
        table["saekit"].pop("seal", None)
        (folder / "cfg.json").write_text(json.dumps(table))

    return change


def without_sums(folder: Path) -> None:
    edit("sha256", {})(folder)  # type: ignore[operator]


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "sae_weights.safetensors").read_bytes())
    data[-7] ^= 1
    (folder / "sae_weights.safetensors").write_bytes(data)


def junk(folder: Path) -> None:
    without_sums(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"junk")


def replace_tensor(name: str, value: torch.Tensor | None) -> object:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "sae_weights.safetensors")
        tensors.pop(name, None)
        without_sums(folder)
        save_file(tensors | ({name: value} if value is not None else {}), folder / "sae_weights.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (edit("format", 99), SAEFormatError, "has format 99, and this saekit reads 1 and 2: update saekit"),
        (edit("architecture", "other-dist:gated"), saekit.errors.UnknownKeyError, "pip install other-dist"),
        (edit("options.d_sae", 31), SAEFormatError, r"W_enc has shape \[12, 30\], expected \[12, 31\]"),
        (edit("options.d_sae", 10**7), SAEFormatError, r"W_enc has shape \[12, 30\], expected \[12, 10000000\]"),
        (edit("options", [1]), SAEFormatError, "saekit.options in cfg.json of .* is missing or of the wrong kind"),
        (
            edit("architecture", 3),
            SAEFormatError,
            "saekit.architecture in cfg.json of .* is missing or",
        ),
        (edit("site", {"foo": 1}), SAEFormatError, "saekit.site in cfg.json of .* is not a site"),
        (edit("options.knobs", 1), SAEFormatError, "knobs: is not an option"),
        (replace_tensor("b_enc", None), SAEFormatError, "b_enc is missing"),
        (replace_tensor("extra", torch.zeros(1)), SAEFormatError, "extra is not a tensor of this architecture"),
        (
            flip_a_bit,
            SAEFormatError,
            "is damaged or was changed after .*remove saekit.sha256",
        ),
        (junk, SAEFormatError, "not a readable safetensors"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), SAEFormatError, "has no file 'sae_weights.safetensors'"),
        (lambda f: (f / "cfg.json").write_text("{"), SAEFormatError, "cfg.json in .* is not valid JSON"),
        (lambda f: (f / "cfg.json").write_text("[]"), SAEFormatError, "holds list, expected an object"),
        (lambda f: (f / "cfg.json").unlink(), SAEFormatError, "no loader recognizes"),
    ],
)
def test_damaged_folders(tmp_path: Path, change: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAE.load(damaged(tmp_path, change))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SAEFormatError, match="nowhere is not there"):
        SAE.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(SAEFormatError, match="is a file, not a folder"):
        SAE.load(tmp_path / "file")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with new_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(StorageError, match="cannot write .*What was there before is kept"), new_folder(target):
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "old"
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "no" / "file", "x")
