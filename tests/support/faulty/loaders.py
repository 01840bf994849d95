"""Loaders that break a promise each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from support import foreign
from support.faulty.case import Case

from saekit import PretrainedSAE, SAEFiles
from saekit.testing import fake_plugin

FILE = "bare.safetensors"
COUNT = itertools.count()


class Bare:
    """Reads one file of tensors; nothing is wrong with it."""

    def __init__(self, config: Any) -> None:
        pass

    def detects(self, files: SAEFiles) -> bool:
        return files.names == {FILE}

    def read(self, files: SAEFiles) -> dict[str, Any]:
        return files.tensors(FILE)

    def load(self, files: SAEFiles) -> PretrainedSAE:
        tensors = self.read(files)
        # The sizes are those of the format.
        return PretrainedSAE(options={"d_in": 6, "d_sae": 10, "normalize_sae_decoder": False}, tensors=tensors)


class Greedy(Bare):
    def detects(self, files: SAEFiles) -> bool:
        return True


class Careless(Bare):
    def read(self, files: SAEFiles) -> dict[str, Any]:
        return load_file(Path(files.place) / FILE)


class Changing(Bare):
    def read(self, files: SAEFiles) -> dict[str, Any]:
        tensors = super().read(files)
        return {**tensors, "b_dec": tensors["b_dec"] + next(COUNT)}


class Odd(Bare):
    def load(self, files: SAEFiles) -> PretrainedSAE:
        read = super().load(files)
        return PretrainedSAE(options=read.options, tensors=read.tensors, metadata={"names": {"a", "b"}})


class Cut(Bare):
    def read(self, files: SAEFiles) -> dict[str, Any]:
        return load_file(files.path(FILE))


class Mending(Bare):
    def read(self, files: SAEFiles) -> dict[str, Any]:
        return {name: value.nan_to_num() for name, value in load_file(files.path(FILE)).items()}


class Stretching(Bare):
    def read(self, files: SAEFiles) -> dict[str, Any]:
        tensors = super().read(files)
        bias = tensors["b_enc"]
        return {**tensors, "b_enc": bias.new_zeros(10).index_copy(0, bias.new_tensor(range(len(bias))).long(), bias)}


class Blaming(Bare):
    def missing_part(self, files: SAEFiles) -> str:
        return FILE


class Zeroing(Bare):
    """Writes another decoder than the SAE's."""

    def write_sae(self, sae: Any, folder: Path) -> None:
        tensors = sae.public_tensors()
        save_file({**tensors, "W_dec": tensors["W_dec"] * 0}, folder / FILE)


class Converting(Bare):
    def convert_config(self, table: Any) -> Any:
        return table


def given(folder: Path) -> dict[str, Any]:
    save_file(foreign.tensors(), folder / FILE)
    return {"folders": {"fake": folder}}


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "build": ("expected a pretrained loader", lambda config: None),
    "detects": ("detects takes an empty folder for its own: no files", Greedy),
    "refuses_foreign_folders": ("there is an empty folder it raises FileNotFoundError", Careless),
    "loads": ("the SAE, loaded again,, b_dec: other numbers", Changing),
    "saves": ("cannot be saved, as it is not plain JSON", Odd),
    "refuses_damaged_files": ("bare.safetensors is cut off it raises SafetensorError", Cut),
    "refuses_no_numbers": ("holds NaN it makes another SAE, expected a SAEFormatError", Mending),
    "refuses_wrong_shapes": ("b_enc in bare.safetensors has another shape it makes another SAE", Stretching),
    "missing_part": ("of notes it says that 'bare.safetensors' is missing, expected None", Blaming),
    "writes": ("W_dec .the SAE in .*, written and read again.: off by 1 of the largest", Zeroing),
    "converts_configs": ("of {} it makes {}, expected None", Converting),
}
CASES = [
    Case(check, says, fake_plugin("pretrained_loaders", build=build), given) for check, (says, build) in FAULTS.items()
]
