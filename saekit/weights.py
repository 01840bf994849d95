"""The tensors of saved SAEs: how they are read from a file, and which may become weights.

Whatever a loader reads goes through :func:`check_tensor`, here and nowhere else.
"""

from __future__ import annotations

import math
import warnings
import weakref
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import SAEFormatError
from saekit.files.faults import cut_off
from saekit.files.mapped import give_back, mapped_tensors, pieces
from saekit.reasons import reason, reason_of_unpickling

__all__ = [
    "MOST_PACKED", "SMALL", "check_archive", "check_tensor", "check_tensors", "dtype_name", "read_state",
    "read_tensors",
]  # fmt: skip

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PICKLES = (".pt", ".pth", ".bin")
MOST_PACKED = 20
"""To one: trained weights hardly shrink at all."""
_finite: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by their numbers: tensors that were looked at, and as what
SMALL = 1 << 26
"""Bytes to which anything may unpack."""


def read_tensors(
    path: Path, where: str, only: Collection[str] | None = None, *, minus_infinity: bool = False
) -> dict[str, Tensor]:
    """The checked tensors of a file of safetensors or NumPy, or of a ``.pt``, ``.pth`` or ``.bin`` file.

    The last hold a dictionary.  With ``only``, exactly those, which must be there.  Nothing of a pickle is run:
    weights-only unpickling builds tensors and refuses everything else.  ``where`` is for messages.
    """
    read = {**dict.fromkeys(_PICKLES, read_state), ".npz": _arrays}.get(path.suffix, _safetensors)
    everything = read(path, where)
    if only is not None and (missing := [name for name in only if name not in everything]):
        found = ", ".join(map(str, everything)) or "nothing"
        raise SAEFormatError(f"{where} must hold {', '.join(only)}; {', '.join(missing)} not found, only {found}")
    tensors = dict(everything) if only is None else {name: everything[name] for name in only}
    for name, value in tensors.items():
        check_tensor(value, name, where, minus_infinity=minus_infinity)
        give_back(value)  # what pieces have left at their ends
    return tensors


def _safetensors(path: Path, where: str) -> Mapping[str, Any]:
    try:
        return mapped_tensors(path)
    except Exception as error:  # the library raises its own errors, and those of what it calls, for damaged files
        raise SAEFormatError(f"{where} is not a readable safetensors file: {cut_off(path) or reason(error)}") from error


def read_state(path: Path, where: str) -> dict[str, Any]:
    """All that a ``.pt``, ``.pth`` or ``.bin`` file holds by name: tensors, unchecked, and plain values."""
    check_archive(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: what counts is what it refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler meets anything in a damaged file
        raise SAEFormatError(
            f"{where} is not a plain file of tensors, and nothing else is unpickled: "
            f"{cut_off(path) or reason_of_unpickling(error)}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise SAEFormatError(f"{where} must hold tensors by name, found {type(state).__name__}")
    return dict(state)


def check_archive(path: Path, where: str) -> None:
    """:class:`SAEFormatError` for a zip archive that unpacks to far more than it is, before anything is unpacked.

    A file that is no such archive passes.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked, packed = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise SAEFormatError(f"{where} is not a readable archive: {reason(error)}") from error
    if unpacked > max(SMALL, MOST_PACKED * packed):
        raise SAEFormatError(
            f"{where} has {packed:,} bytes and says that it unpacks to {unpacked:,}: no weights can be packed like that"
        )


def _arrays(path: Path, where: str) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file.  The size of each is compared with its file's before there is room for it."""
    from numpy.lib import format as npy

    if not zipfile.is_zipfile(path):
        raise SAEFormatError(f"{where} is not a readable .npz file: {cut_off(path) or 'it is no archive'}")
    check_archive(path, where)
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if len(names := archive.namelist()) > len(set(names)):
                raise SAEFormatError(f"{where} holds {next(n for n in names if names.count(n) > 1)} twice")
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    shape, dtype = _array_header(file)
                    size = math.prod(shape) * dtype.itemsize
                    if dtype.kind not in "fiu" or dtype.itemsize > 8 or size > member.file_size:
                        raise SAEFormatError(
                            f"{name} of {where} should be numbers of type {dtype} and shape {list(shape)}, which "
                            f"{member.file_size:,} bytes cannot be"
                        )
                with archive.open(member) as file:
                    value = npy.read_array(file, allow_pickle=False)
                found[name] = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=False))
    except SAEFormatError:
        raise
    except Exception as error:  # zip, zlib and NumPy each have errors of their own for damaged files
        raise SAEFormatError(f"{where} is not a readable .npz file: {reason(error)}") from error
    return found


