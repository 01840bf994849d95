"""Scaling activations to a common size (Anthropic, April 2024 update: "expected average only in")."""

from __future__ import annotations

import math

from torch import Tensor

from saekit.errors import DataError

__all__ = ["activation_scale"]


def activation_scale(rows: Tensor) -> float:
    """``sqrt(d_in) / mean ‖x‖`` over ``rows [n, d_in]``: scaled rows have a mean norm of ``sqrt(d_in)``."""
    # In pieces: rows may be a whole buffer, of which a copy in float64 would take twice the memory.
    mean = sum(float(part.double().norm(dim=1).sum()) for part in rows.split(8192)) / max(len(rows), 1)
    if not 0 < mean < math.inf:
        raise DataError(
            f"activations have a mean norm of {mean}, so they cannot be normalized "
            "(activations.normalize_activations). Look at the site and the model's dtype"
        )
    return math.sqrt(rows.shape[1]) / mean
