"""What belongs to the whole process, which no plugin changes while it works."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["RANDOM", "changed", "surroundings"]

_OF_TORCH = ("TORCH", "TRITON")  # it sets some itself, on first use
RANDOM = ("Python's random numbers", "NumPy's random numbers", "torch's random numbers")


def surroundings(packages: Sequence[str] = ()) -> dict[str, Any]:
    """By what they are called.  ``packages`` may set variables of the environment that begin with their names."""
    import torch

    others = (*_OF_TORCH, *(package.upper() for package in packages))
    return {
        "the environment": {name: os.environ[name] for name in os.environ if not name.startswith(others)},
        "the working directory": os.getcwd(),  # noqa: PTH109
        "sys.path": list(sys.path),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        RANDOM[0]: random.getstate(),
        RANDOM[1]: _of_numpy(),
        RANDOM[2]: torch.random.get_rng_state().numpy().tobytes(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the number of torch's threads": torch.get_num_threads(),
    }


def _of_numpy() -> tuple[Any, ...]:
    import numpy as np

    kind, keys, *rest = np.random.get_state(legacy=True)
    return kind, np.asarray(keys).tobytes(), *rest


def changed(before: dict[str, Any], packages: Sequence[str] = (), *, random_too: bool) -> list[str]:
    """What is not as it was ``before``."""
    now = surroundings(packages)
    return [name for name in before if before[name] != now[name] and (random_too or name not in RANDOM)]
