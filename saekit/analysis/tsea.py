"""Token set enrichment analysis (TSEA): which sets of tokens a feature promotes or suppresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.ambient import ambient
from saekit.analysis.directions import LogitPath, feature_directions, logit_path
from saekit.analysis.enrichment import (
    Scores,
    checked_sets,
    enrichment_scores,
    p_values,
    running_sum,
    why_no_score,
)
from saekit.analysis.feature_statistics import checked_fractions, firing_fractions
from saekit.analysis.moments import row_moments
from saekit.analysis.scored import Scored, q_values
from saekit.analysis.token_set_files import MIN_SIZE, check_asked, check_numbers, read_token_sets
from saekit.analysis.token_sets import DEFAULT_KINDS, KINDS, token_sets
from saekit.errors import ConfigError, ModelError
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = [
    "DEFAULT_KINDS", "KINDS", "MIN_SIZE", "Enrichment", "enrich", "enrichment_of", "enrichment_scores", "q_values",
    "read_token_sets", "running_sum", "token_sets",
]  # fmt: skip

_AT_ONCE = 16
_FLAT = "all its logits are the same"
Report = Callable[[int], None]
"""Told how many more rows of the vocabulary's length are done, of features or of random orders."""


@attrs.frozen(eq=False, kw_only=True, repr=False)
class Enrichment(Scored):
    """The scores of sets of tokens in features of an SAE, with tables and pictures of them."""

    def __repr__(self) -> str:
        what = f"{len(self.sets):,} sets of tokens in {len(self.features):,} features"
        return f"Enrichment({self.name!r}: {what}, {self.permutations:,} permutations)"

    def manhattan(self) -> Figure:
        """All scores, set by set: see :func:`saekit.analysis.tsea_figures.manhattan`."""
        from saekit.analysis.tsea_figures import manhattan

        return manhattan(self)

    def overlay(self, feature: int, sets: Sequence[str] | int = 5) -> Figure:
        """The running sums of one feature, one over another."""
        from saekit.analysis.tsea_figures import overlay

        return overlay(self, feature, sets)

    def write(self, folder: str | Path) -> tuple[Path, ...]:
        """Write ``tsea.html``, which needs no network, and the table as ``tsea.csv`` and ``tsea.parquet``."""
        from saekit.analysis.tsea_page import write

        return write(self, folder)


@ambient()
@torch.no_grad()
def enrich(
    sae: SAEModule,
    sets: Mapping[str, Any],
    *,
    backend: ModelBackend,
    sites: Sites | Site | None = None,
    features: Sequence[int] | str = "skewed",
    k: int = 100,
    fractions: Tensor | None = None,
    permutations: int = 1000,
    min_size: int = MIN_SIZE,
    seed: int = 0,
    name: str = "the SAE",
    report: Report | None = None,
) -> Enrichment:
    """The enrichment of ``sets`` (ids of tokens by name) in what ``features`` add to the logits: ``W_dec W_U``.

    ``features`` are numbers, ``"all"``, or ``k`` of them: ``"skewed"`` are those whose logits are skewed most to the
    right, which promote a few tokens much; ``"random"`` are drawn by ``seed``, and either are such as fire, if the SAE
    says which do, or ``fractions [d_sae]``.  ``permutations`` random orders of the tokens, by ``seed``, say how often
    chance gives such a score; 0: none.  Sets of fewer than ``min_size`` tokens get no score.  ``report`` is told of
    rows that are done, see :func:`rows_of_work`.  Raises :class:`saekit.errors.ModelError` where nothing leads from
    what the SAE writes to the logits.
    """
    where = sae.info.sites if sites is None else sites
    if where is None:
        raise ConfigError([("site", "is missing: the SAE does not say where in the model it belongs")])
    path = logit_path(sae, backend, where)
    if isinstance(path, str):
        raise ModelError(f"no token set can be enriched: {path}")
    known = checked_sets(sets, path.unembedding.shape[1])
    fired = firing_fractions(sae) if fractions is None else checked_fractions(fractions, sae, name)
    numbers = _chosen(sae, path, features, k, seed, fired, report)
    how = features if isinstance(features, str) else "by number"
    about = {"model": backend.name, "site": where.name, "features": how, "seed": seed}

    def rows(some: Sequence[int]) -> NDArray[np.float32]:
        directions = feature_directions(sae, torch.tensor([*some], dtype=torch.long, device=sae.device))
        return path.logits(directions.to(path.unembedding.device)).float().cpu().numpy()

    return enrichment_of(
        rows, numbers, known, d_vocab=path.unembedding.shape[1], permutations=permutations, min_size=min_size,
        seed=seed, name=name, about=about, report=report,
    )  # fmt: skip


