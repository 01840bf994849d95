"""States as files: plain values in JSON, tensors in safetensors, nothing that is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.errors import StorageError
from saekit.files.mapped import mapped_tensors
from saekit.files.storage import nothing, read_json
from saekit.files.tensors import DTYPE_NAMES, save_tensors

__all__ = ["StateFiles", "UnsavableError", "read_state", "read_tensors", "write_state"]

_TENSOR = "$tensor"


class UnsavableError(StorageError):
    """A state holds what cannot be saved: ``place`` is where, and ``what`` says it."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(f"the state at {place} {what}")
        self.place, self.what = place, what


@attrs.frozen(eq=False)
class StateFiles:
    """A state as its two files will have it."""

    stem: str
    text: bytes
    """Of ``stem.json``: all plain values, as they were when this was made."""
    tensors: Mapping[str, Tensor]
    """Of ``stem.safetensors``: those of the state, not copies."""

    @classmethod
    def of(cls, stem: str, state: Mapping[str, Any]) -> StateFiles:
        """See :func:`write_state`, which raises what this raises."""
        tensors: dict[str, Tensor] = {}
        plain = _take_out(state, stem, tensors)
        return cls(stem, (json.dumps(plain) + "\n").encode(), tensors)

    def write(self, folder: Path, go_on: Callable[[], None] = nothing) -> dict[str, str]:
        """Write both files into ``folder``; returns their checksums by name.

        ``go_on`` is called from time to time; what it raises ends this.
        """
        (folder / f"{self.stem}.json").write_bytes(self.text)
        whole = {name: value.detach().cpu().resolve_conj().resolve_neg() for name, value in self.tensors.items()}
        summed = save_tensors(folder / f"{self.stem}.safetensors", whole, go_on=go_on)
        return {
            f"{self.stem}.json": hashlib.sha256(self.text).hexdigest(),
            f"{self.stem}.safetensors": summed,
        }


def write_state(folder: Path, stem: str, state: Mapping[str, Any]) -> dict[str, str]:
    """Write ``state`` to ``stem.json`` and ``stem.safetensors``; returns their checksums by name.

    It may hold mappings by text, lists, numbers, texts, None and tensors; :class:`StorageError` names the place of a
    value that is none of these.
    """
    return StateFiles.of(stem, state).write(folder)


def read_state(folder: Path, stem: str, *, mapped: bool = False) -> dict[str, Any]:
    """What :func:`write_state` wrote; tensors are on the CPU, and tuples have become lists.

    ``mapped``: tensors show the file, so that of large ones only what is looked at is read.
    """
    from safetensors import SafetensorError

    try:
        # Copies: what is loaded shows the file, which would stay open, and is not aligned as torch's own memory is.
        tensors = read_tensors(folder / f"{stem}.safetensors", mapped=mapped)
        state: dict[str, Any] = _put_back(read_json(folder / f"{stem}.json"), tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise StorageError(f"{stem} in {folder} cannot be read: {error}") from error
    return state


def read_tensors(path: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own unless they are to be ``mapped``.

    Raises :class:`OSError` and what the safetensors library does.
    """
    from safetensors.torch import load_file

    if mapped:
        return mapped_tensors(path)
    return {name: value.clone() for name, value in load_file(path).items()}


def _take_out(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPE_NAMES:
            kind = f"tensor of {value.dtype}, {value.layout}, on {value.device}"
            raise UnsavableError(place, f"holds a {kind}, which cannot be saved")
        name = place.encode("utf-8", "replace").decode()  # a text that is no Unicode cannot name a tensor
        while name in tensors:  # "a/b" is one key, or two
            name += "'"
        tensors[name] = value
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str) or key == _TENSOR]:
            raise UnsavableError(place, f"has the key {wrong[0]!r}, which cannot be saved; use texts")
        return {key: _take_out(item, f"{place}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 and not isinstance(value.item(), np.generic):
        return _take_out(value.item(), place, tensors)  # a number of NumPy's
    raise UnsavableError(
        place,
        f"holds a {type(value).__name__}, which cannot be saved. A state_dict may hold mappings, lists, numbers, "
        "texts, None and tensors",
    )


def _put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_back(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_back(item, tensors) for item in value]
    return value
