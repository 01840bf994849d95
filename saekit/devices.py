"""Where tensors live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["KERNEL_DEVICES", "at_hand", "free_memory", "resolve_device", "rows_on", "sent", "synchronize", "widest"]

KERNEL_DEVICES = ("cpu", "cuda")
"""The kinds of device that the fast kernels and torch's fused Adam are known to work on."""
AT_HAND = frozenset({"cpu"})
"""The kinds whose numbers can be looked at for nothing."""


def resolve_device(device: str, option: str, dtype: str | None = None) -> str:
    """``auto`` as the GPU, if there is one that holds ``dtype``.

    A device that does not work, or not with ``dtype``, is a :class:`ConfigError` naming ``option``.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return _this_gpu()
        return "mps" if torch.backends.mps.is_available() and dtype != "float64" else "cpu"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([(option, f"{device!r} cannot be used: {str(error).splitlines()[0]}")]) from error
    if device == "cuda":
        return _this_gpu()
    if kind == "mps" and dtype == "float64":
        raise ConfigError([(option, f"{device!r} has no float64, which was asked for; use 'cpu', or float32")])
    return device


def _this_gpu() -> str:
    """The GPU of this process, of several on a machine: by its number, since to other threads ``cuda`` is the first."""
    import torch

    number = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # which stays asleep where nobody chose
    return f"cuda:{number}" if number else "cuda"


def widest(device: torch.device) -> torch.dtype:
    """The floating-point type with the most digits that ``device`` has."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def at_hand(device: torch.device) -> bool:
    """Whether a look at a number on ``device`` costs nothing.

    On any other it waits for all that was given to the device so far: there nothing in a training step is decided by
    what numbers are, and whatever is chosen has a fixed size.
    """
    return device.type in AT_HAND


def rows_on(device: torch.device | str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows`` on ``device`` in ``dtype``, whole; see :func:`sent`."""
    return sent(device, rows).to(dtype)


def sent(device: torch.device | str, values: Tensor) -> Tensor:
    """``values`` on ``device``.

    Nobody waits for a copy to a GPU: what is done there with it comes after it.  It is made from pinned memory, since
    from any other it begins when all before it is done, and torch does not return until then; torch keeps that memory
    until the copy is made.  A copy to the CPU is waited for: who reads it would come before it.
    """
    import torch

    target = torch.device(device)
    if target.type in ("cpu", "mps") or values.device.type != "cpu":  # MPS reads memory that may be used again by then
        return values.to(target)
    if target.type == "cuda" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(target, non_blocking=True)


def synchronize(device: torch.device | str) -> None:
    """Wait until ``device`` has done what it was given, as one must before looking at a clock."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def free_memory() -> None:
    """Give memory that torch keeps for later back to the devices; one that is not in use is not woken."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
