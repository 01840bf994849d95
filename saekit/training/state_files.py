"""States as files: plain values in JSON, tensors in safetensors, nothing that is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import StorageError

__all__ = ["read_state", "write_state"]

_TENSOR = "$tensor"


def write_state(folder: Path, stem: str, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``stem.json`` and ``stem.safetensors``.

    It may hold mappings by text, lists, numbers, texts, None and tensors; :class:`StorageError` names the place of a
    value that is none of these.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = _take_out(state, stem, tensors)
    (folder / f"{stem}.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")
    try:
        save_file(_unshared(tensors), folder / f"{stem}.safetensors")
    except SafetensorError as error:  # what the library makes of a full disk
        raise StorageError(f"cannot write {stem}.safetensors: {error}") from error


def read_state(folder: Path, stem: str) -> dict[str, Any]:
    """What :func:`write_state` wrote; tensors are on the CPU, and tuples have become lists."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / f"{stem}.safetensors")
        plain = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        state: dict[str, Any] = _put_back(plain, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(f"{stem} in {folder} cannot be read: {error}") from error
    return state


def _take_out(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {_TENSOR: place}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str) or key == _TENSOR]:
            raise StorageError(f"the state at {place} has the key {wrong[0]!r}, which cannot be saved; use texts")
        return {key: _take_out(item, f"{place}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy's
        return _take_out(value.item(), place, tensors)
    raise StorageError(
        f"the state at {place} holds a {type(value).__name__}, which cannot be saved. A state_dict may hold mappings, "
        "lists, numbers, texts, None and tensors"
    )


def _put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_back(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_back(item, tensors) for item in value]
    return value


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor whole and in memory of its own, as safetensors asks."""
    seen: set[int] = set()
    own = {}
    for name, value in tensors.items():
        kept = value.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != kept.nbytes:
            kept = kept.clone(memory_format=torch.contiguous_format)
        seen.add(kept.untyped_storage().data_ptr())
        own[name] = kept
    return own
