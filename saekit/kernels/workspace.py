"""Large memory: used again and again, and in large pages.

A fresh allocation of a hundred megabytes costs a CPU as much time as a tenth of a matrix product: the system hands it
out page by page, as zeros.  NumPy asks for large pages, where the system has them, and torch does not; rows that are
read here and there are found faster in them, too.  Other devices have a pool of their own in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["SHARED", "Workspace", "Workspaces", "uninitialized", "zeros"]

_NUMPY_FROM = 1 << 22  # bytes: NumPy asks for large pages from here on
_LARGE = 1 << 20  # numbers: smaller tensors come from memory that is used again anyway
_SPARES = 2  # of one shape: those of W_enc and W_dec


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros.  On a CPU, those that are never touched take no time and no memory."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _NUMPY_FROM:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def uninitialized(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with anything in it."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _NUMPY_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(shape)


class Workspace:
    """The memory of one piece of work at a time, kept from one to the next; :class:`Workspaces` lends them."""

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self.owners: dict[str, object] = {}
        """Whose numbers are in the memory of a name, for those who would use them again."""

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
            if gradient is None or gradient.device.type != "cpu" or gradient.numel() < _LARGE or gradient.dim() != 2:
                continue
            rows = gradient if gradient.is_contiguous() else gradient.T
            spares = self._spare.setdefault((rows.shape, rows.dtype), [])
            if rows.is_contiguous() and len(spares) < _SPARES:
                spares.append(rows)


class Workspaces:
    """Lends a :class:`Workspace` to each piece of work: the same one again, unless several go on at once.

    Copies and pickles of what has one share this one, or the one of the process that they come to.
    """

    def __init__(self) -> None:
        self._free: list[Workspace] = []

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
        """Give what is not in use back to the system."""
        self._free.clear()

    def __deepcopy__(self, memo: object) -> Workspaces:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _shared, ()


SHARED = Workspaces()
"""The memory of a process, which dictionaries use that were given no other."""


def _shared() -> Workspaces:
    return SHARED
