"""What can be told of features from weights alone: where their directions point, and what they do to the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.analysis.directions import logit_path
from saekit.analysis.feature_statistics import weight_columns
from saekit.analysis.promoting import output_directions
from saekit.errors import ModelError
from saekit.features.feature import BINS
from saekit.features.subject import Collected
from saekit.features.together import strongest
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule

__all__ = ["directions_of", "heads_of", "logit_effects", "statistics_tables", "weight_tables"]

_AT_ONCE = 64  # features, of whose logits for the whole vocabulary as many are held
_BYTES = 1 << 25  # of the cosines of a block of features with all others
_NAMED = 3  # features by which it is seen what is decoded


@ambient()
@torch.no_grad()
def directions_of(sae: SAEModule, features: Sequence[int]) -> Tensor:
    """``[features, d_out]``: what an activation of 1 adds to the outputs.

    The rows of the decoder where these are that; else what the SAE decodes of each feature alone.
    """
    rows = sae.scaled_decoder().detach()
    some = [int(number) for number in torch.linspace(0, sae.d_sae - 1, min(_NAMED, sae.d_sae))]
    if rows.shape == (sae.d_sae, sae.d_out) and torch.allclose(
        output_directions(sae, some).float(), rows[some].float(), rtol=1e-2, atol=1e-3 * float(rows[some].abs().max())
    ):
        return rows[list(features)].float().cpu()
    blocks = [features[start : start + _AT_ONCE] for start in range(0, len(features), _AT_ONCE)]
    return torch.cat([output_directions(sae, block).float().cpu() for block in blocks])


@ambient()
@torch.no_grad()
def weight_tables(
    one: Collected, k: int, heads: int = 0, report: Callable[[int], Any] = lambda features: None
) -> dict[str, Tensor]:
    """Of each feature the ``k`` largest coordinates of its direction, and the ``k`` features most like it, as tables.

    Coordinates by value, with their share of the direction's L1 norm (sae_vis calls it neuron alignment); features by
    the cosine of their directions, among all of the SAE.  Of directions whose coordinates are those of ``heads``, what
    share of the sum of their norms each head has (sae_dashboard's distribution of decoder weights).
    """
    everything = directions_of(one.sae, range(one.sae.d_sae))
    lengths = everything.norm(dim=1, keepdim=True)
    unit = everything / lengths.where(lengths > 0, 1)
    found: dict[str, list[Tensor]] = {}
    for own in torch.from_numpy(one.features).split(max(_BYTES // (4 * one.sae.d_sae), 1)):
        mine = everything[own]
        shares = mine.abs() / mine.abs().sum(1, keepdim=True).clamp_min(torch.finfo(mine.dtype).tiny)
        alignment = strongest("value", {"value": mine, "share": shares}, k, (mine == 0).all(1, keepdim=True))
        cosines = (unit[own] @ unit.T).clamp_(-1, 1)
        none = (lengths[:, 0] == 0) | (lengths[own] == 0)
        none = none.index_put((torch.arange(len(own)), own), torch.tensor(True))
        neighbors = strongest("cos", {"cos": cosines}, k, none)
        for prefix, tables in (("alignment", alignment), ("neighbor", neighbors)):
            for name, table in tables.items():
                found.setdefault(f"{prefix}_{name}", []).append(table)
        if heads:
            norms = mine.unflatten(1, (heads, -1)).norm(dim=2)
            shares = norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
            found.setdefault("head_shares", []).append(shares)
        report(len(own))
    return {name: torch.cat(tables) for name, tables in found.items()}


def heads_of(one: Collected, backend: ModelBackend, contexts: Tensor) -> int:
    """How many heads lie side by side in what the SAE writes; 0: none that are known."""
    site = one.sites.targets[0]
    if len(one.sites.targets) > 1 or site.hook_head_index is not None:
        return 0
    held = backend.run(contexts[:1], read=[site.hook_name]).held[site.hook_name]
    return held.shape[2] if held.ndim == 4 and held.shape[2:].numel() == one.sae.d_out else 0


def statistics_tables(one: Collected) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What statistics of features say of their weights, as tables; and why there is no such column, by column."""
    tables, left_out = dict[str, Tensor](), dict[str, str]()
    for name, found in weight_columns(one.sae).items():
        if isinstance(found, str):
            left_out[name] = found
        else:
            tables[name] = found.double().cpu()[torch.from_numpy(one.features)]
    return tables, left_out


@ambient()
@torch.no_grad()
def logit_effects(
    one: Collected, backend: ModelBackend, k: int, report: Callable[[int], Any] = lambda features: None
) -> dict[str, Tensor]:
    """What each feature does to the logits, as tables: the ``k`` highest and lowest, a histogram, and four moments.

    ``d W_U`` of its direction in the residual stream, past the last normalization, and not centered.
    :class:`saekit.errors.ModelError` where they do not come there.
    """
    path = logit_path(one.sae, backend, one.sites)
    if isinstance(path, str):
        raise ModelError(path)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(one.features), _AT_ONCE):
        features = one.features[start : start + _AT_ONCE].tolist()
        directions = directions_of(one.sae, features).to(one.sae.device)
        logits = path.logits(directions).float().cpu()
        none = torch.zeros(1, 1, dtype=torch.bool).expand_as(logits)
        for end, signed in (("top", logits), ("bottom", -logits)):
            named = strongest("value", {"value": signed}, k, none)
            found.setdefault(f"{end}_ids", []).append(named["index"])
            found.setdefault(end, []).append(named["value"] if end == "top" else -named["value"])
        low, high = logits.min(1).values, logits.max(1).values
        numbers = {"low": low, "high": high, **_moments(logits)}
        for name, value in (numbers | {"histogram": _histograms(logits, low, high)}).items():
            found.setdefault(name, []).append(value)
        report(len(features))
    return {name: torch.cat(tables) for name, tables in found.items()}


def _moments(values: Tensor) -> dict[str, Tensor]:
    """``[n]`` float64, of the rows of ``values``; skewness and kurtosis of one that is all the same are NaN."""
    exact = values.double()
    mean, std = exact.mean(1), exact.std(1, correction=0)
    flat = std <= 1e-6 * mean.abs()
    z = exact.sub_(mean[:, None]).div_(std.masked_fill(flat, torch.nan)[:, None])
    square = z * z
    return {"mean": mean, "std": std, "skewness": (z * square).mean(1), "kurtosis": square.square_().mean(1)}


def _histograms(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``[n, bins]`` int32: of the rows of ``values [n, m]``, in bins of one width from the least to the largest."""
    width = ((high - low).double() / BINS)[:, None]
    places = ((values.double() - low[:, None]) / width.where(width > 0, 1)).long().clamp_(0, BINS - 1)
    counts = torch.zeros(len(values), BINS, dtype=torch.int32)
    return counts.scatter_add_(1, places, torch.ones_like(places, dtype=torch.int32))
