"""The active features of rows, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saekit.abilities import SparseActivation
from saekit.devices import at_hand
from saekit.kernels.encoder import (
    CHUNK,
    PROBE,
    Encoder,
    Pending,
    active_entries,
    dense_above,
    screen_below,
)
from saekit.kernels.features import Features
from saekit.kernels.screen import Screen
from saekit.kernels.workspace import Workspace

__all__ = ["active_groups"]


def active_groups(
    encoder: Encoder,
    rows: Tensor,
    activation: SparseActivation | None,
    *,
    above: Tensor | float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    screen: Screen | None = None,
) -> Iterator[tuple[int, Features]]:
    """The features of ``rows [n, d_in]`` where pre-activations exceed ``above``, group by group with its first row.

    ``above`` is one number, or one for each feature.  Without an ``activation``, the pre-activations themselves: sparse
    groups have those above, dense ones all of them.
    Each group is sparse or, where many features are active, dense: then it holds the buffer, until the next one.  The
    first rows show whether the others are worth a ``screen``.
    ``noise`` gives what is added to the pre-activations of so many rows.  The device is not waited for: on one that is
    not a CPU, every group is dense.
    """
    pending = Pending(encoder, activation)
    start = 0
    screening = False
    while start < len(rows):
        probe = screen is not None and noise is None and start == 0 and len(rows) > PROBE
        part = rows[start : start + (PROBE if probe else CHUNK)]
        found = screen.active(part, above) if screening and screen is not None else None
        screening &= found is not None
        if found is None:
            product = encoder.product(part)
            if noise is not None:
                product += noise(len(part))
            if at_hand(product.device):
                found = active_entries(product, encoder.b_enc, above, limit=dense_above(encoder.W_enc))
        if found is None:
            yield from pending.flush()
            yield start, _dense(product.add_(encoder.b_enc), activation, above, encoder.workspace)
        else:
            screening |= probe and len(found) < screen_below(encoder.W_enc) * len(part) * encoder.d_sae
            yield from pending.add(start, found)
        start += len(part)
    yield from pending.flush()


def _dense(pre: Tensor, activation: SparseActivation | None, above: Tensor | float, workspace: Workspace) -> Tensor:
    if activation is None:
        return pre
    if isinstance(above, Tensor) or above:
        pre.masked_fill_(torch.le(pre, above, out=workspace.mask_like(pre)), 0)
    return activation.in_place(pre)