def _array_header(file: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and type of the array that ``file`` begins with."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array is of version {version}, expected 1.0 or 2.0")
    shape, _, dtype = read(file)
    return shape, dtype


def check_tensors(tensors: Mapping[str, object], where: str, *, minus_infinity: bool = False) -> None:
    """:func:`check_tensor` for each."""
    for name, value in tensors.items():
        check_tensor(value, name, where, minus_infinity=minus_infinity)


def check_tensor(value: object, name: str, where: str, *, minus_infinity: bool = False) -> None:
    """:class:`SAEFormatError` unless ``value`` is a plain dense tensor of finite floating-point numbers.

    ``minus_infinity`` allows that too, as the logarithm of nothing.
    """
    if not isinstance(value, Tensor):
        raise SAEFormatError(f"{name} of {where} is of type {type(value).__name__}, expected a tensor")
    if (kind := _odd_kind(value)) is not None:
        raise SAEFormatError(f"{name} of {where} is a {kind} tensor, expected a plain dense one")
    if value.dtype not in _FLOATS:
        allowed = ", ".join(map(dtype_name, _FLOATS))
        raise SAEFormatError(f"{name} of {where} holds numbers of type {dtype_name(value.dtype)}, expected {allowed}")
    if value.untyped_storage().nbytes() < value.numel() * value.itemsize:
        raise SAEFormatError(
            f"{name} of {where} has shape {list(value.shape)}, but its file holds only "
            f"{value.untyped_storage().nbytes() // value.itemsize} numbers of it"
        )
    if _is_known(value):
        return
    # A sum is finite only if all its numbers are; only if it is not, each has to be looked at.
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    if all(_sum_is_finite(piece, wide) for _, _, piece in pieces(value.detach())):
        _remember(value)
        return
    nan, infinite = int(value.isnan().sum()), int((value == torch.inf if minus_infinity else value.isinf()).sum())
    if nan or infinite:
        kinds = " and ".join(f"{count} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count)
        expected = "finite ones or -inf" if minus_infinity else "finite ones"
        raise SAEFormatError(f"{name} of {where} holds {kinds} among {value.numel()} numbers, expected {expected}")


def _sum_is_finite(piece: Tensor, wide: torch.dtype) -> bool:
    found = bool(piece.sum(dtype=wide).isfinite())
    give_back(piece)  # of a file, until it is copied
    return found


def _remember(value: Tensor) -> None:
    """What is found again as it is, or turned, need not be looked at again."""
    if not value.is_inference() and value.is_contiguous():
        owner = value if value._base is None else value._base
        if owner.numel() == value.numel():
            number = id(owner)
            _finite[number] = weakref.ref(owner, lambda _: _finite.pop(number, None)), owner._version


def _is_known(value: Tensor) -> bool:
    """Whether all numbers of the memory that it is made of were found to be finite, and nobody has written there."""
    if value.is_inference():
        return False
    owner = value if value._base is None else value._base
    reference, version = _finite.get(id(owner), (None, 0))
    return reference is not None and reference() is owner and owner._version == version


def _odd_kind(value: Tensor) -> str | None:
    if value.is_meta:
        return "meta (shape without numbers)"
    if value.is_quantized:
        return "quantized"
    if value.is_nested:
        return "nested"
    return None if value.layout == torch.strided else str(value.layout).removeprefix("torch.")


def dtype_name(dtype: torch.dtype) -> str:
    """As options and files have it: ``float32``."""
    return str(dtype).removeprefix("torch.")
