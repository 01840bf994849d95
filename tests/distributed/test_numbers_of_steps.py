"""Losses and metrics that processes with rows of their own add up: by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.saes import drawn_sae
from support.threads import by_all

from saekit.distributed.group import Group
from saekit.distributed.share import Share
from saekit.training.together import check_names, of_whole_batch
from saekit.values import StepOutput


def output(losses: dict[str, Any], metrics: dict[str, Any]) -> StepOutput:
    return StepOutput(
        loss=torch.tensor(1.0), losses=losses, output=torch.zeros(1, 1), fired=torch.zeros(4), metrics=metrics
    )


def step(given: list[StepOutput], rows: tuple[int, ...]) -> list[StepOutput]:
    sae = drawn_sae(4, d_sae=4)

    def work(group: Group) -> StepOutput:
        return of_whole_batch(sae, Share(group, counts=rows), given[group.rank], rows[group.rank])[0]

    return by_all(len(given), work)


def test_they_are_added_up_by_name_in_whatever_order() -> None:
    """Plain numbers as tensors are: the mean over rows."""
    a, b = torch.tensor(1.0), torch.tensor(2.0)
    first = output({"one": a, "two": b}, {"x": 10.0, "y": a, "n": 4})
    second = output({"two": 3 * b, "one": 3 * a}, {"n": 8, "y": 3 * a, "x": 20.0})
    for found, like in zip(step([first, second], (3, 1)), (first, second), strict=True):
        assert {name: float(value) for name, value in found.losses.items()} == {"one": 1.5, "two": 3.0}
        assert {name: float(value) for name, value in found.metrics.items()} == {"x": 12.5, "y": 1.5, "n": 5.0}
        assert [*found.losses] == [*like.losses]
        assert [*found.metrics] == [*like.metrics]


def test_names_of_one_alone_are_refused_by_all() -> None:
    given = [output({}, {"x": 1.0, "z": 1.0}), output({}, {"x": 1.0, "y": 2.0})]

    def work(group: Group) -> str:
        with pytest.raises(ValueError, match="must all give the same metrics") as caught:
            check_names(Share(group), given[group.rank])
        return str(caught.value)

    first, second = by_all(2, work)
    assert first == second
    assert "process 1 of them gives others than the first: 'y', which not the first has, 'z', which only" in first
    assert by_all(2, lambda group: check_names(Share(group), given[0])) == [None, None]
    check_names(Share(), given[0])
