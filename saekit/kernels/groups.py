"""The largest pre-activations: ``k`` of each row, or as many of a whole batch.

As in :mod:`saekit.kernels.encoder`, rows go through in chunks, and without autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from saekit.devices import at_hand
from saekit.distributed.share import WHOLE, Share
from saekit.kernels.encoder import CHUNK, PROBE, Encoder, Pending, active_entries, at_places
from saekit.kernels.largest import largest_of_each_row, largest_of_groups, number_of_groups
from saekit.kernels.places import at_least, places_where
from saekit.kernels.screen import Screen
from saekit.kernels.sparse import SparseFeatures

__all__ = ["batch_top", "top_entries", "top_groups"]


def top_groups(
    encoder: Encoder,
    rows: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    screen: Screen | None = None,
    share: Share = WHOLE,
) -> Iterator[tuple[int, SparseFeatures]]:
    """The pre-activations of ``rows [n, d_in]`` that are above zero and among their row's ``k`` largest, in groups.

    ``scale [d_sae]``, above zero, multiplies pre-activations before they are compared; the values are without it.
    ``screen`` is one for the same scale.  Where features are split, ``share`` says how; of all, own ones are given.
    """
    chunks = _top_of_chunks(encoder, rows, k, scale, screen)
    if share.parts > 1:
        yield from _top_of_all(chunks, k, encoder.entries // (k * CHUNK) or 1, scale, share)
        return
    pending = Pending(encoder)
    for start, found in chunks:
        yield from pending.add(start, _unscaled(found, scale))
    yield from pending.flush()


def _top_of_chunks(
    encoder: Encoder, rows: Tensor, k: int, scale: Tensor | None, screen: Screen | None
) -> Iterator[tuple[int, SparseFeatures]]:
    """Own ones, scaled, of each chunk with its first row."""
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        found = screen.top(part, k) if screen is not None and len(part) > PROBE else None
        if found is None:
            screen = None  # it would refuse the others, too
            found = top_entries(encoder.pre_activations(part, scale), k)
        yield start, found


def _top_of_all(
    chunks: Iterator[tuple[int, SparseFeatures]], k: int, together: int, scale: Tensor | None, share: Share
) -> Iterator[tuple[int, SparseFeatures]]:
    """The same, of which other processes have other features: so many chunks ``together``, whoever has how many
    entries, so that all ask each other at the same rows."""
    while some := [*islice(chunks, together)]:
        found = SparseFeatures.joined([chunk for _, chunk in some])
        yield some[0][0], _unscaled(_among_all(found, k, share), scale)


def _among_all(found: SparseFeatures, k: int, share: Share) -> SparseFeatures:
    """Of own entries, the largest of each row, those that are among the ``k`` largest of all features."""
    if not at_hand(found.values.device):  # as many of each row: see top_entries
        return _those(found, share.among_largest(found.values.view(found.n, -1), k).reshape(-1))
    values, numbers = found.padded(k)
    keep = torch.zeros(len(found), dtype=torch.bool, device=values.device)
    keep[numbers[share.among_largest(values, k) & (values != -torch.inf)]] = True
    return found.kept(keep)


def _those(candidates: SparseFeatures, among: Tensor) -> SparseFeatures:
    """Of own ``candidates``, of which as many are there as there could be, those that are ``among [entries]`` the
    largest of all processes, and not zero.

    This waits for the device, once, to know how many they are: with zeros in the place of the others, every process
    would make as many products as one that has all features or all rows.
    """
    return candidates.kept(among & ~(candidates.values <= 0))


def batch_top(
    encoder: Encoder,
    rows: Tensor,
    wanted: int,
    *,
    scale: Tensor | None = None,
    screen: Screen | None = None,
    share: Share = WHOLE,
) -> SparseFeatures:
    """The ``wanted`` largest pre-activations of all ``rows [n, d_in]`` together that are above zero.

    ``scale [d_sae]``, above zero, multiplies pre-activations before they are compared; the values are without it.
    ``screen`` is one without it.  Of equal ones at the threshold, the first are taken.  Where rows or features are
    split, ``share`` says how, and ``wanted`` are those of all; own ones are given.
    """
    if not at_hand(rows.device):
        found = _as_many(encoder, rows, wanted, scale, CHUNK if share.split else max(len(rows), 1))
        if share.split:
            found = _those(found, share.largest_of_all(found.values, wanted))
        return _unscaled(found, scale)
    found = _candidates(encoder, rows, wanted, scale, screen, share)
    if share.split:
        return found.kept(share.largest_of_all(found.scaled(scale).values, wanted))
    return found if len(found) <= wanted else found.kept(_largest(found.scaled(scale).values, wanted))


def _candidates(
    encoder: Encoder, rows: Tensor, wanted: int, scale: Tensor | None, screen: Screen | None, share: Share
) -> SparseFeatures:
    """Own ones above a cut that is the same for all processes: of all together, some more than are ``wanted``, or all
    that are above zero."""
    probe, whole = rows[:PROBE], share.n(len(rows)) * share.parts
    for excess in (1.5, 6.0, None):  # a cut that leaves too few was too high; the first rows were not like the others
        cut = 0.0 if excess is None else _cut(encoder, probe, scale, excess * wanted * len(probe) / whole)
        if share.split and excess is not None:
            cuts = share.sum_of_all(torch.tensor(cut, dtype=torch.float64, device=rows.device))
            cut = float(cuts) / (share.rows.size * share.parts)
        found = _above(encoder, rows, cut if scale is None else cut / scale, screen)
        there = len(found)
        if share.split and cut:
            there = int(share.sum_of_all(torch.tensor(there, device=rows.device)))
        if cut == 0 or there >= wanted:
            break
    return found


def _cut(encoder: Encoder, rows: Tensor, scale: Tensor | None, wanted: float) -> float:
    """What about ``wanted`` scaled pre-activations of ``rows`` reach; 0 if fewer are above zero."""
    pre = encoder.pre_activations(rows, scale)
    values = pre[~(pre <= 0)]
    return 0.0 if len(values) <= wanted else float(values.kthvalue(len(values) - int(wanted)).values)


def _above(encoder: Encoder, rows: Tensor, above: Tensor | float, screen: Screen | None) -> SparseFeatures:
    groups = []
    for part in rows.split(CHUNK):
        found = screen.active(part, above) if screen is not None and len(part) > PROBE else None
        if found is None:
            screen = None  # it would refuse the others, too
            found = active_entries(encoder.product(part), encoder.b_enc, above)
        assert found is not None
        groups.append(found)
    return SparseFeatures.joined(groups)


def _largest(values: Tensor, wanted: int) -> Tensor:
    """Where the ``wanted`` largest of ``values`` are, the first of equal ones: a mask."""
    if not wanted:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(len(values) - wanted + 1).values
    keep = ~(values <= threshold)
    ties = (values == threshold).nonzero().squeeze(1)
    keep[ties[: max(wanted - int(keep.sum()), 0)]] = True
    return keep


def _as_many(encoder: Encoder, rows: Tensor, wanted: int, scale: Tensor | None, at_once: int) -> SparseFeatures:
    """Without waiting for the device: ``wanted`` entries, or all, of which some may be zero; scaled.

    So many rows are looked at ``at_once``.
    """
    values, flat = rows.new_empty(0), torch.empty(0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), at_once):
        pre = encoder.pre_activations(rows[start : start + at_once], scale).view(-1)
        largest = pre.topk(min(wanted, pre.numel()), sorted=False)
        if not start:
            values, flat = largest
            continue
        values = torch.cat([values, largest.values])
        flat = torch.cat([flat, largest.indices + start * encoder.d_sae])
        values, best = values.topk(min(wanted, len(values)), sorted=False)
        flat = flat.index_select(0, best)
    flat, order = flat.sort()
    places = torch.div(flat, encoder.d_sae, rounding_mode="floor")
    values = values.index_select(0, order).clamp_min(0)
    return SparseFeatures(places, flat - places * encoder.d_sae, values, len(rows), encoder.d_sae)


def _unscaled(found: SparseFeatures, scale: Tensor | None) -> SparseFeatures:
    return found if scale is None else found.with_values(found.values / scale.index_select(0, found.features))


def top_entries(pre: Tensor, k: int) -> SparseFeatures:
    """The ``k`` largest entries of each row of ``pre [n, d_sae]`` that are above zero.

    On a device that is not a CPU, which is not waited for, there are ``k`` of each row, of which some may be zero.
    """
    n, d_sae = pre.shape
    if not at_hand(pre.device):
        values, features = pre.topk(k, dim=1, sorted=False)
        rows = torch.arange(n, device=pre.device).repeat_interleave(k, output_size=n * k)
        return SparseFeatures(rows, features.reshape(-1), values.reshape(-1).clamp_min(0), n, d_sae)
    bound = kth_largest_bound(pre, k)
    if bound is None or bool(bound.isnan().any()):
        values, features = pre.topk(k, dim=1, sorted=False)
        rows = torch.arange(n, device=pre.device).repeat_interleave(k)
        found = SparseFeatures(rows, features.reshape(-1), values.reshape(-1), n, d_sae)
        return found.kept(~(found.values <= 0))
    places = places_where(pre, at_least(bound.clamp_min(_tiny(pre))))
    assert places is not None
    flat, rows, features = at_places(places, d_sae)
    return largest_of_each_row(SparseFeatures(rows, features, pre.view(-1).index_select(0, flat), n, d_sae), k)


def kth_largest_bound(pre: Tensor, k: int) -> Tensor | None:
    """``[n, 1]``: what at least ``k`` of each row of ``pre [n, m]`` reach, near to the k-th largest; None: look at all.

    On a CPU.  The k-th largest of the largest of groups, each in a group of its own.
    """
    groups = number_of_groups(pre.shape[1], k)
    if groups is None:
        return None
    largest = largest_of_groups(pre, groups).numpy()
    largest.partition(groups - k, axis=1)  # several times as fast as torch's topk; what is no number comes last
    return torch.from_numpy(largest[:, groups - k :].min(axis=1, keepdims=True))


def _tiny(pre: Tensor) -> float:
    return torch.finfo(pre.dtype).tiny
