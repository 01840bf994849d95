"""Safetensors files as memory: a tensor is read where it is used, and its pages are given back when it was copied.

So a file is in memory once while it is loaded: what is copied of it takes the place of what is given back.  Nobody
keeps such a tensor: a file that somebody cuts off would end the process, and one that is written to would change them.
"""

from __future__ import annotations

import json
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.files.tensors import DTYPE_NAMES

__all__ = ["give_back", "is_mapped", "mapped_tensors", "pieces"]

_PIECE = 1 << 22  # bytes that are worked on together; a few such are in memory beside an SAE that is loaded
_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Where files are mapped: the first address, the one after the last, and the mapping.  A tuple that is replaced, never
# changed: other threads and the collection of garbage may come between any two steps of whoever reads it.
_mappings: tuple[tuple[int, int, weakref.ref[mmap.mmap]], ...] = ()
_replacing = threading.Lock()


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory that is the file's until somebody writes to it.

    Raises what the safetensors library does for a file that is none.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as checked:  # header, sizes and order; nothing else of it is read
        names = list(checked.keys())
        odd = {name: checked.get_tensor(name) for name in names if checked.get_slice(name).get_dtype() not in _TYPES}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(file.read(start - 8))
        file.seek(0)
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _remember(memory)
    return {name: odd[name] if name in odd else _tensor(memory, start, entries[name]) for name in names}


def _tensor(memory: mmap.mmap, start: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape = _TYPES[entry["dtype"]], entry["shape"]
    first, last = (start + offset for offset in entry["data_offsets"])
    count = (last - first) // dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if first % dtype.itemsize:  # as only other programs write it
        return torch.frombuffer(bytearray(memory[first:last]), dtype=dtype).view(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=first).view(shape)


def _remember(memory: mmap.mmap) -> None:
    global _mappings
    start = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    new = start, start + len(memory), weakref.ref(memory)
    with _replacing:
        _mappings = (*(known for known in _mappings if known[2]() is not None), new)


def pieces(values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``values`` in pieces that lie together in memory: along which dimension, from where, and the piece."""
    along = 0 if values.ndim < 2 else max(range(values.ndim), key=lambda d: (values.shape[d] > 1, values.stride(d)))
    if values.ndim == 0:
        yield 0, 0, values
        return
    step = max(1, _PIECE * values.shape[along] // max(1, values.numel() * values.itemsize))
    for start in range(0, values.shape[along], step):
        yield along, start, values.narrow(along, start, min(step, values.shape[along] - start))


def is_mapped(values: Tensor) -> bool:
    """Whether ``values`` are in memory that is a file's."""
    if values.device.type != "cpu" or not values.numel():
        return False
    first = values.data_ptr()
    return any(start <= first < end and known() is not None for start, end, known in _mappings)


def give_back(values: Tensor) -> None:
    """Let the system have the pages of ``values`` again, if they are a file's; whoever reads them reads the file.

    Not where somebody has written to them.
    """
    if sys.platform != "linux" or values.device.type != "cpu" or not values.numel():
        return
    if values.is_inference() or values._version:
        return
    first = values.data_ptr()
    last = first + values.itemsize * (1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True)))
    for start, end, reference in _mappings:
        memory = reference()
        if memory is not None and start <= first and last <= end:
            page = mmap.PAGESIZE
            begin, stop = -(-(first - start) // page) * page, (last - start) // page * page
            if begin < stop:
                memory.madvise(mmap.MADV_DONTNEED, begin, stop - begin)
            return
