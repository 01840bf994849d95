"""Loading large SAEs: in one pass, in the layout, the type and on the device that are wanted, and in memory once."""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from safetensors.torch import save_file
from support.kernels import built
from torch import Tensor

import saekit
from saekit.errors import ConfigError, SAEFormatError
from saekit.files import checksums, mapped
from saekit.pretrained.load import build_sae
from saekit.sae import taking

CONFIGS: dict[str, saekit.SAEConfig] = {
    "standard": StandardConfig(d_sae=24),
    "topk": TopKConfig(d_sae=24, k=3),
    "batchtopk": BatchTopKConfig(d_sae=24, k=3),
    "jumprelu": JumpReLUConfig(d_sae=24),
}


def random_sae(config: saekit.SAEConfig) -> saekit.SAE:
    sae = built(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs() + 0.1)
    return sae


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small matrix is many of them."""
    monkeypatch.setattr(mapped, "_PIECE", 100)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_type_that_is_asked_for(tmp_path: Path, name: str, dtype: str) -> None:
    folder = random_sae(CONFIGS[name]).save(tmp_path / "sae")
    plain = saekit.SAE.load(folder)
    plain.cast_weights(getattr(torch, dtype))
    asked = saekit.SAE.load(folder, dtype=dtype)
    assert torch.equal(saekit.SAE.load(folder, dtype=getattr(torch, dtype)).b_dec, asked.b_dec)
    for (key, value), expected in zip(asked.state_dict().items(), plain.state_dict().values(), strict=True):
        assert value.dtype == expected.dtype, key
        assert torch.equal(value, expected), key
    assert all(parameter.requires_grad for parameter in asked.parameters())
    x = torch.randn(5, asked.d_in, generator=torch.Generator().manual_seed(1)).to(asked.dtype)
    assert torch.equal(asked.encode(x), plain.encode(x))


def test_another_type(tmp_path: Path) -> None:
    folder = random_sae(CONFIGS["standard"]).save(tmp_path / "sae")
    with pytest.raises(ConfigError, match="dtype: is 'float16', expected one of float32, bfloat16, float64, or None"):
        saekit.SAE.load(folder, dtype="float16")


@pytest.mark.usefixtures("small_pieces")
def test_every_layout_becomes_that_of_the_module() -> None:
    """Also where pieces end in the middle, and of what lies the other way, or in steps."""
    wide = torch.randn(14, 50, generator=torch.Generator().manual_seed(0))
    W_enc, W_dec = wide[:7, :24], torch.randn(24, 7).T.contiguous().T
    vectors = {"b_enc": torch.randn(24), "b_dec": torch.randn(7)}
    for given in ({"W_enc": W_enc, "W_dec": W_dec}, {"W_enc": W_enc.T.contiguous().T, "W_dec": W_dec.contiguous()}):
        read = saekit.PretrainedSAE(
            architecture="saekit:standard", options={"d_in": 7, "d_sae": 24}, tensors={**given, **vectors}
        )
        sae = build_sae(read, saekit.default_manager())
        assert sae.W_enc.T.is_contiguous(), "as the kernels want it"
        assert sae.W_dec.is_contiguous()
        for name, value in {**given, **vectors}.items():
            assert torch.equal(getattr(sae, name), value), name


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a test makes alone: what others' fixtures keep is not asked about."""
    monkeypatch.setattr(mapped, "_mappings", ())


@pytest.mark.usefixtures("mappings")
def test_the_file_may_be_written_to_or_cut_off(tmp_path: Path) -> None:
    """Nothing of an SAE that is loaded is the file's memory: a file that is cut off would end the process."""
    folder = random_sae(CONFIGS["standard"]).save(tmp_path / "sae")
    sae = saekit.SAE.load(folder)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with (folder / "sae_weights.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, 2)))
        file.truncate(0)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    gc.collect()
    assert all(memory() is None for *_, memory in mapped._mappings), "nothing keeps the file open"


@pytest.mark.usefixtures("mappings")
def test_files_end_while_others_are_looked_for(tmp_path: Path) -> None:
    """The collection of garbage ends the mapping of one file between any two steps of another's reader."""
    save_file({"a": torch.ones(3, 1024)}, tmp_path / "file.safetensors")
    kept = [mapped.mapped_tensors(tmp_path / "file.safetensors")["a"] for _ in range(4)]
    lost = [[mapped.mapped_tensors(tmp_path / "file.safetensors")["a"]] for _ in range(50)]
    for cycle in lost:
        cycle.append(cycle)  # type: ignore[arg-type]
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1)
    try:
        del cycle, lost
        mapped.give_back(kept[-1])
    finally:
        gc.set_threshold(*before)
    assert all(bool((values == 1).all()) for values in kept)
    gc.collect()
    mapped.mapped_tensors(tmp_path / "file.safetensors")
    assert len(mapped._mappings) == 5, "what has ended is forgotten"


