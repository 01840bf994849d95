"""Losses and metrics that processes with rows of their own add up: by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.saes import drawn_sae
from support.threads import Threads, by_all

from saekit.distributed.group import Group
from saekit.distributed.share import Share
from saekit.training import together
from saekit.training.shown import Shown
from saekit.training.together import check_names, of_whole_batch
from saekit.values import StepOutput


def output(losses: dict[str, Any], metrics: dict[str, Any]) -> StepOutput:
    return StepOutput(
        loss=torch.tensor(1.0), losses=losses, output=torch.zeros(1, 1), fired=torch.zeros(4), metrics=metrics
    )


def step(given: list[StepOutput], rows: tuple[int, ...]) -> list[StepOutput]:
    sae = drawn_sae(4, d_sae=4)

    def work(group: Group) -> StepOutput:
        return of_whole_batch(sae, Share(group, counts=rows), given[group.rank], rows[group.rank], {})[0]

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


@pytest.mark.parametrize("by_host", [True, False])
def test_other_names_are_found_in_every_step(monkeypatch: pytest.MonkeyPatch, by_host: bool) -> None:
    """As many as the others give, so that they would be added up with them; also where only devices can be asked."""
    if not by_host:
        monkeypatch.setattr(Threads, "same", lambda group, number: None)
    given = [output({}, {"x": 1.0}), output({}, {"y": 2.0})]
    with pytest.raises(ValueError, match="must all give the same metrics"):
        step(given, (1, 1))


def test_gradients_of_one_alone_are_refused_by_all() -> None:
    def work(group: Group) -> str:
        sae: Any = drawn_sae(4, d_sae=4)
        sae.b_dec.grad = torch.zeros(4)
        if group.rank:
            sae.W_dec.grad = torch.zeros(4, 4)
        with pytest.raises(ValueError, match="gradients of the same parameters") as caught:
            check_names(Share(group), output({}, {}), sae)
        return str(caught.value)

    first, second = by_all(2, work)
    assert first == second
    assert "process 1 of them gives others than the first: 'W_dec', which not the first has" in first


@pytest.mark.parametrize("missing", ["W_dec", "b_enc"])
def test_a_gradient_that_one_lacks_is_named_before_any_is_told(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Engines would take the next message for it, or end the process: both large ones and small ones."""
    told: list[tuple[int, ...]] = []

    def heard(group: Threads, value: Any, *rest: Any) -> Any:
        told.append(getattr(value, "shape", ()))
        return value

    monkeypatch.setattr(together, "LARGE", 16)
    for name in ("sum_", "sums", "sum_parts_"):
        monkeypatch.setattr(Threads, name, heard)

    def work(group: Group) -> str:
        sae: Any = drawn_sae(4, d_sae=4)
        for name, parameter in sae.named_parameters():
            if not group.rank or name != missing:
                parameter.grad = torch.ones_like(parameter)
        parted = {sae.W_enc: Shown("W_enc", sae.W_enc, None, group)}
        with pytest.raises(ValueError, match="gradients of the same parameters") as caught:
            of_whole_batch(sae, Share(group, counts=(1, 1)), output({}, {}), 1, parted)
        return str(caught.value)

    first, second = by_all(2, work)
    assert first == second
    assert f"process 1 of them gives others than the first: '{missing}', which only the first has" in first
    assert not told


def test_gradients_are_added_up_in_whatever_order_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def sum_(group: Threads, value: torch.Tensor) -> torch.Tensor:
        """As engines do: what lies at the same place of memory."""
        memory = value if value.is_contiguous() else value.T
        memory.copy_(torch.stack(group.gather(memory)).sum(0))
        return value

    monkeypatch.setattr(together, "LARGE", 4)
    monkeypatch.setattr(Threads, "sum_", sum_)
    gradient = torch.arange(16.0).view(4, 4)

    def work(group: Group) -> tuple[torch.Tensor, bool]:
        sae: Any = drawn_sae(4, d_sae=4)
        sae.W_dec.grad = gradient.clone() if group.rank else gradient.T.contiguous().T
        of_whole_batch(sae, Share(group, counts=(1, 1)), output({}, {}), 1, {})
        return sae.W_dec.grad, sae.W_dec.grad.stride() == sae.W_dec.stride()

    for found, in_order in by_all(2, work):
        assert torch.equal(found, 2 * gradient)
        assert in_order


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
