"""What a pass needs of memory, disk and time, known before it begins: counted from shapes and a few contexts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.errors import PlaceError
from saekit.features.feature import BINS
from saekit.features.manifest import MANIFEST
from saekit.features.subject import Collected

__all__ = ["PART_ENTRIES", "PART_TOKENS", "UNIT_TOKENS", "Estimate", "Options", "Seen", "check_space", "estimated"]

UNIT_TOKENS = 4096
"""Tokens whose inputs are held at once."""
PART_ENTRIES, PART_TOKENS = 1 << 20, 1 << 17
"""Activations, and tokens, after which a part goes to the disk."""
_PAIR, _PRODUCT = 9e-9, 1e-10  # seconds of a core for what fires together: of sparse matrices, or of dense ones
_OLD = ". The store that is there stays until the new one is whole; to make room, remove it yourself"
_MERGING = 1 << 28  # bytes, for what is put in order at once, and for sums of what fires together


@attrs.frozen(kw_only=True)
class Options:
    """What is kept of what is found."""

    max_per_feature: int = 100_000
    """Activations of a feature, above which a fair sample of its contexts is kept, and the largest."""
    top_kept: int = 200
    """How many of the largest are kept in any case."""
    partners: int = 20
    """Features and neurons that are kept of those that are active with each."""
    logits: int = 20
    """Tokens that are kept of those whose logits each raises and lowers most."""
    seed: int = 0
    """For the samples."""


@attrs.frozen(eq=False)
class Seen:
    """What a few contexts have of an SAE."""

    tokens: int
    rows: int
    """Tokens on which a feature that is asked for fires."""
    entries: int
    """Activations of all features there."""
    pairs: float
    """Pairs of one that is asked for and any other, on the same token."""
    wanted: Tensor
    """``[features]``: how often each that is asked for fires."""


@attrs.frozen(kw_only=True)
class Estimate:
    """What a pass needs."""

    memory: int
    """Bytes, beside the model and the SAEs."""
    working: int
    """Bytes on the disk at most, while it works."""
    stored: int
    """Bytes on the disk in the end."""
    seconds: float
    """For the model and the SAEs, and for what fires together."""

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:,.0f} min" if self.seconds >= 90 else f"{self.seconds:,.0f} s"
        return (
            f"about {minutes}; {_size(self.memory)} of memory beside the model and the SAEs; {_size(self.working)} of "
            f"disk while it works, {_size(self.stored)} in the end"
        )


def estimated(
    subjects: Sequence[Collected], seen: Sequence[Seen], shape: tuple[int, int], options: Options, seconds: float
) -> Estimate:
    """For ``shape``, contexts and their size, of which a few took ``seconds`` a token."""
    contexts, size = shape
    tokens, memory, working = contexts * size, 0, 0
    stored = 4 * tokens
    for one, found in zip(subjects, seen, strict=True):
        share = tokens / max(found.tokens, 1)
        n, item = len(one.features), one.dtype.itemsize
        together = min(found.pairs * _PAIR / max(found.tokens, 1), n * one.sae.d_sae * _PRODUCT)
        seconds += together / torch.get_num_threads()
        sums = 8 * (n * one.sae.d_in + 3 * one.sae.d_sae + 2 * one.sae.d_in)
        counts = found.wanted.double().numpy() * share
        entries = float(counts.sum())
        parts = max(found.entries * share / PART_ENTRIES, tokens / PART_TOKENS, 1)
        working += (
            round(share * (found.entries * (4 + item) + found.rows * 16) + 4 * entries + parts * 8 * n) + 2 * sums
        )
        kept = float(np.minimum(counts, options.max_per_feature).sum())
        columns = kept * (4 + item + (2 if size <= 1 << 15 else 4) + bool((counts > options.max_per_feature).any()))
        stored += round(columns) + tokens + n * _row_bytes(one, options)
        working += round(columns / 2)
        memory += sums + (PART_ENTRIES + round(found.entries / max(found.tokens, 1) * UNIT_TOKENS)) * (4 * item + 24)
        memory += UNIT_TOKENS * one.sae.d_in * (8 + item)
    return Estimate(
        memory=memory + _MERGING,
        working=working + stored,
        stored=stored,
        seconds=seconds * tokens,
    )


def _row_bytes(one: Collected, options: Options) -> int:
    """Of the tables of one feature."""
    k = options.partners
    together = 4 * (2 * 4 * min(k, one.sae.d_sae) + 3 * min(k, one.sae.d_in))
    weights = 4 * (3 * min(k, one.sae.d_out) + 2 * min(k, one.sae.d_sae))
    return 8 * 9 + 8 * BINS + together + weights + 16 * options.logits + 16 + 4 * BINS


def check_space(folder: Path, estimate: Estimate, there: int = 0) -> None:
    """:class:`PlaceError` where the disk has no room for what is not ``there`` yet."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if (needed := estimate.working - there) > free:
        raise PlaceError(
            f"the feature store {str(folder)!r} needs about {_size(needed)} while it is made, and the disk has "
            f"{_size(free)} free. Ask for fewer features (features) or contexts (n_contexts), or name a folder on "
            f"another disk (folder){_OLD if (folder / MANIFEST).exists() else ''}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