def enrichment_of(
    rows: Callable[[Sequence[int]], NDArray[np.float32]],
    features: Sequence[int],
    sets: Mapping[str, Any],
    *,
    d_vocab: int,
    permutations: int = 1000,
    min_size: int = MIN_SIZE,
    seed: int = 0,
    name: str = "",
    about: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> Enrichment:
    """The same of any numbers that features have of tokens: ``rows`` gives ``[n, d_vocab]`` of some of ``features``."""
    check_numbers(permutations, min_size)
    known = checked_sets(sets, d_vocab)
    left_out = {name: why for name, ids in known.items() if (why := why_no_score(ids, d_vocab, min_size)) is not None}
    if len(left_out) == len(known):
        told = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ConfigError([("sets", f"has none that can be scored ({told})")])
    looked = {name: ids[: 0 if name in left_out else None] for name, ids in known.items()}  # what is empty has no score
    signed = np.empty((len(known), len(features)))
    for begin in range(0, len(features), _AT_ONCE):
        some = features[begin : begin + _AT_ONCE]
        signed[:, begin : begin + len(some)] = enrichment_scores(rows(some), looked).signed
        if report is not None:
            report(len(some))
    flat = np.isnan(signed).all(0)
    left_out |= {f"feature {features[place]}": _FLAT for place in np.flatnonzero(flat).tolist()}
    scores = Scores(np.abs(signed), signed)
    p = None
    if permutations:
        p = p_values(
            scores.unsigned,
            [*looked.values()],
            d_vocab,
            permutations=permutations,
            seed=seed,
            report=report,
        )
    return Enrichment(
        name=name, features=tuple(features), sets=known, d_vocab=d_vocab, values=scores, p=p, left_out=left_out,
        permutations=permutations, logits=lambda feature: rows([feature])[0], about=dict(about or {}),
    )  # fmt: skip


def _chosen(
    sae: SAEModule,
    path: LogitPath,
    features: Sequence[int] | str,
    k: int,
    seed: int,
    fired: Tensor | None,
    report: Report | None = None,
) -> list[int]:
    check_features(features, k, sae.d_sae)
    if not isinstance(features, str):
        return list(dict.fromkeys(int(number) for number in features))
    if features == "all":
        return [*range(sae.d_sae)]
    live = torch.arange(sae.d_sae) if fired is None else fired.nonzero()[:, 0]
    if features == "random":
        order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
        return sorted(live[order[:k]].tolist())
    skewness = row_moments(
        lambda part: path.in_residual_stream(feature_directions(sae, part).to(path.unembedding.device)), sae.d_sae,
        path.unembedding, report=report,
    ).skewness.nan_to_num(-torch.inf)  # fmt: skip
    return live[skewness[live].argsort(descending=True, stable=True)[:k]].tolist()


def check_features(features: Sequence[int] | str, k: int, d_sae: int) -> None:
    """:class:`ConfigError` for what names no features of an SAE of so many."""
    if not isinstance(features, str):
        numbers = [int(number) for number in features]
        if wrong := [number for number in numbers if not 0 <= number < d_sae]:
            raise ConfigError([("features", f"are 0 to {d_sae - 1:,} of this SAE, found {wrong[0]}")])
        if not numbers:
            raise ConfigError([("features", "names none; give numbers of features, 'skewed', 'random' or 'all'")])
    elif features not in ("all", "skewed", "random"):
        told = f"must be numbers of features, 'skewed', 'random' or 'all', found {features!r}"
        raise ConfigError([("features", told)])
    elif features != "all" and (type(k) is not int or k < 1):
        raise ConfigError([("k", f"must be a whole number of 1 or more, found {k!r}")])


def rows_of_work(sae: SAEModule, features: Sequence[int] | str, k: int, permutations: int) -> int:
    """About how many rows of the vocabulary's length :func:`enrich` goes through, which is what it reports."""
    number = len(features) if not isinstance(features, str) else sae.d_sae if features == "all" else k
    return min(number, sae.d_sae) + permutations + (sae.d_sae if features == "skewed" else 0)


def chosen_sets(
    texts: Sequence[str],
    asked: Iterable[str] | None,
    *,
    regex: Mapping[str, str] | None = None,
    names: Iterable[str] | None = None,
    tagger: Any | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Sets by kinds and files in one list, as a command line has them."""
    kinds = None if asked is None else [one for one in asked if one in KINDS]
    files = [] if asked is None else [one for one in asked if one not in KINDS]
    found = token_sets(texts, kinds, regex=regex, names=names, tagger=tagger)
    check_asked(files, None)
    for file in files:
        found |= read_token_sets(file, texts)
    return found
