"""Token set enrichment: where the tokens of a set lie in a feature's order of the vocabulary.

The tokens are put in order, those with the largest logits first.  A running sum goes up by ``1/m`` at each of the
``m`` tokens of the set, and down by ``1/(V − m)`` at each of the others; the score is the largest distance from 0 that
it comes to (Subramanian et al. 2005, "Gene set enrichment analysis", with equal weights), which is the two-sample
statistic of Kolmogorov and Smirnov.  With the ranks ``r_0 < r_1 < …`` of the set's tokens, the sum is
``i/m − (r_i − i)/(V − m)`` just before the i-th and ``1/m`` more just behind it, and these are all the places where it
can be furthest from 0.  So the ranks are enough, and whole numbers are: times ``m (V − m)``, it is ``i V − r_i m``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError

__all__ = ["Scores", "checked_sets", "enrichment_scores", "p_values", "running_sum", "why_no_score"]

_BLOCK = 16
"""Features at a time: their ranks are 50,000 numbers each."""
_FEW = 20
"""The ranks of a set of less than this part of the vocabulary are sorted; of others, they are marked and looked up."""

Ids = NDArray[np.int64]


@attrs.frozen(eq=False)
class Scores:
    """Of each set and each feature, float64 ``[sets, features]``; NaN where there is none."""

    unsigned: NDArray[np.float64]
    """From 0 to 1."""
    signed: NDArray[np.float64]
    """The same, below 0 where the set's tokens lie at the end: the feature suppresses them."""


def checked_sets(sets: Mapping[str, Any], d_vocab: int) -> dict[str, Ids]:
    """Each set as sorted ids without repetition, new arrays; :class:`ConfigError` for what are no ids of tokens."""
    found = {}
    for name, given in sets.items():
        ids = np.asarray(given.tolist() if hasattr(given, "tolist") else list(given))
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise ConfigError([("sets", f"{name!r} must be ids of tokens, found {ids.dtype} {list(ids.shape)}")])
        ids = np.unique(ids.astype(np.int64))
        if len(ids) and (ids[0] < 0 or ids[-1] >= d_vocab):
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            raise ConfigError(
                [("sets", f"{name!r} has the id {wrong}; those of the vocabulary are 0 to {d_vocab - 1:,}")]
            )
        found[str(name)] = ids
    if not found:
        raise ConfigError([("sets", "names none; give a mapping of names to ids of tokens")])
    return found


def why_no_score(ids: Ids, d_vocab: int, min_size: int = 1) -> str | None:
    """Why a set has no score, in words; None: it has one."""
    if not len(ids):
        return "no token of the vocabulary is in it"
    if len(ids) < min_size:
        return f"its size is {len(ids)}, and sets of fewer than {min_size} tokens are not scored (min_size)"
    return "every token of the vocabulary is in it" if len(ids) == d_vocab else None


def enrichment_scores(logits: Any, sets: Mapping[str, Ids], *, report: Callable[[int], None] | None = None) -> Scores:
    """The scores of ``sets`` in ``logits [features, V]``, none of which is changed.

    Of tokens with equal logits the one with the smaller id comes first.  Empty sets, sets of all tokens, and features
    whose logits are all the same have NaN.  ``report`` is told of features that are done.
    """
    values = np.asarray(logits)
    d_vocab = values.shape[1]
    known = checked_sets(sets, d_vocab)
    looked = [None if why_no_score(ids, d_vocab) else ids for ids in known.values()]
    signed = np.full((len(known), len(values)), np.nan)
    for begin in range(0, len(values), _BLOCK):
        block = values[begin : begin + _BLOCK]
        ranks = _ranks(stable_order(block))
        flat = block.min(1) == block.max(1)
        for place, ids in enumerate(looked):
            if ids is not None:
                signed[place, begin : begin + len(block)] = np.where(flat, np.nan, _furthest(ranks, ids))
        if report is not None:
            report(len(block))
    return Scores(np.abs(signed), signed)


