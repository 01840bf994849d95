"""Files of saved SAEs, whole and damaged."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cut_off", "with_other_tensors", "without"]

_PICKLES = (".pt", ".pth", ".bin")


def cut_off(folder: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """Copies of ``folder`` in ``place`` in which one file is half as long, and what is wrong with each."""
    for name in _names(folder):
        copy = _copied(folder, place / f"half of {name.replace('/', '_')}")
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[: len(data) // 2])
        yield f"{name} is cut off", copy


def without(folder: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """Copies of ``folder`` in which one file is missing."""
    for name in _names(folder):
        copy = _copied(folder, place / f"no {name.replace('/', '_')}")
        (copy / name).unlink()
        yield f"{name} is not there", copy


def with_other_tensors(
    folder: Path, place: Path, change: Callable[[Tensor], Tensor | None]
) -> Iterator[tuple[str, Path]]:
    """Copies of ``folder`` in which one tensor of one file is another; None: it is not there.

    Files of safetensors, of NumPy (``.npz``) and of torch (``.pt``, ``.pth``, ``.bin``) are known.
    """
    for name in _names(folder):
        tensors = _read(folder / name)
        for key, value in tensors.items():
            if not value.numel():
                continue
            changed = change(value.detach().contiguous().clone())
            others = {other: tensors[other] for other in tensors if other != key}
            copy = _copied(folder, place / f"{name.replace('/', '_')} {key.replace('/', '_')}")
            _write(copy / name, others if changed is None else others | {key: changed})
            yield f"{key} in {name}", copy


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _copied(folder: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of floating-point numbers in a file; none of one that holds others."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        found = load_file(path)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            found = {name: torch.from_numpy(value) for name, value in archive.items() if value.dtype.kind == "f"}
    elif path.suffix in _PICKLES:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # it holds objects
            found = {}
    else:
        found = {}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            others = {name: value for name, value in archive.items() if value.dtype.kind != "f"}
        arrays: dict[str, Any] = {**others, **{name: value.numpy() for name, value in tensors.items()}}
        np.savez(path, **arrays)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
        others = {name: value for name, value in found.items() if not isinstance(value, torch.Tensor)}
        torch.save({**others, **tensors}, path)
