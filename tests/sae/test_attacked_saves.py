"""What could not be loaded again is not saved: the SAE that was there before stays, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.saved import make

from saekit import SAE
from saekit.errors import SAEFormatError
from saekit.files.names import SAE_CONFIG


def metadata(**entries: Any) -> Callable[[SAE], None]:
    return lambda sae: _inform(sae, entries)


def _inform(sae: SAE, entries: dict[Any, Any]) -> None:
    sae.info = attrs.evolve(sae.info, metadata=entries)


def weights(name: str, value: float) -> Callable[[SAE], None]:
    def spoil(sae: SAE) -> None:
        with torch.no_grad():
            getattr(sae, name)[..., -1] = value

    return spoil


def sparsity(value: torch.Tensor) -> Callable[[SAE], None]:
    return lambda sae: setattr(sae, "log_sparsity", value)


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def reshaped(sae: SAE) -> None:
    sae.b_dec = torch.nn.Parameter(torch.zeros(sae.d_in + 1))


WHOLE = "the SAE that is to be saved"
SPOILED: dict[str, tuple[Callable[[SAE], None], str]] = {
    "two keys": (lambda sae: _inform(sae, {"a": {1: "x", "1": "y"}}), "metadata is not valid JSON: it gives '1' twice"),
    "too large": (metadata(notes="x" * (9 << 20)), f"cfg.json of {WHOLE} has .* bytes, expected at most 16,777,216"),
    "too deep": (metadata(a=deep(62)), f"cfg.json of {WHOLE} is nested too deeply, expected at most 64 levels"),
    "far too deep": (metadata(a=deep(100_000)), "sae.info.metadata cannot be saved, as it is not plain JSON"),
    "scale": (metadata(activation_scale=0), "activation_scale in sae.info.metadata is 0, expected a number above 0"),
    "scale in words": (metadata(activation_scale="1"), "in sae.info.metadata is '1', expected a number"),
    "nan": (weights("W_enc", torch.nan), f"W_enc of {WHOLE} holds 12 NaN among 360 numbers, expected finite ones"),
    "inf": (weights("b_dec", torch.inf), f"b_dec of {WHOLE} holds 1 infinite among 12 numbers, expected finite ones"),
    "shape": (reshaped, rf"b_dec of {WHOLE} has shape \[13\], expected \[12\]"),
    "sparsity shape": (sparsity(torch.zeros(29)), rf"log_sparsity of {WHOLE} has shape \[29\], expected \[30\]"),
    "sparsity nan": (sparsity(torch.full((30,), torch.nan)), f"log_sparsity of {WHOLE} holds 30 NaN among 30 numbers"),
    "sparsity inf": (sparsity(torch.full((30,), torch.inf)), f"log_sparsity of {WHOLE} holds 30 infinite among"),
    "sparsity, whole": (sparsity(torch.zeros(30, dtype=torch.int64)), f"log_sparsity of {WHOLE} holds numbers"),
    "sparsity on no device": (sparsity(torch.zeros(30, device="meta")), f"log_sparsity of {WHOLE} is a meta"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", list(SPOILED))
def test_a_good_sae_is_not_replaced_by_one_that_cannot_be_loaded(tmp_path: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    alone, among = tmp_path / "alone", tmp_path / "among"
    among.mkdir()
    (among / "notes.txt").write_text("mine")
    for folder in (alone, among):
        make().save(folder)
    before = contents(tmp_path)
    sae = make()
    spoil(sae)
    for folder in (alone, among, tmp_path / "new"):
        with pytest.raises(SAEFormatError, match=message):
            sae.save(folder)
    assert contents(tmp_path) == before


def test_what_is_at_the_limit_is_loaded_again(tmp_path: Path) -> None:
    sae = make()
    sae.log_sparsity = torch.linspace(-4, 0, 30)
    sae.log_sparsity[0] = -torch.inf
    room = (1 << 23) - (sae.save(tmp_path / "sae") / SAE_CONFIG).stat().st_size // 2
    for entries in ({"notes": "x" * (room - 40)}, {"a": deep(61)}, {"a": {1: "x", 2: "y"}}):
        _inform(sae, entries)
        again = SAE.load(sae.save(tmp_path / "sae"))
        assert again.log_sparsity is not None
        assert torch.equal(again.log_sparsity, sae.log_sparsity)
        assert set(again.info.metadata) == set(entries)