def stable_order(values: NDArray[Any]) -> NDArray[np.int64]:
    """``[n, V]``: the columns of each row, largest value first, and of equal ones the first first.

    Of float32, value and column make one whole number, which any sort leaves in that order; the quickest takes it.
    """
    if not np.isfinite(values).all():
        raise ConfigError([("logits", "must be finite, found NaN or infinite ones")])
    if values.dtype.kind == "f" and values.dtype.itemsize > 4:
        return np.argsort(-values, axis=1, kind="stable")
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0 now
    negative = (bits >> 31).astype(bool)
    falling = np.where(negative, bits, ~(bits | np.uint32(1 << 31)))  # as whole numbers in the reverse order
    keys = (falling.astype(np.uint64) << np.uint64(32)) | np.arange(values.shape[1], dtype=np.uint64)[None]
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).view(np.int64)


def _ranks(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[n, V]``: the place of each column in the order of its row."""
    ranks, places = np.empty_like(order), np.arange(order.shape[1])
    for row, own in zip(ranks, order, strict=True):
        row[own] = places
    return ranks


def _hits(ranks: NDArray[np.int64], ids: Ids) -> NDArray[np.int64]:
    """``[n, m]``: the ranks of the tokens ``ids``, in order."""
    if len(ids) * _FEW < ranks.shape[1]:
        return np.sort(ranks[:, ids], axis=1)
    found = np.empty((len(ranks), len(ids)), dtype=np.int64)
    marked = np.zeros(ranks.shape[1], dtype=bool)
    for row, own in zip(ranks, found, strict=True):
        marked[row.take(ids)] = True
        own[:] = np.flatnonzero(marked)
        marked[:] = False
    return found


def _furthest(ranks: NDArray[np.int64], ids: Ids) -> NDArray[np.float64]:
    """``[n]``: what the running sum is where it is furthest from 0; where both ways are as far, above."""
    d_vocab, size = ranks.shape[1], len(ids)
    others = d_vocab - size
    sums = np.arange(size, dtype=np.int64) * d_vocab - _hits(ranks, ids) * size
    up, down = sums.max(1) + others, sums.min(1)
    found: NDArray[np.float64] = np.where(up >= -down, up, down) / (size * others)
    return found


def running_sum(values: NDArray[Any], ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The running sum of one feature and one set, as the corners of its line.

    At each of the first numbers, how many tokens have been passed, it has the second; both begin and end with 0.
    """
    order = stable_order(values[None])
    mask = np.zeros(values.shape[0], dtype=bool)
    mask[ids] = True
    hits = np.flatnonzero(mask[order[0]])
    size, others = len(hits), len(values) - len(hits)
    before = (np.arange(size) * len(values) - hits * size) / (size * others)
    passed = np.stack([hits, hits + 1], axis=1).reshape(-1)
    sums = np.stack([before, before + 1 / size], axis=1).reshape(-1)
    return np.concatenate([[0], passed, [len(values)]]), np.concatenate([[0.0], sums, [0.0]])


def p_values(
    scores: NDArray[np.float64],
    sets: Sequence[Ids],
    d_vocab: int,
    *,
    permutations: int,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """``[sets, features]``: how often tokens in a random order give the score or a higher one, ``(1 + k) / (1 + n)``.

    The order of tokens is permuted ``permutations`` times, for all sets alike.  A random order is as random whatever
    feature it is drawn for, so all features are compared with the same ones.  (Phipson and Smyth 2010, "Permutation
    p-values should never be zero", have the 1.)
    """
    looked = [None if why_no_score(ids, d_vocab) else ids for ids in sets]
    found = np.full(scores.shape, np.nan)
    drawn = np.empty((len(sets), permutations))
    generator = np.random.default_rng(seed)
    for begin in range(0, permutations, _BLOCK):
        number = min(_BLOCK, permutations - begin)
        ranks = generator.permuted(np.tile(np.arange(d_vocab), (number, 1)), axis=1)
        for place, ids in enumerate(looked):
            if ids is not None:
                drawn[place, begin : begin + number] = np.abs(_furthest(ranks, ids))
        if report is not None:
            report(number)
    for place, ids in enumerate(looked):
        if ids is not None:
            null = np.sort(drawn[place])
            at_least = permutations - np.searchsorted(null, scores[place] * (1 - 1e-12), side="left")
            found[place] = np.where(np.isnan(scores[place]), np.nan, (1 + at_least) / (1 + permutations))
    return found
