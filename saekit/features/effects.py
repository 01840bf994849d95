"""What can be told of features from weights alone: where their directions point, and what they do to the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.analysis.promoting import output_directions, residual_directions
from saekit.features.feature import BINS
from saekit.features.subject import Collected
from saekit.features.together import strongest
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule

__all__ = ["directions_of", "logit_effects", "weight_tables"]

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
def weight_tables(one: Collected, k: int, report: Callable[[int], Any] = lambda features: None) -> dict[str, Tensor]:
    """Of each feature the ``k`` largest coordinates of its direction, and the ``k`` features most like it, as tables.

    Coordinates by value, with their share of the direction's L1 norm (sae_vis calls it neuron alignment); features by
    the cosine of their directions, among all of the SAE.
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
        none = (lengths[:, 0] == 0).expand_as(cosines).index_put((torch.arange(len(own)), own), torch.tensor(True))
        neighbors = strongest("cos", {"cos": cosines}, k, none)
        for prefix, tables in (("alignment", alignment), ("neighbor", neighbors)):
            for name, table in tables.items():
                found.setdefault(f"{prefix}_{name}", []).append(table)
        report(len(own))
    return {name: torch.cat(tables) for name, tables in found.items()}


@ambient()
@torch.no_grad()
def logit_effects(
    one: Collected, backend: ModelBackend, k: int, report: Callable[[int], Any] = lambda features: None
) -> dict[str, Tensor]:
    """What each feature does to the logits, as tables: the ``k`` highest and lowest, a histogram, mean and deviation.

    ``d W_U`` of its direction in the residual stream, past the last normalization, and not centered.
    """
    weights = backend.unembedding()[0].detach()[:, : backend.d_vocab]
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(one.features), _AT_ONCE):
        features = one.features[start : start + _AT_ONCE].tolist()
        directions = directions_of(one.sae, features).to(one.sae.device)
        logits = (residual_directions(directions, backend, one.sites).to(weights) @ weights).float().cpu()
        none = torch.zeros(1, 1, dtype=torch.bool).expand_as(logits)
        for end, signed in (("top", logits), ("bottom", -logits)):
            named = strongest("value", {"value": signed}, k, none)
            found.setdefault(f"{end}_ids", []).append(named["index"])
            found.setdefault(end, []).append(named["value"] if end == "top" else -named["value"])
        low, high = logits.min(1).values, logits.max(1).values
        numbers = {"low": low, "high": high, "mean": logits.mean(1), "std": logits.std(1, correction=0)}
        for name, value in (numbers | {"histogram": _histograms(logits, low, high)}).items():
            found.setdefault(name, []).append(value)
        report(len(features))
    return {name: torch.cat(tables) for name, tables in found.items()}


def _histograms(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``[n, bins]`` int32: of the rows of ``values [n, m]``, in bins of one width from the least to the largest."""
    width = ((high - low).double() / BINS)[:, None]
    places = ((values.double() - low[:, None]) / width.where(width > 0, 1)).long().clamp_(0, BINS - 1)
    counts = torch.zeros(len(values), BINS, dtype=torch.int32)
    return counts.scatter_add_(1, places, torch.ones_like(places, dtype=torch.int32))
