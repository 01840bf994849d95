"""Safetensors files written in one pass: the bytes go to the disk and into the checksum as they are, without a copy.

The safetensors library makes a copy of every tensor first, and the checksum would be a second reading.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import torch
from torch import Tensor

from saekit.files.storage import nothing

__all__ = ["DTYPE_NAMES", "InPieces", "SummedFile", "header", "in_order", "save_tensors"]

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The types that a file can hold, by their names in it."""
_PIECE = 1 << 23
_AT_ONCE = 1 << 26  # bytes that are written and summed before anybody is asked whether to go on


class SummedFile:
    """A new file whose sha256 is computed beside the disk, by ``hasher``.  A context manager."""

    def __init__(self, path: Path, hasher: ThreadPoolExecutor, go_on: Callable[[], None] = nothing) -> None:
        """``go_on`` is called from time to time while tensors are written; what it raises ends that."""
        self.path = path
        self._go_on = go_on
        self._hasher, self._digest = hasher, hashlib.sha256()
        self._file: BinaryIO = path.open("xb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        hashed = self._hasher.submit(self._digest.update, data)
        try:
            left = memoryview(data)
            while len(left):  # an unbuffered write may stop short
                left = left[self._file.write(left) :]
        finally:
            hashed.result()

    def put_tensor(self, values: Tensor) -> None:
        """Append the bytes of ``values``, which is on the CPU; of one that is not contiguous, piece by piece."""
        if not values.is_contiguous():
            for piece in values.split(max(1, _PIECE // max(1, values[0].numel() * values.itemsize))):
                self.put_tensor(piece.contiguous())
            return
        if values.is_complex():
            values = torch.view_as_real(values)
        if values.numel():
            flat = values.as_strided((values.numel(),), (1,))  # one of a single element may have any strides
            for piece in flat.view(torch.uint8).split(_AT_ONCE):
                self._go_on()
                self.put(piece.numpy().data)

    def rewrite_start(self, data: bytes) -> None:
        """Replace the first bytes, after which :meth:`sha256` is that of another file."""
        self._file.seek(0)
        self._file.write(data)

    def sha256(self) -> str:
        """Of what was appended, in hexadecimal."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Give the file up to the system."""
        self._file.close()


def header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    size: int = 0,
    *,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The beginning of a safetensors file whose tensors follow in this order; ``size`` bytes, or as many as needed."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, ensure_ascii=False).encode()
    text = text.ljust(size - 8 if size else -(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


class InPieces(Protocol):
    """A tensor that is made while it is written."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """Of all of it."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """Its numbers in their order, a piece at a time."""
        ...


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | InPieces],
    metadata: Mapping[str, str] | None = None,
    *,
    go_on: Callable[[], None] = nothing,
) -> str:
    """Write ``tensors`` (on the CPU), and ``metadata`` in its header, to the new file ``path``; returns its sha256.

    Those with the largest elements come first, so that each is aligned.  ``go_on`` is called from time to time; what it
    raises ends this.
    """
    ordered = {name: tensors[name] for name in in_order(tensors)}
    with ThreadPoolExecutor(1, thread_name_prefix="saekit-sha256") as hasher, SummedFile(path, hasher, go_on) as file:
        file.put(header({name: (value.dtype, value.shape) for name, value in ordered.items()}, metadata=metadata))
        for value in ordered.values():
            for piece in (value,) if isinstance(value, Tensor) else value:
                file.put_tensor(piece)
        return file.sha256()


def in_order(tensors: Mapping[str, Tensor | InPieces]) -> list[str]:
    """The names of ``tensors`` as :func:`save_tensors` writes them."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
