"""Where tensors live."""

from __future__ import annotations

from saekit.errors import ConfigError

__all__ = ["resolve_device"]


def resolve_device(device: str, option: str) -> str:
    """``auto`` as the GPU, if there is one; a device that does not work is a :class:`ConfigError` naming ``option``."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([(option, f"{device!r} cannot be used: {str(error).splitlines()[0]}")]) from error
    return device
