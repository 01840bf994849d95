"""Rows of true features fire as often, and together as often, as they were asked to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saekit import ConfigError
from saekit.toy import FeatureDraws, ToyConfig

ROWS = 20_000
RARE = 1e-7  # how improbable a count may be: what is tested is seeded, so this is no chance of failing


def is_likely(count: int, n: int, chance: float) -> bool:
    """Whether neither tail of the binomial distribution from ``count`` on is smaller than ``RARE``, exactly."""
    if chance in (0.0, 1.0):
        return count == n * chance
    k = np.arange(n + 1)
    choose = np.cumsum(np.concatenate([[0.0], np.log(n - k[:-1]) - np.log(k[:-1] + 1)]))
    mass = np.exp(choose + k * math.log(chance) + (n - k) * math.log1p(-chance))
    return bool(min(mass[: count + 1].sum(), mass[count:].sum()) > RARE)


def drawn(rows: int = ROWS, seed: int = 0, **options: object) -> torch.Tensor:
    return FeatureDraws(ToyConfig(**options)).draw(rows, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def test_the_bounds_are_those_of_a_binomial() -> None:
    assert is_likely(10_000, 20_000, 0.5)
    assert not is_likely(10_500, 20_000, 0.5)
    assert not is_likely(1, 20_000, 0.0)


@pytest.mark.parametrize("pairs", [{}, {"n_correlated_pairs": 1, "n_anticorrelated_pairs": 1}], ids=["none", "pairs"])
def test_fault_25_each_feature_fires_with_its_own_probability(pairs: dict[str, int]) -> None:
    chance = (0.3, 0.3, 0.6, 0.4, 0.01, 1.0)
    fires = (drawn(n_features=6, feature_probability=chance, **pairs) > 0).sum(0).tolist()
    assert all(is_likely(count, ROWS, p) for count, p in zip(fires, chance, strict=True)), fires


def test_features_alone_are_independent() -> None:
    fires = drawn(n_features=2, feature_probability=(0.5, 0.2)) > 0
    assert is_likely(int(fires.all(1).sum()), ROWS, 0.1)


def test_correlated_features_fire_together_and_with_sizes_of_their_own() -> None:
    x = drawn(n_features=3, feature_probability=0.2, n_correlated_pairs=1)
    assert torch.equal(x[:, 0] > 0, x[:, 1] > 0)
    both = x[x[:, 0] > 0]
    assert abs(torch.corrcoef(both[:, :2].T)[0, 1]) < 0.1
    assert is_likely(int((x[:, [0, 2]] > 0).all(1).sum()), ROWS, 0.04), "the third is not of the pair"


def test_anticorrelated_features_never_fire_together() -> None:
    fires = drawn(n_features=4, feature_probability=(0.5, 0.5, 0.9, 0.1), n_anticorrelated_pairs=2) > 0
    assert not (fires[:, 0] & fires[:, 1]).any()
    assert (fires[:, 0] | fires[:, 1]).all(), "together they are certain"
    assert is_likely(int(fires[:, 2].sum()), ROWS, 0.9)
    assert is_likely(int(fires[:, 3].sum()), ROWS, 0.1)


def test_sizes_are_uniform_above_zero() -> None:
    x = drawn(n_features=1, feature_probability=1.0, dtype="float64")[:, 0]
    assert x.dtype == torch.float64
    assert x.min() > 0
    assert x.max() <= 1
    assert all(is_likely(int((x <= edge).sum()), ROWS, edge) for edge in (0.1, 0.5, 0.9))


def test_the_same_seed_draws_the_same() -> None:
    assert torch.equal(drawn(100, 1), drawn(100, 1))
    assert not torch.equal(drawn(100, 1), drawn(100, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_correlated_pairs": 2, "n_anticorrelated_pairs": 1}, "2 correlated and 1 anticorrelated pairs are 6 "
         "features, and there are 5; ask for fewer pairs"),
        ({"n_correlated_pairs": 1, "feature_probability": (0.1, 0.2, 0.1, 0.1, 0.1)}, "is 0.1 for feature 0 and 0.2 "
         "for feature 1, a correlated pair: features that fire together fire equally often; give both the same"),
        ({"n_anticorrelated_pairs": 1, "feature_probability": 0.6}, "is 0.6 for feature 0 and 0.6 for feature 1, an "
         "anticorrelated pair: features that never fire together have at most 1 in sum"),
        ({"feature_probability": (0.1, 0.2)}, "has 2 numbers for 5 features; give one, or one for each"),
        ({"feature_probability": 0.0}, "feature_probability: must be above 0, at most 1, found 0.0"),
        ({"feature_probability": math.nan}, "feature_probability: must be above 0, at most 1, found nan"),
        ({"importance": (1, 1, 1, 1, -2)}, "importance: must be 0 or more, and finite, found -2"),
        ({"n_features": 0}, "n_features: must be 1 or more, found 0"),
        ({"steps": 5, "lr_decay_steps": 6}, r"warm-up \(0\) and decay \(6\) take more than the 5 steps"),
        ({"n_hidden": 1.5}, r"n_hidden: must be a whole number, found 1\.5"),
        ({"seed": True}, "seed: must be a whole number, found True"),
        ({"feature_probability": True}, "feature_probability: must be above 0, at most 1, found True"),
        ({"beta1": 1}, "beta1: must be at least 0 and below 1, found 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ToyConfig(**options)  # type: ignore[arg-type]
