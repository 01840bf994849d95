"""How well and how sparsely an SAE reconstructs: sums of each context, and the numbers that they make.

Explained variance is ``1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²``, with ȳ the mean over everything that was summed up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.devices import widest
from saekit.evals.sums import Sums, Totals, ratio
from saekit.kernels.sparse import SparseFeatures
from saekit.measuring import Measure
from saekit.sae.module import SAEModule
from saekit.values import Histogram

__all__ = ["ROW_MEASURES", "add_rows", "counted_of_rows", "row_metrics", "row_sums"]

_NEVER = -9.99  # log10 of the firing fraction of a feature that never fired, to which 1e-10 is added
_DENSE = 0.1
_BINS = 64

ROW_MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "explained_variance": Measure("explained variance", 1, "EV", headline=2, fidelity=True, of_site=True),
        "l0": Measure("L0", headline=3),
        "mse": Measure("mse", -1, of_site=True),
        "l1": Measure("L1"),
        "cosine_similarity": Measure("cosine similarity", 1, "cosine sim.", of_site=True),
        "l2_norm_in": Measure("norm of targets", of_model=True),
        "l2_norm_out": Measure("norm of reconstructions"),
        "l2_ratio": Measure("norm ratio"),
        "relative_reconstruction_bias": Measure("relative reconstruction bias"),
        "n_tokens": Measure("tokens"),
    }
)
"""What the numbers of :func:`row_metrics` and :func:`counted_of_rows` mean."""


def row_sums(sae: SAEModule) -> Sums:
    """Sums of nothing for :func:`add_rows`."""
    known = None if sae.log_sparsity is None else (sae.log_sparsity > _NEVER).cpu().numpy()
    targets = tuple(sae.ports.targets.items())
    return Sums(d_sae=sae.d_sae, targets=targets if len(targets) > 1 else (), known=known)


def add_rows(
    sums: Sums,
    numbers: Sequence[int],
    targets: Tensor,
    outputs: Tensor,
    features: SparseFeatures,
    kept: Tensor | None = None,
) -> None:
    """Add contexts of these ``numbers``: ``targets`` and ``outputs [b, t, d_out]``, and the features of all positions.

    Positions where ``kept [b, t]`` is false are left out.
    """
    dtype = widest(targets.device)
    y, given = targets.to(dtype), outputs.to(targets.device, dtype)
    kept = torch.ones(y.shape[:2], dtype=torch.bool) if kept is None else kept
    on_device = kept.to(y.device)
    if not bool(kept.all()):
        y, given = (values.masked_fill(~on_device[..., None], 0) for values in (y, given))
    count = on_device.sum(1)
    total = y.sum(1)
    off = (y - (total / count.clamp_min(1)[:, None])[:, None]).mul_(on_device[..., None])
    norm_in, norm_out = y.norm(dim=-1), given.norm(dim=-1)
    dot = torch.linalg.vecdot(y, given)
    columns = {
        "tokens": count,
        "total": total,
        "norm_in": norm_in.sum(1),
        "norm_out": norm_out.sum(1),
        "squares_out": norm_out.square().sum(1),
        "dot": dot.sum(1),
        "cosines": (dot / (norm_in * norm_out).clamp_min(1e-30)).sum(1),
        "positions": torch.full_like(count, kept.shape[1]),
        "not_finite": (~given.isfinite().all(-1)).sum(1),
        **_squares(off, given.sub_(y), sums.facts["targets"]),
    }
    found, fired = _of_features(features, kept)
    sums.add(numbers, {name: values.cpu() for name, values in (columns | found).items()}, {"fired": fired.cpu()})


def _squares(off: Tensor, error: Tensor, targets: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    """Of each context the squares around its mean and those of the error; of each of several targets, too."""
    found = {"within": off.square().sum((1, 2)), "error": error.square().sum((1, 2))}
    first = 0
    for name, width in targets:
        columns = slice(first, first := first + width)
        found[f"within/{name}"] = off[..., columns].square().sum((1, 2))
        found[f"error/{name}"] = error[..., columns].square().sum((1, 2))
    return found


def _of_features(features: SparseFeatures, kept: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """How many are active in each context, what they sum up to, and how often each of them fired."""
    b, t = kept.shape
    active = (features.values != 0) & kept.to(features.rows.device).flatten()[features.rows]
    entries = features.kept(active)
    owners = entries.rows // t
    sizes = entries.values.abs().to(widest(entries.values.device))
    found = {
        "l0": torch.bincount(owners, minlength=b),
        "l1": SparseFeatures(owners, entries.features, sizes, b, features.d_sae).row_sums(sizes),
    }
    return found, torch.bincount(entries.features, minlength=features.d_sae)


def row_metrics(totals: Totals) -> dict[str, Any]:
    """The numbers by name, ``[r]`` each."""
    n, norm_in, norm_out = totals["tokens"], totals["norm_in"], totals["norm_out"]
    found = {"explained_variance": _explained(totals, "", slice(None))}
    first = 0
    for name, width in totals.sums.facts["targets"]:
        columns = slice(first, first := first + width)
        found[f"explained_variance/{name}"] = _explained(totals, f"/{name}", columns)
    return found | {
        "mse": ratio(totals["error"], n),
        "l0": ratio(totals["l0"], n),
        "l1": ratio(totals["l1"], n),
        "cosine_similarity": ratio(totals["cosines"], n),
        "l2_norm_in": ratio(norm_in, n),
        "l2_norm_out": ratio(norm_out, n),
        "l2_ratio": ratio(norm_out, norm_in),
        "relative_reconstruction_bias": ratio(totals["squares_out"], totals["dot"]),
    }


def _explained(totals: Totals, name: str, columns: slice) -> Any:
    """nan where all is alike."""
    spread = totals.spread(f"within{name}", "total", "tokens", columns)
    return np.where(spread > 0, 1 - totals[f"error{name}"] / np.where(spread > 0, spread, 1), np.nan)


def counted_of_rows(sums: Sums) -> dict[str, Any]:
    """What is counted over all contexts, and has no error: for :func:`saekit.evals.finished`.

    ``silent_features`` fired on none of ``n_tokens``.  ``never_fired`` counts the silent ones that did not fire in
    training either; of an SAE that does not say what fired in training, it counts all silent ones.  A feature that is
    silent here may still fire on up to ``3 / n_tokens`` of all tokens (95 %: the rule of three, Hanley and Lippman-Hand
    1983).
    """
    fired, tokens = sums.count("fired"), int(sums.column("tokens").sum())
    known, broken = sums.facts["known"], int(sums.column("not_finite").sum())
    remark = f"{broken:,} of {tokens:,} outputs of the SAE are not finite: too large for their type?"
    fractions = fired / max(tokens, 1)
    silent = fired == 0
    values = {
        "silent_features": float(silent.sum()),
        "never_fired": float((silent if known is None else silent & ~known).sum()),
        "dense_features": float((fractions > _DENSE).sum()),
        "n_tokens": float(tokens),
    }
    return {
        "values": values,
        "histograms": {"log10_firing_fractions": _histogram(np.log10(fractions[~silent]))},
        "features": {"firing_fractions": fractions},
        "remarks": (remark,) if broken else (),
        "about": {"tokens_used": tokens, "tokens_of": int(sums.column("positions").sum())},
    }


def _histogram(values: Any) -> Histogram:
    """Of ``values``, which are logarithms of fractions: 0 at most."""
    low = float(np.floor(values.min())) if len(values) else -1.0
    counts, edges = np.histogram(values, _BINS, (min(low, -1.0), 0.0))
    return Histogram(tuple(counts.tolist()), tuple(edges.tolist()))
