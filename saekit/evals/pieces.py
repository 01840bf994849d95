"""How much is worked on at once, so that what is measured needs no more memory than that."""

from __future__ import annotations

from saekit.sae.module import SAEModule

__all__ = ["at_once"]

_BYTES = 1 << 26  # of the features of a piece, as a dense tensor


def at_once(sae: SAEModule, rows: int = 1) -> int:
    """How many items of ``rows`` rows each have few enough features, on all processes together; one at least."""
    return max(_BYTES // (rows * sae.d_sae * sae.share.parts * sae.dtype.itemsize), 1)
