"""The order of a cache's rows: a permutation for every length, seed and block, and one that mixes."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.data.cache import RowOrder, order

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.integers(0, 600)
BLOCKS = st.integers(1, 70)
WINDOWS = st.sampled_from([2, 3, 7, 4096])  # blocks that are mixed together: 4,096, but for these tests

# A handful of rows takes longest: in the network's smallest domain, most of what they are sent to is no row.
few = settings(max_examples=50)


def windows_of(blocks: int) -> mock._patch[int]:
    return mock.patch.object(order, "_BLOCKS_MIXED", blocks)


def chi_square(counts: npt.NDArray[np.int64]) -> float:
    """How far counts are from all being alike, in standard deviations of what chance does."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@few
@given(LENGTHS, SEEDS, BLOCKS, WINDOWS)
def test_every_row_once(n: int, seed: int, block: int, window: int) -> None:
    with windows_of(window):
        rows = RowOrder(n, seed, block)
        assert len(rows) == n
        found = rows.rows(0, n)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


@few
@given(LENGTHS, SEEDS, BLOCKS, WINDOWS, st.lists(st.integers(0, 600), max_size=6))
def test_slices_are_of_the_whole(n: int, seed: int, block: int, window: int, cuts: list[int]) -> None:
    with windows_of(window):
        whole = RowOrder(n, seed, block).rows(0, n)
        rows = RowOrder(n, seed, block)
        for one, other in itertools.pairwise(cuts):  # in any order, so windows are left and entered again
            start, stop = sorted((min(one, n), min(other, n)))
            assert np.array_equal(rows.rows(start, stop), whole[start:stop])
        single = [rows.rows(position, position + 1)[0] for position in range(0, n, 53)]
    assert single == whole[::53].tolist()


@few
@given(st.integers(30, 600), SEEDS, SEEDS, BLOCKS)
def test_the_seed_decides(n: int, one: int, other: int, block: int) -> None:
    first = RowOrder(n, one, block).rows(0, n)
    assert np.array_equal(first, RowOrder(n, one, block).rows(0, n))
    if one != other:
        assert not np.array_equal(first, RowOrder(n, other, block).rows(0, n))
    assert not np.array_equal(first, np.arange(n))


@few
@given(st.integers(1, 600), SEEDS, st.integers(2, 70), st.sampled_from([2, 3, 7]))
def test_blocks_stay_together(n: int, seed: int, block: int, window: int) -> None:
    """What a stretch of the order reads is whole blocks, so storage reads neighbors."""
    with windows_of(window):
        found = RowOrder(n, seed, block).rows(0, n)
    length, blocks = window * block, n // block
    for start in range(0, max(blocks - 1, 0) // window * length, length):  # the last one has the odd rows, too
        numbers, sizes = np.unique(found[start : start + length] // block, return_counts=True)
        assert len(numbers) == window
        assert set(sizes.tolist()) == {block}


def test_the_order_does_not_change_between_versions() -> None:
    """A run that was saved must go on with the very same batches."""
    assert RowOrder(1000, 1).rows(0, 8).tolist() == [132, 522, 263, 168, 676, 543, 313, 616]
    assert RowOrder(1000, 1, 16).rows(0, 8).tolist() == [0, 37, 928, 15, 348, 683, 566, 876]
    assert RowOrder(10**12, 7).rows(5, 8).tolist() == [728206369721, 179881685892, 616393793178]


def test_any_length_needs_no_memory() -> None:
    n = 10**15
    rows = RowOrder(n, 5)
    found = rows.rows(n - 100_000, n)
    assert len(np.unique(found)) == 100_000
    assert found.min() >= 0
    assert found.max() < n
    assert abs(chi_square(np.bincount(found // (n // 100), minlength=100)[:100])) < 4
    blocks = RowOrder(n, 5, 64).rows(n // 2, n // 2 + 300_000)
    assert len(np.unique(blocks)) == 300_000
    assert blocks.max() < n


def test_every_permutation_is_as_likely() -> None:
    counts: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(20 * len(counts)):
        counts[tuple(RowOrder(4, seed).rows(0, 4).tolist())] += 1
    assert abs(chi_square(np.array(list(counts.values())))) < 4


@pytest.mark.parametrize(("n", "block"), [(16, 1), (100, 1), (257, 1), (100, 8)])
def test_every_row_is_as_likely_anywhere(n: int, block: int) -> None:
    """At each position each row; and after each row each other one, so neighbors tell nothing either."""
    orders = np.array([RowOrder(n, seed, block).rows(0, n) for seed in range(600)])
    at = np.zeros((n, n), dtype=np.int64)
    after = np.zeros((n, n), dtype=np.int64)
    for found in orders:
        at[np.arange(n), found] += 1
        after[found[:-1], found[1:]] += 1
    assert abs(chi_square(at)) < 4
    assert abs(chi_square(after[~np.eye(n, dtype=bool)])) < 4


def test_neighbors_in_the_cache_are_far_apart() -> None:
    n = 100_000
    position = np.argsort(RowOrder(n, 3).rows(0, n))
    assert abs(chi_square(np.bincount(np.diff(position) % n * 50 // n, minlength=50))) < 4
    # A batch has rows from everywhere.
    assert abs(chi_square(np.bincount(RowOrder(n, 3).rows(7000, 8000) * 20 // n, minlength=20))) < 4


@settings(max_examples=20)
@given(SEEDS)
def test_two_readings_have_nothing_in_common(seed: int) -> None:
    n = 4000
    one, other = RowOrder(n, seed).rows(0, n), RowOrder(n, seed + 1).rows(0, n)
    assert (one == other).sum() < 12, "about one in a random pair"
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
