"""Tensors that cannot be an SAE's weights are refused, whichever loader reads them, by the name of file and tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign import NEW, tensors, write, write_connor
from support.saved import make

from saekit import SAE, PretrainedSAE
from saekit.errors import SAEFormatError
from saekit.testing import fake_plugin, isolated_manager
from saekit.weights import check_tensor


def with_numbers(value: torch.Tensor, *numbers: float) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[: len(numbers)] = torch.tensor(numbers, dtype=value.dtype)
    return value


NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (lambda t: with_numbers(t, NAN, NAN), "holds 2 NaN among {n} numbers, expected finite ones"),
    "both": (lambda t: with_numbers(t, INF, NAN, -INF), "holds 1 NaN and 2 infinite among {n} numbers"),
    "int64": (lambda t: t.to(torch.int64), "holds numbers of type int64, expected float16, bfloat16, float32, float64"),
    "bool": (lambda t: t > 0, "holds numbers of type bool"),
    "complex": (lambda t: t.to(torch.complex64), "holds numbers of type complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "holds numbers of type float8_e4m3fn"),
}


def own_folder(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Path:
    """A folder of saekit whose checksums somebody has removed."""
    folder = make().save(tmp_path / "own")
    config = json.loads((folder / "cfg.json").read_text())
    del config["saekit"]["sha256"]
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {name: change(weights[name])}, folder / "sae_weights.safetensors")
    return folder


def peers_folder(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Path:
    weights = tensors()
    return write(tmp_path / "peer", NEW, weights | {name: change(weights[name])})


def pickled(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Path:
    weights = tensors()
    return write_connor(tmp_path / "connor", weights | {name: change(weights[name])})


@pytest.mark.parametrize("folder", [own_folder, peers_folder, pickled])
@pytest.mark.parametrize("kind", list(BAD))
def test_numbers_that_are_no_weights(tmp_path: Path, folder: Any, kind: str) -> None:
    change, message = BAD[kind]
    numbers = 60 if folder is not own_folder else 360
    file = "gpt2-small_L3_Hcat_z.pt" if folder is pickled else "sae_weights.safetensors"
    with pytest.raises(SAEFormatError, match=f"W_enc of {file} in .* {message.format(n=numbers)}"):
        SAE.load(folder(tmp_path, change, "W_enc"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to_sparse(), "W_dec of .*pt in .* is a sparse_coo tensor, expected a plain dense one"),
        (lambda t: t.to_sparse_csr(), "is a sparse_csr tensor"),
        (lambda t: t.to("meta"), r"is a meta \(shape without numbers\) tensor"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is a quantized tensor"),
        (lambda t: torch.ones(1, 1).expand(10, 6), r"has shape \[10, 6\], but its file holds only 1 numbers of it"),
        (lambda t: [1.0], "is of type list, expected a tensor"),
        (lambda t: t[0], r"W_dec has shape \[6\], expected \[10, 6\]"),
        (lambda t: t.flatten(), r"W_dec has shape \[60\], expected \[10, 6\]"),
    ],
)
def test_tensors_of_odd_kinds(tmp_path: Path, change: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these kinds are in beta or about to go
        folder = pickled(tmp_path, change, "W_dec")
        with pytest.raises(SAEFormatError, match=message):
            SAE.load(folder)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("old", [True, False])
def test_a_pt_file_that_is_empty_or_cut(tmp_path: Path, part: float, old: bool) -> None:
    folder = write_connor(tmp_path, tensors())
    (file,) = folder.glob("*.pt")
    if old:
        torch.save(tensors(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(SAEFormatError, match=r"L3_Hcat_z.pt in .* is not a plain file of tensors, and") as error:
        SAE.load(folder)
    assert "weights_only" not in str(error.value)
    assert "trust" not in str(error.value)


@pytest.mark.parametrize("state", [[1.0], torch.zeros(3), {1: torch.zeros(3)}])
def test_a_pt_file_of_something_else(tmp_path: Path, state: object) -> None:
    with pytest.raises(SAEFormatError, match="must hold tensors by name, found"):
        SAE.load(write_connor(tmp_path, state))


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "sparsity.safetensors"])
@pytest.mark.parametrize("loader", [None, "sae_lens"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_safetensors_file_that_is_cut(tmp_path: Path, file: str, loader: str | None, part: float) -> None:
    folder = own_folder(tmp_path, lambda t: t, "W_enc")
    (folder / file).write_bytes((folder / file).read_bytes()[: int(part * (folder / file).stat().st_size)])
    with pytest.raises(SAEFormatError, match=f"{file} in .* is not a readable safetensors file"):
        SAE.load(folder, loader=loader)
    (folder / file).unlink()
    (folder / file).mkdir()
    if file == "sae_weights.safetensors":
        with pytest.raises(SAEFormatError, match="has no file 'sae_weights.safetensors'"):
            SAE.load(folder, loader=loader)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (torch.zeros(9), r"the log sparsity has shape \[9\], expected \[10\]"),
        (torch.zeros(10, 1), r"the log sparsity has shape \[10, 1\], expected \[10\]"),
        (torch.zeros(10, dtype=torch.int64), "sparsity of sparsity.safetensors in .* holds numbers of type int64"),
        (torch.full((10,), NAN), "holds 10 NaN among 10 numbers, expected finite ones or -inf"),
        (torch.full((10,), INF), "holds 10 infinite among 10"),
    ],
)
def test_sparsity_that_is_none(tmp_path: Path, sparsity: torch.Tensor, message: str) -> None:
    folder = write(tmp_path, NEW, tensors())
    save_file({"sparsity": sparsity}, folder / "sparsity.safetensors")
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)


def test_sparsity_of_features_that_never_fired(tmp_path: Path) -> None:
    folder = write(tmp_path, NEW, tensors())
    save_file({"sparsity": torch.full((10,), -INF)}, folder / "sparsity.safetensors")
    sae = SAE.load(folder)
    assert torch.equal(sae.log_sparsity, torch.full((10,), -INF))
    assert torch.equal(SAE.load(sae.save(tmp_path / "again")).log_sparsity, sae.log_sparsity)
    save_file({"other": torch.zeros(10)}, folder / "sparsity.safetensors")
    with pytest.raises(SAEFormatError, match=r"sparsity.safetensors in .* must hold sparsity; sparsity not found"):
        SAE.load(folder)


def test_large_numbers_whose_sum_is_not_finite_are_fine() -> None:
    check_tensor(torch.full((4,), 3e38), "x", "y")
    check_tensor(torch.full((4,), 6e4, dtype=torch.float16), "x", "y")
    with pytest.raises(SAEFormatError, match="x of y holds 1 NaN among 5"):
        check_tensor(torch.tensor([3e38] * 4 + [NAN]), "x", "y")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ({"tensors": {"W_enc": [1]}}, "W_enc of .* is of type list, expected a tensor"),
        ({"tensors": None}, "the SAE in .*: the loader test:strange gave None as tensors, expected a dict of"),
        ({"options": 3}, "gave 3 as options"),
        (
            {"site": "blocks.0"},
            "gave 'blocks.0' as site, expected a saekit.Site, such as saekit.Site.hook_name",
        ),
        ({"architecture": None}, "gave None as architecture"),
        ({"activation_scale": NAN}, "scaled by nan, expected a number above 0"),
        ({"options": {"d_sae": 10, "d_in": 10**9}, "tensors": {"b_dec": torch.zeros(6)}}, "d_in × d_sae is 1e\\+10"),
        ({"options": {"d_sae": 10}, "tensors": {"b_enc": torch.zeros(10)}}, "says d_in nowhere"),
        ({"options": {"d_in": 6, "d_sae": 11}, "tensors": tensors()}, r"W_enc has shape \[6, 10\], expected \[6, 11\]"),
    ],
)
def test_what_a_strangers_loader_may_give(tmp_path: Path, read: dict[str, Any], message: str) -> None:
    class Loader:
        def detects(self, files: object) -> bool:
            return True

        def load(self, files: object) -> PretrainedSAE:
            return PretrainedSAE(**({"options": {"d_in": 6, "d_sae": 10}, "tensors": tensors()} | read))

    plugins = isolated_manager(
        fake_plugin("pretrained_loaders", "strange", build=lambda config: Loader()), builtins=True
    )
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(tmp_path, loader="strange", plugins=plugins)
