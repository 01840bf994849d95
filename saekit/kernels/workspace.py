"""Large memory: used again and again, and in large pages.

A fresh allocation of a hundred megabytes costs a CPU as much time as a tenth of a matrix product: the system hands it
out page by page, as zeros.  NumPy asks for large pages, where the system has them, and torch does not; rows that are
read here and there are found faster in them, too.  Other devices have a pool of their own in torch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["gradient_for", "recycle", "release", "scratch", "uninitialized", "zeros"]


class _Kept(threading.local):
    def __init__(self) -> None:
        self.scratch: dict[str, Tensor] = {}
        self.spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}


_kept = _Kept()
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


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with anything in it, whose memory the next call with this ``name`` in this thread uses again.

    It is as large as the largest that was asked for.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    needed = math.prod(shape) * dtype.itemsize
    block = _kept.scratch.get(name)
    if block is None or len(block) < needed:
        _kept.scratch.pop(name, None)  # free it first
        with torch.inference_mode(False):  # what is made there may not be written to elsewhere
            block = _kept.scratch[name] = uninitialized((needed,), torch.uint8, device)
    return block[:needed].view(dtype).view(shape)


def gradient_for(parameter: Tensor) -> Tensor:
    """A tensor like ``parameter [d_sae, d_in]``, in one piece, with anything in it; given back by :func:`recycle`."""
    spares = _kept.spare.get((parameter.shape, parameter.dtype))
    if spares and parameter.device.type == "cpu":
        return spares.pop()
    return uninitialized(tuple(parameter.shape), parameter.dtype, parameter.device)


def recycle(gradients: Iterable[Tensor | None]) -> None:
    """Keep the memory of ``gradients``, which nobody uses any more, for those of the next step."""
    for gradient in gradients:
        if gradient is None or gradient.device.type != "cpu" or gradient.numel() < _LARGE or gradient.dim() != 2:
            continue
        rows = gradient if gradient.is_contiguous() else gradient.T
        spares = _kept.spare.setdefault((rows.shape, rows.dtype), [])
        if rows.is_contiguous() and len(spares) < _SPARES:
            spares.append(rows)


def release() -> None:
    """Give what this thread keeps back to the system."""
    _kept.scratch.clear()
    _kept.spare.clear()