def test_what_is_not_the_modules_own_is_not_kept(tmp_path: Path) -> None:
    """What a loader gives may be used again by whoever made it."""
    tensors = {"W_enc": torch.ones(3, 4), "W_dec": torch.ones(4, 3), "b_enc": torch.ones(4), "b_dec": torch.ones(3)}
    read = saekit.PretrainedSAE(architecture="saekit:standard", options={"d_in": 3, "d_sae": 4}, tensors=tensors)
    sae = build_sae(read, saekit.default_manager())
    sae.fold_activation_scale(2.0)
    assert all(bool((value == 1).all()) for value in tensors.values())
    assert len(read.tensors) == 4


@pytest.mark.usefixtures("small_pieces")
def test_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor was taken over, its source is free."""
    sae = built(CONFIGS["standard"])
    tensors = {name: value.detach().clone() for name, value in sae.named_parameters()}
    left: list[list[str]] = []
    fill = taking.fill

    def watched(memory: Tensor, values: Tensor, *, alone: bool) -> None:
        left.append(list(tensors))
        fill(memory, values, alone=alone)

    monkeypatch.setattr(taking, "fill", watched)
    names = list(tensors)
    taking.take_over(sae, tensors, torch.float32, torch.device("cpu"))
    assert left == [names[n + 1 :] for n in range(len(names))]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take pages back")
def test_pages_are_given_back(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1 << 22, dtype=torch.float32)}, tmp_path / "x.safetensors")

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
        part = text.partition(str(tmp_path / "x.safetensors"))[2]
        return int(part.partition("Rss:")[2].split()[0]) * 1024

    values = mapped.mapped_tensors(tmp_path / "x.safetensors")["a"]
    values.sum()
    assert resident() > 15 << 20
    mapped.give_back(values)
    assert resident() < 1 << 20
    assert values[-1] == (1 << 22) - 1, "who reads again reads the file"
    values[5] = -1.0
    mapped.give_back(values)
    assert values[5] == -1.0, "what somebody has written stays"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    return random_sae(CONFIGS["standard"]).save(tmp_path / "sae")


def test_a_damaged_file_is_said_to_be_that_whatever_else_is_wrong(folder: Path) -> None:
    """The checksum is computed beside the rest, and says more than what the rest stumbles over."""
    whole = (folder / "sae_weights.safetensors").read_bytes()
    for damaged in (whole[:-4] + b"\xff\xff\xff\x7f", whole[:40], b"", whole[:-3] + b"abc"):
        (folder / "sae_weights.safetensors").write_bytes(damaged)
        with pytest.raises(
            SAEFormatError, match="sae_weights.safetensors in .* is damaged or was changed after it was"
        ):
            saekit.SAE.load(folder)


def test_a_file_that_does_not_change_is_summed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, known = folder / "sae_weights.safetensors", dict[Any, str]()
    monkeypatch.setattr(checksums, "_known", known)

    def sums() -> str:
        with checksums.Checksums() as found:
            return found.of(weights)

    first = sums()
    assert known == {}, "it is so young that it may change unseen by the clock of its file system"
    monkeypatch.setattr(checksums, "_SETTLED", -1)
    assert sums() == first
    (state,) = known
    known[state] = "remembered"
    assert sums() == "remembered"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert sums() not in (first, "remembered")


def test_checksums_of_many_files_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of files has room for a few, so that threads take out what others put in."""
    monkeypatch.setattr(checksums, "_known", EasilyUpset())
    monkeypatch.setattr(checksums, "_SETTLED", -1)
    monkeypatch.setattr(checksums, "_MOST_KNOWN", 3)
    files = [tmp_path / str(n) for n in range(40)]
    for file in files:
        file.write_text(file.name)

    def sums(_: int) -> list[str]:
        with checksums.Checksums() as found:
            return [found.of(file) for file in files]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(sums, range(8)))
    assert found == [[hashlib.sha256(file.name.encode()).hexdigest() for file in files]] * 8
    assert len(checksums._known) <= 3


class EasilyUpset(dict[Any, str]):
    """A dictionary that lets another thread go on in the middle of looking at it."""

    def __iter__(self) -> Iterator[Any]:
        keys = super().__iter__()
        time.sleep(1e-4)
        return keys


def test_several_saes_in_threads(tmp_path: Path) -> None:
    folders = [random_sae(config).save(tmp_path / name) for name, config in CONFIGS.items()] * 4
    with ThreadPoolExecutor(8) as threads:
        loaded = list(threads.map(saekit.SAE.load, folders))
    for folder, sae in zip(folders, loaded, strict=True):
        assert torch.equal(sae.W_dec, saekit.SAE.load(folder).W_dec)
