"""Where tensors live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["KERNEL_DEVICES", "free_memory", "resolve_device", "rows_on", "synchronize", "widest"]

KERNEL_DEVICES = ("cpu", "cuda")
"""The kinds of device that the fast kernels and torch's fused Adam are known to work on."""


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


def rows_on(device: torch.device | str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows`` on ``device`` in ``dtype``, whole.

    Nobody waits for a copy to a GPU: what is done there with it comes after it.  A CPU would read before it is there.
    """
    import torch

    return rows.to(device, dtype, non_blocking=torch.device(device).type != "cpu")


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
