"""How well and how sparsely an SAE reconstructs rows that are there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.evals.accumulating import finished
from saekit.evals.pieces import at_once
from saekit.evals.rows import add_rows, counted_of_rows, row_metrics, row_sums
from saekit.sae.module import SAEModule
from saekit.sae.once import features_and_outputs

__all__ = ["variance_metrics"]


@ambient()
@torch.no_grad()
def variance_metrics(sae: SAEModule, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What the eval ``reconstruction`` tells of rows, without errors: of batches ``[n, d_in]``, or of rows with targets
    ``[n, d_out]``.

    Explained variance is ``1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²`` with ȳ the mean over all batches.  What reads sequences
    (:attr:`saekit.sae.SAEModule.reads_sequences`) takes ``[batch, position, d_in]``.  Features are made for so many
    rows at once as fit into little memory, however large the batches are.
    """
    sums = row_sums(sae)
    for batch in batches:
        rows, targets = (batch, None) if isinstance(batch, Tensor) else batch
        size = at_once(sae, rows.shape[1] if rows.ndim > 2 else 1)
        pieces = rows.split(size)
        for x, y in zip(pieces, [None] * len(pieces) if targets is None else targets.split(size), strict=True):
            if not len(x):
                continue
            x = x.to(sae.device)
            features, outputs = features_and_outputs(sae, x)
            wanted = x if y is None else y.to(sae.device)
            add_rows(sums, [len(sums)], _one(wanted, sae.d_out), _one(outputs, sae.d_out), features)
    return dict(finished(sums, row_metrics, 0, **counted_of_rows(sums)).values)


def _one(rows: Tensor, width: int) -> Tensor:
    """``[1, n, width]``: all as of one context."""
    return rows.reshape(1, -1, width)
