"""What token set enrichment has found of an SAE: scores, chance, tables, and running sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.analysis.enrichment import Scores, running_sum
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Scored", "q_values"]


@attrs.frozen(eq=False, kw_only=True)
class Scored:
    """The scores of sets of tokens in features, with what is needed to draw them."""

    name: str
    """Of the SAE."""
    features: tuple[int, ...]
    sets: Mapping[str, NDArray[np.int64]]
    """Sorted ids of tokens."""
    d_vocab: int
    values: Scores
    p: NDArray[np.float64] | None
    """``[sets, features]``; None where nothing was permuted."""
    permutations: int
    left_out: Mapping[str, str]
    """Why there is no score, by the name of the set, or by ``feature N``."""
    logits: Callable[[int], NDArray[np.float32]] = attrs.field(repr=False)
    """``[V]`` of a feature."""
    about: Mapping[str, Any] = attrs.field(factory=dict)
    """What was asked of what: model, site, how features were chosen."""

    @property
    def scores(self) -> DataFrame:
        """Sets by features: from 0 to 1."""
        return self._frame(self.values.unsigned)

    @property
    def signed_scores(self) -> DataFrame:
        """Sets by features: below 0 where the feature suppresses the set."""
        return self._frame(self.values.signed)

    def _frame(self, values: Any) -> DataFrame:
        import pandas as pd

        index, columns = pd.Index([*self.sets], name="set"), pd.Index(self.features, name="feature")
        return pd.DataFrame(values, index=index, columns=columns)

    def heights(self) -> NDArray[np.float64]:
        """``[sets, features]``: ``−ln(1 − score)``, of a score of 1 as of ``1 − 1/V``, so that it has an end."""
        found: NDArray[np.float64] = -np.log(np.maximum(1 - self.values.unsigned, 1 / self.d_vocab))
        return found

    def table(self) -> DataFrame:
        """A row for each set and feature: size of the set, scores, height, and where tokens were permuted ``p`` and
        ``q``, which is what Benjamini and Hochberg make of all ``p`` of the table.

        What has no score is NaN; ``attrs["left_out"]`` says why.
        """
        import pandas as pd

        many, names = len(self.features), [*self.sets]
        sizes = [len(ids) for ids in self.sets.values()]
        values: dict[str, Any] = {
            "set": pd.Categorical(np.repeat(names, many), categories=names),
            "size": np.repeat(sizes, many),
            "feature": np.tile(np.array(self.features), len(names)),
            "score": self.values.unsigned.reshape(-1),
            "signed_score": self.values.signed.reshape(-1),
            "height": self.heights().reshape(-1),
        }
        if self.p is not None:
            values |= {"p": self.p.reshape(-1), "q": q_values(self.p).reshape(-1)}
        table = pd.DataFrame(values)
        table.attrs["left_out"] = dict(self.left_out)
        return table

    def at_the_floor(self) -> str | None:
        """How many ``p`` are the least that so many random orders can give, in words; None: none is."""
        floor = 1 / (1 + self.permutations)
        number = 0 if self.p is None else int((self.p <= floor * (1 + 1e-9)).sum())
        return (
            f"{number:,} p are {floor:.2g}, the least that {self.permutations:,} orders can give." if number else None
        )

    def strongest(self, n: int = 10) -> tuple[int, ...]:
        """The ``n`` features with the least likely score in some set; of those alike, or without ``p``, the highest."""
        best = np.nan_to_num(self.values.unsigned, nan=-1.0)
        least = np.zeros(best.shape[1]) if self.p is None else np.nan_to_num(self.p, nan=2.0).min(0)
        if self.p is not None:
            best = np.where(self.p <= least, best, -1.0)
        highest = best.max(0)
        order = np.lexsort((-highest, least))[:n]
        return tuple(self.features[place] for place in order if highest[place] >= 0)

    def running_sums(self, feature: int, sets: Sequence[str] | int = 5) -> dict[str, tuple[Any, Any]]:
        """By set the corners of its running sum in one feature; of those named, or the so many with the highest."""
        if feature not in self.features:
            raise ConfigError([("feature", f"{feature} is not among the {len(self.features):,} that were scored")])
        own = self.values.unsigned[:, self.features.index(feature)]
        names = [*self.sets]
        if isinstance(sets, int):
            chosen = [names[place] for place in np.argsort(-np.nan_to_num(own, nan=-1.0), kind="stable")[:sets]]
        else:
            chosen = list(sets)
            if unknown := [name for name in chosen if name not in self.sets]:
                raise ConfigError([("sets", f"has no {unknown[0]!r}; there are {', '.join(names)}")])
        row = self.logits(feature)
        return {name: running_sum(row, self.sets[name]) for name in chosen if not np.isnan(own[names.index(name)])}


def q_values(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """``p`` as the share of false findings among those that are no larger, over all of it; NaN stays.

    Benjamini and Hochberg (1995), "Controlling the false discovery rate".
    """
    found = np.full(p.shape, np.nan)
    there = ~np.isnan(p)
    flat = p[there]
    if len(flat):
        order = np.argsort(flat, kind="stable")
        raised = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
        smallest = np.minimum.accumulate(raised[::-1])[::-1]
        back = np.empty_like(flat)
        back[order] = np.minimum(smallest, 1)
        found[there] = back
    return found
