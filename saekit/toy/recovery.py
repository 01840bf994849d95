"""How well an SAE has found true features that are known."""

from __future__ import annotations

import math

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from saekit.ambient import ambient
from saekit.evals.variance import variance_metrics
from saekit.sae.module import SAEModule
from saekit.toy.model import ToyModel

__all__ = ["Recovery", "match_directions", "measure_recovery"]


@attrs.frozen(kw_only=True, eq=False)
class Recovery:
    """What an SAE has found of a toy model's features."""

    mmcs: float
    """Of each true direction the largest cosine to any of the SAE's, in the mean (Sharkey et al. 2022): whether all
    true features were found."""
    mmcs_of_found: float
    """The same the other way, of each direction of the SAE that fires at all: whether all that it has is true."""
    matched_cosine: float
    """The mean cosine of true directions and those that they are matched with, one with one; 0 where there is none."""
    precision: float
    """How often a true feature fires where its match does, in the mean over true features; 0 of a match that is silent
    or that there is not."""
    recall: float
    """How often a match fires where its true feature does, in the mean over true features."""
    f1: float
    """Twice precision times recall by their sum, in the mean over true features."""
    l0: float
    """Features of the SAE that fire in a row, on average."""
    true_l0: float
    """True features that do."""
    explained_variance: float
    """Of hidden activations, by the SAE."""
    silent: int
    """Features of the SAE that fired on none of the rows."""
    matches: Tensor = attrs.field(repr=False)
    """``[n_features]``, for each true feature the number of the SAE's that it is matched with; -1: none that is left
    points its way."""

    def as_dict(self) -> dict[str, float]:
        """The numbers by name; what is undefined, such as the mean over none, is nan."""
        return {name: value for name, value in attrs.asdict(self).items() if name != "matches"}


@ambient()
@torch.no_grad()
def measure_recovery(sae: SAEModule, model: ToyModel, *, rows: int = 20_000, seed: int = 1) -> Recovery:
    """Compare ``sae``, which reads hidden activations of ``model``, with the true features.

    Firing is counted on ``rows`` new rows, drawn by ``seed``.  Directions are decoder rows.  Of an SAE whose features
    may be below zero, a direction and its opposite are the same, and one fires where it is not zero.
    """
    width = model.config.n_hidden
    if (sae.d_in, sae.d_out) != (width, width):
        raise ValueError(
            f"the SAE reads {sae.d_in} and writes {sae.d_out} numbers, and the toy model's hidden layer has {width}; "
            "measure it with the toy model that it was trained on"
        )
    x = model.draw(rows, torch.Generator().manual_seed(seed))
    hidden = model.hidden(x).to(sae.device, sae.dtype)
    features = torch.cat([sae.encode(piece) for piece in hidden.split(4096)]).cpu()
    fires, truly = features != 0, x.cpu() > 0
    signed = not bool((features < 0).any())
    true, found = (_units(of) for of in (model.directions, sae.scaled_decoder().detach()))
    cosines = true @ found.T if signed else (true @ found.T).abs()
    alive = fires.any(0)
    matches = _assigned(cosines)
    scores = _scores(truly, fires, matches)
    return Recovery(
        mmcs=cosines.amax(1).mean().item(),
        mmcs_of_found=cosines[:, alive].amax(0).mean().item() if alive.any() else math.nan,
        matched_cosine=_matched(cosines, matches).mean().item(),
        precision=scores[0].mean().item(),
        recall=scores[1].mean().item(),
        f1=scores[2].mean().item(),
        l0=fires.sum(1).double().mean().item(),
        true_l0=truly.sum(1).double().mean().item(),
        explained_variance=variance_metrics(sae, [hidden])["explained_variance"],
        silent=int((~alive).sum()),
        matches=matches,
    )


def match_directions(true: Tensor, found: Tensor, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Match rows of ``true [n, d]`` with rows of ``found [k, d]``, one with one, so that cosines are largest in sum.

    Returns the number of the found row for each true one, ``[n]``, -1 for those for which none is left with a cosine
    above 0, and the cosines, ``[n]``, 0 for these.  Without ``signed``, opposite directions count as the same.
    """
    cosines = _units(true) @ _units(found).T
    cosines = cosines if signed else cosines.abs()
    matches = _assigned(cosines)
    return matches, _matched(cosines, matches)


def _units(rows: Tensor) -> Tensor:
    """In float64, on the CPU; a row of zeros stays one, and is like nothing."""
    return normalize(rows.detach().cpu().double(), dim=1)


def _matched(cosines: Tensor, matches: Tensor) -> Tensor:
    there = matches >= 0
    found = cosines.gather(1, matches.clamp_min(0)[:, None])[:, 0]
    return torch.where(there, found, torch.zeros_like(found))


def _scores(truly: Tensor, fires: Tensor, matches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of each true feature that fires in the rows, from ``[rows, n_features]`` and ``[rows,
    d_sae]``."""
    there = matches >= 0
    claimed = fires[:, matches.clamp_min(0)] & there
    both, said, was = (counted.sum(0).double() for counted in (claimed & truly, claimed, truly))
    seen = was > 0  # of one that never fires in these rows, nothing can be said
    precision, recall, f1 = both / said.clamp_min(1), both / was.clamp_min(1), 2 * both / (said + was).clamp_min(1)
    return precision[seen], recall[seen], f1[seen]


def _assigned(gains: Tensor) -> Tensor:
    """For each row of ``gains [n, k]`` a column of its own, so that their sum is largest; -1 where none has a gain.

    The Hungarian method in its form by shortest augmenting paths (Jonker and Volgenant 1987), O(n² k).
    """
    gains = gains.clamp_min(0)  # what points away is as good as nothing
    if gains.shape[0] > gains.shape[1]:
        of_columns = torch.from_numpy(_columns(-gains.T.contiguous().numpy()))
        found = torch.full((len(gains),), -1).scatter(0, of_columns, torch.arange(gains.shape[1]))
    else:
        found = torch.from_numpy(_columns(-gains.numpy()))
    return torch.where(_matched(gains, found) > 0, found, -1)


def _columns(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """A column for each row of ``costs [n, k]``, ``n <= k``, of the least sum.

    Rows are added one after the other.  ``rows[j]`` is the row that column ``j`` is given to; a search goes from the
    new row over columns that are taken to the nearest that is free, by costs reduced by ``row_price`` and
    ``column_price``, and gives the columns on its way anew.  The last column stands for where a search begins.
    """
    n, k = costs.shape
    row_price, column_price = np.zeros(n), np.zeros(k + 1)
    rows = np.full(k + 1, -1)
    for new in range(n):
        rows[k], at = new, k
        nearest, before, seen = np.full(k, np.inf), np.full(k, k), np.zeros(k + 1, dtype=bool)
        while rows[at] >= 0:
            seen[at] = True
            reduced = costs[rows[at]] - row_price[rows[at]] - column_price[:k]
            better = ~seen[:k] & (reduced < nearest)
            nearest[better], before[better] = reduced[better], at
            open_columns = np.where(seen[:k], np.inf, nearest)
            following = int(open_columns.argmin())
            step = open_columns[following]
            row_price[rows[seen]] += step
            column_price[seen] -= step
            nearest[~seen[:k]] -= step
            at = following
        while at != k:
            rows[at], at = rows[before[at]], int(before[at])
    found = np.empty(n, dtype=np.int64)
    for column in np.flatnonzero(rows[:k] >= 0):
        found[rows[column]] = column
    return found
