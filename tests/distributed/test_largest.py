"""The largest of numbers on many processes are those of all numbers together; the processes are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.kernels import seeded
from torch import Tensor

import saekit.devices
from saekit.distributed.group import Group
from saekit.distributed.largest import sorted_keys
from saekit.distributed.share import Share
from saekit.distributed.sizes import FEW, OF_ALL, OF_ROWS, counts_sent
from saekit.kernels import Encoder, batch_top, top_groups
from saekit.kernels.encoder import CHUNK
from saekit.kernels.groups import _among_all
from saekit.kernels.sparse import SparseFeatures

DATA, FEATURES = 3, 2


class Told(Group):
    """A group of threads."""

    def __init__(self, rank: int, size: int, table: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier
        self.sent = 0

    def gather(self, value: Tensor) -> list[Tensor]:
        self.sent += value.nbytes
        self._table[self.rank] = value
        self._barrier.wait(10)
        found = [one for one in self._table if one is not None]
        self._barrier.wait(10)
        return found

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather(value)).sum(0)


def by_all(work: Callable[[Share, int, int], Tensor]) -> tuple[list[Tensor], int]:
    """What each process of the mesh makes of ``work``, in their order; and the bytes that one has given."""
    rows = [([None] * DATA, threading.Barrier(DATA)) for _ in range(FEATURES)]
    features = [([None] * FEATURES, threading.Barrier(FEATURES)) for _ in range(DATA)]
    shares = [
        Share(Told(d, DATA, *rows[f]), Told(f, FEATURES, *features[d]), (1,) * DATA)
        for d in range(DATA)
        for f in range(FEATURES)
    ]
    with ThreadPoolExecutor(len(shares)) as pool:
        found = pool.map(lambda number: work(shares[number], *divmod(number, FEATURES)), range(len(shares)))
        results = [*found]
    return results, sum(group.sent for group in (shares[0].rows, shares[0].features) if isinstance(group, Told))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [0, 1, 57, 180, 10_000])
def test_those_of_all_are_found_and_the_first_of_equal_ones(dtype: torch.dtype, wanted: int) -> None:
    generator = torch.Generator().manual_seed(wanted)
    lengths = [40, 0, 30, 31, 50, 100]
    parts = [(torch.randn(n, generator=generator) * 3).round().div(3).to(dtype) for n in lengths]  # with many ties
    whole = torch.cat(parts)
    order = torch.sort(whole, descending=True, stable=True).indices[:wanted]
    expected = torch.zeros(len(whole), dtype=torch.bool).scatter_(0, order, True)
    chosen, _ = by_all(lambda share, d, f: share.largest_of_all(parts[d * FEATURES + f], wanted))
    assert torch.equal(torch.cat(chosen), expected)


def test_what_is_sent_does_not_depend_on_the_number_of_candidates() -> None:
    sent = [by_all(lambda share, d, f, n=n: share.largest_of_all(torch.rand(n), n // 2))[1] for n in (10, 10_000)]  # type: ignore[misc]
    assert sent[0] == sent[1] == 2 * 8 * counts_sent(32, OF_ALL) + 4 * (1 + FEATURES)


@pytest.mark.parametrize("k", [5, FEW + 1], ids=["told", "counted"])
def test_those_of_each_row_are_found(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    parts = torch.randn(DATA * FEATURES, 7, 2 * k, generator=generator).mul(9).round() / 9 + 0.0
    parts += torch.rand(parts.shape, generator=generator) / 1000 if k < FEW else 0  # with ties where they are ordered
    chosen, sent = by_all(lambda share, d, f: share.among_largest(parts[d * FEATURES + f], k))
    for d in range(DATA):
        whole = torch.cat([parts[d * FEATURES + f] for f in range(FEATURES)], -1)
        order = torch.sort(whole, descending=True, stable=True, dim=-1).indices[:, :k]
        expected = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, order, True)
        assert torch.equal(torch.cat(chosen[d * FEATURES : (d + 1) * FEATURES], -1), expected)
    assert sent == 7 * 4 * (2 * k if k < FEW else counts_sent(32, OF_ROWS) + 1)


def test_what_is_no_number_is_above_all() -> None:
    nan = torch.tensor(torch.nan)
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, torch.inf, torch.nan])
    keys = sorted_keys(values)
    assert keys[2] == keys[3]
    assert (keys.diff() >= 0).all()
    assert torch.equal(sorted_keys(torch.stack([nan, nan.copysign(torch.tensor(-1.0))])), keys[-1:].expand(2))
    parts = [torch.full((4,), float(number)) for number in range(DATA * FEATURES)]
    parts[1][2] = torch.nan
    chosen, _ = by_all(lambda share, d, f: share.largest_of_all(parts[d * FEATURES + f], 1))
    assert [int(one.sum()) for one in chosen] == [0, 1, 0, 0, 0, 0]


def test_what_is_no_number_is_among_the_largest_entries_of_each_row() -> None:
    """So that the loss is none, as in one process, and the run ends."""
    rows = torch.tensor([0, 0, 1])
    found = SparseFeatures(rows, torch.tensor([1, 3, 2]), torch.tensor([1.0, torch.nan, 2.0]), 2, 4)
    kept = _among_all(found, 1, Share())
    assert kept.features.tolist() == [3, 2]
    assert kept.values.isnan().tolist() == [True, False]


def test_on_a_device_too_where_there_are_more_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which own ones are as many as there could be, found chunk by chunk."""
    monkeypatch.setattr(saekit.devices, "AT_HAND", frozenset())
    n, d_sae, k = CHUNK + 40, 6, 2
    weights, bias = torch.randn(5, FEATURES * d_sae, generator=seeded(), dtype=torch.float64), torch.zeros(1)
    x = [torch.randn(n, 5, generator=seeded(1 + d), dtype=torch.float64) * (1 + d) for d in range(DATA)]
    scale = torch.rand(FEATURES * d_sae, generator=seeded(9), dtype=torch.float64) + 0.5
    whole = torch.cat(x) @ weights

    def found(share: Share, d: int, f: int, wanted: int) -> Tensor:
        own = slice(f * d_sae, (f + 1) * d_sae)
        encoder, share = Encoder(weights[:, own].contiguous(), bias.expand(d_sae).double()), share_of(share)
        if wanted:
            return batch_top(encoder, x[d], wanted, scale=scale[own], share=share).dense()
        groups = [group for _, group in top_groups(encoder, x[d], k, scale=scale[own], share=share)]
        assert all(len(group) < k * group.n for group in groups), "those of other processes are not among them"
        return torch.cat([group.dense() for group in groups])

    def share_of(share: Share) -> Share:
        return Share(share.rows, share.features, (n,) * DATA)

    for wanted in (0, 700, 10**6):
        parts, _ = by_all(lambda share, d, f, wanted=wanted: found(share, d, f, wanted))  # type: ignore[misc]
        rows = [torch.cat(parts[d * FEATURES : (d + 1) * FEATURES], 1) for d in range(DATA)]
        compared = (whole * scale).relu()
        flat = compared if not wanted else compared.reshape(1, -1)
        values, places = flat.topk(min(wanted or k, flat.shape[1]), dim=1)
        mask = torch.zeros_like(flat).scatter_(1, places, values).reshape(compared.shape) > 0
        torch.testing.assert_close(torch.cat(rows), whole * mask)


def test_what_is_no_number_is_among_them_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saekit.devices, "AT_HAND", frozenset())
    found = SparseFeatures(torch.tensor([0, 1]), torch.tensor([3, 2]), torch.tensor([torch.nan, 2.0]), 2, 4)
    assert _among_all(found, 1, Share()).values.isnan().tolist() == [True, False]
