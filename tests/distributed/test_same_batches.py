"""Batches that every process has alike are known to be so: their rows and the order of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.threads import by_all
from torch import Tensor

from saekit import DataError, Site
from saekit.distributed import World
from saekit.distributed.batches import SpreadSource
from saekit.distributed.group import Group
from saekit.values import Batch

SITES = [Site(hook_name="one"), Site(hook_name="two")]


def parts(*batches: Batch) -> list[Batch | str]:
    """What each of two processes trains on, whose sources give these; or what is said of it."""

    def read(group: Group) -> Batch | str:
        source: Iterator[Any] = iter([batches[group.rank]])
        try:
            return next(SpreadSource(source, World(group, group), shares=False))  # type: ignore[arg-type]
        except DataError as error:
            return str(error)

    return by_all(2, read)


def batch(*rows: Tensor) -> Batch:
    return Batch(dict(zip(SITES, rows, strict=True)))


def test_what_is_no_number_is_no_difference() -> None:
    """It is found in the loss, as in one process."""
    rows = torch.arange(12.0).view(4, 3)
    rows[1, 1], rows[3, 0] = torch.nan, torch.inf
    first, second = parts(batch(rows, rows), batch(rows.clone(), rows.clone()))
    assert isinstance(first, Batch)
    assert isinstance(second, Batch)
    both = torch.cat([first.activations[SITES[0]], second.activations[SITES[0]]])
    assert torch.equal(both.nan_to_num(-1), rows.nan_to_num(-1))


@pytest.mark.parametrize("site", [0, 1])
def test_other_rows_and_another_order_are_found_at_every_site(site: int) -> None:
    rows = torch.arange(12.0).view(4, 3)
    for other in (rows + torch.eye(4, 3), rows.flip(0)):
        seen = [rows, rows]
        seen[site] = other
        for said in parts(batch(rows, rows), batch(*seen)):
            assert "gave other rows in this process than in another" in str(said)
