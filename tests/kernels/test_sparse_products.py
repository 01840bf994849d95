"""Sparse products beside dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import random_features, seeded, sparse

import saekit.kernels.sparse as kernel
from saekit.kernels import SparseFeatures
from saekit.kernels.private_torch import entry_products


@given(
    n=st.integers(1, 9), d_sae=st.integers(1, 5000), d=st.integers(1, 5), density=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_sparse_products_are_the_dense_ones(n: int, d_sae: int, d: int, density: float, seed: int) -> None:
    dense = random_features(n, d_sae, density if d_sae < 100 else density / 50, seed)
    features = sparse(dense)
    decoder = torch.randn(d_sae, d, generator=seeded(seed), dtype=torch.float64)
    vectors = torch.randn(n, d, generator=seeded(seed + 5), dtype=torch.float64)
    assert torch.equal(features.dense(), dense)
    assert torch.allclose(features.decoded(decoder), dense @ decoder)
    products = features.inner_products(vectors, decoder)
    assert torch.allclose(products, (vectors @ decoder.T)[features.rows, features.features])
    out = torch.full((d_sae, d), torch.nan, dtype=torch.float64)
    features.add_outer_products(features.values, vectors, out, replace=True)
    features.add_outer_products(2 * features.values, vectors, out)
    assert torch.allclose(out, 3 * dense.T @ vectors)
    assert torch.allclose(features.sums(features.values), dense.sum(0))
    assert torch.allclose(features.row_sums(features.values), dense.sum(1))
    assert torch.equal(features.counts(), (dense > 0).sum(0))
    k = min(3, d_sae)
    values, numbers = features.top(k)
    expected = dense.topk(k, dim=1).values
    assert torch.equal(values, expected)
    assert torch.equal(numbers >= 0, expected > 0)
    assert torch.equal(dense.gather(1, numbers.clamp_min(0))[numbers >= 0], values[numbers >= 0])


def test_more_features_than_sixteen_bits_count() -> None:
    dense = random_features(3, (1 << 16) + 70, 0.001)
    vectors = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    out = torch.zeros(dense.shape[1], 4, dtype=torch.float64)
    sparse(dense).add_outer_products(sparse(dense).values, vectors, out)
    assert torch.allclose(out, dense.T @ vectors)
    assert out[1 << 16 :].any(), "features beyond"


@pytest.mark.parametrize("in_cache", [0, 1 << 22])
def test_inner_products_in_either_order(in_cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that the cache does not hold is read feature by feature."""
    monkeypatch.setattr(kernel, "IN_CACHE", in_cache)
    features = sparse(random_features(6, 50, 0.3))
    vectors, decoder = (torch.randn(n, 4, generator=seeded(n), dtype=torch.float64) for n in (6, 50))
    expected = (vectors @ decoder.T)[features.rows, features.features]
    asked = []
    monkeypatch.setattr(kernel, "entry_products", lambda *given: asked.append(len(given[0])) or entry_products(*given))
    assert torch.allclose(features.inner_products(vectors, decoder), expected, atol=1e-12)
    assert asked == [6 if in_cache else 50]


def test_groups_are_joined_in_order() -> None:
    parts = [random_features(n, 30, 0.2, seed=n) for n in (4, 1, 7)]
    joined = SparseFeatures.joined([sparse(part) for part in parts])
    assert torch.equal(joined.dense(), torch.cat(parts))
    assert joined.shape == (12, 30)
