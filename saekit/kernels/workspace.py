"""Large memory: used again and again, and in large pages.

A fresh allocation of a hundred megabytes costs a CPU as much time as a tenth of a matrix product: the system hands it
out page by page, as zeros.  NumPy asks for large pages, where the system has them, and torch does not; rows that are
read here and there are found faster in them, too.  Other devices have a pool of their own in torch.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["LARGE", "SHARED", "Workspace", "Workspaces", "uninitialized", "zeros"]

_NUMPY_FROM = 1 << 22  # bytes: NumPy asks for large pages from here on
_KEPT = 1 << 30  # bytes: results larger than this go back to the system at once
_ALIGNED = 64  # bytes, a line of the cache; NumPy's large memory begins 16 bytes after one
LARGE = 1 << 20
"""Numbers of a gradient whose memory is kept for the next one; that of smaller ones is used again anyway."""
_SPARES = 2  # of one shape: those of W_enc and W_dec

_Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros.  On a CPU, those that are never touched take no time and no memory."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _NUMPY_FROM:
        return torch.zeros(shape, dtype=dtype, device=device)
    return _aligned(np.zeros(size + _ALIGNED, dtype=np.uint8), size).view(dtype).view(shape)


def uninitialized(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with anything in it."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _NUMPY_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    return _aligned(np.empty(size + _ALIGNED, dtype=np.uint8), size).view(dtype).view(shape)


def _aligned(memory: _Bytes, size: int) -> Tensor:
    """``size`` bytes of ``memory`` that begin where torch's own do: a product is written a quarter faster there."""
    start = -memory.ctypes.data % _ALIGNED
    return torch.from_numpy(memory[start : start + size])


class Workspace:
    """The memory of one piece of work at a time, kept from one to the next; :class:`Workspaces` lends them."""

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._owners: dict[str, weakref.ref[object]] = {}

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with anything in it, whose memory the next call with this ``name`` uses again.

        It is as large as the largest that was asked for.
        """
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        needed = math.prod(shape) * dtype.itemsize
        block = self._scratch.get(name)
        if block is None or len(block) < needed:
            self._scratch.pop(name, None)  # free it first
            with torch.inference_mode(False):  # what is made there may not be written to elsewhere
                block = self._scratch[name] = uninitialized((needed,), torch.uint8, device)
        return block[:needed].view(dtype).view(shape)

    def own(self, name: str, owner: object) -> None:
        """Note that the numbers in the memory of ``name`` are those of ``owner``, which this does not keep alive."""
        self._owners[name] = weakref.ref(owner)

    def is_owner(self, name: str, owner: object) -> bool:
        """Whether they still are, for who would use them again."""
        known = self._owners.get(name)
        return known is not None and known() is owner

    def mask_like(self, pre: Tensor) -> Tensor:
        """A bool tensor of the shape of ``pre [n, m]``, in the memory of gradients, which come later."""
        return self.scratch("gradient", (len(pre), pre.shape[1]), torch.bool, pre.device)

    def between_steps(self, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[numbers]`` with anything in it, in the memory of pre-activations, which nobody needs when gradients are
        made."""
        return self.scratch("pre", (numbers,), dtype, device)

    def gradient_for(self, parameter: Tensor) -> Tensor:
        """A tensor like ``parameter [d_sae, d]``, in one piece, with anything in it; given back by :meth:`recycle`."""
        spares = self._spare.get((parameter.shape, parameter.dtype))
        if spares and parameter.device.type == "cpu":
            return spares.pop()
        return uninitialized(tuple(parameter.shape), parameter.dtype, parameter.device)

    def recycle(self, gradients: Iterable[Tensor | None]) -> None:
        """Keep the memory of ``gradients``, which nobody uses any more, for those of the next step."""
        for gradient in gradients:
            if gradient is None or gradient.device.type != "cpu" or gradient.numel() < LARGE or gradient.dim() != 2:
                continue
            rows = gradient if gradient.is_contiguous() else gradient.T
            spares = self._spare.setdefault((rows.shape, rows.dtype), [])
            if rows.is_contiguous() and len(spares) < _SPARES:
                spares.append(rows)


class _Result:
    """Memory of a result, which goes back when the last array, tensor or view on it is gone."""

    def __init__(self, memory: _Bytes, spare: deque[_Bytes]) -> None:
        self._memory, self._spare = memory, spare
        self.__array_interface__ = memory.__array_interface__  # what NumPy's arrays on it keep alive is this object

    def __del__(self) -> None:
        self._spare.append(self._memory)


class Workspaces:
    """Lends a :class:`Workspace` to each piece of work: the same one again, unless several go on at once.

    Copies and pickles of what has one share this one, or the one of the process that they come to.
    """

    def __init__(self) -> None:
        self._free: list[Workspace] = []
        self._spare: deque[_Bytes] = deque(maxlen=1)
        self.known: object = None
        """What is known of the last result, for those who can tell whether it still holds."""

    def result(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
        """A tensor for somebody to keep, and whether it holds zeros; else it holds anything.

        On a CPU its memory is used for the next one once nobody has it any more.  One such block is kept, and no more
        than twice as much as is asked for, nor more than a gigabyte: on a virtual machine, fresh memory may cost as
        much as the product that it is for, since its host has to find it, too.
        """
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < _NUMPY_FROM:
            return zeros(shape, dtype, device), True
        try:
            memory, fresh = self._spare.pop(), False
        except IndexError:
            memory = None
        if memory is None or not size <= len(memory) - _ALIGNED <= 2 * size:
            del memory  # before there is more
            memory, fresh = np.zeros(size + _ALIGNED, dtype=np.uint8), True
        held = memory if size > _KEPT else np.asarray(_Result(memory, self._spare))
        return _aligned(held, size).view(dtype).view(shape), fresh

    @contextmanager
    def lent(self) -> Iterator[Workspace]:
        """One that nobody else uses meanwhile."""
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace()
        try:
            yield workspace
        finally:
            self._free.append(workspace)

    def recycle(self, gradients: Iterable[Tensor | None]) -> None:
        """:meth:`Workspace.recycle`, between two pieces of work."""
        with self.lent() as workspace:
            workspace.recycle(gradients)

    def release(self) -> None:
        """Give what is not in use back to the system, and what is in use as soon as it no longer is."""
        self._free.clear()
        self._spare = deque(maxlen=1)  # blocks that are out go back to the other, and with it
        self.known = None

    def __deepcopy__(self, memo: object) -> Workspaces:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _shared, ()


SHARED = Workspaces()
"""The memory of a process, which dictionaries use that were given no other."""


def _shared() -> Workspaces:
    return SHARED
