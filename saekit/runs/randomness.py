"""The process's own random numbers, for plugins that draw from them; saekit's stages have generators of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "seeded", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as plain values and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        # Only where something has used it by now: a look would wake a GPU that nobody needs.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        **({"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {}),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back; those of GPUs only on a machine with as many."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, and give them back to the caller as they were."""
    before, cuda_seed = random_state(), torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
        if not before["cuda"] and torch.cuda.is_initialized():  # woken since, and seeded as all of torch was before
            torch.cuda.manual_seed_all(cuda_seed)
