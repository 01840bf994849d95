"""Where rows are less to send than gradients, each process makes its part of the gradients from the rows of all."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from support.processes import Case, part_of
from support.threads import Threads, by_all
from torch import Tensor

from saekit.distributed import ALONE, World
from saekit.distributed.group import Group
from saekit.distributed.share import Share
from saekit.kernels.outer import rows_are_less
from saekit.kernels.workspace import Workspaces
from saekit.training import SAETrainer, shown

ROWS = {"rows": 16, "d_sae": 64, "steps": 4, "dtype": "float32", "fast": True}
"""Half as many rows as features, of two processes."""
ALIVE = {"dead_feature_window": 10**6}
FINE = {"finetuning_tokens": 32, "training_tokens": 64}
CASES = {
    "topk": Case({"name": "topk", "k": 4}, ALIVE, **ROWS),
    "topk_in_units": Case({"name": "topk", "k": 4, "mse_loss_normalization": "variance"}, ALIVE, **ROWS),
    "batchtopk": Case({"name": "batchtopk", "k": 2.5}, ALIVE, **ROWS),
    "standard": Case({"name": "standard", "l1_coefficient": 0.05}, **ROWS),
    "standard_lp_by_norms": Case(
        {"name": "standard", "lp_norm": 2.0, "normalize_sae_decoder": False,
         "scale_sparsity_penalty_by_decoder_norm": True}, **ROWS),
    "standard_no_b_dec": Case({"name": "standard", "apply_b_dec_to_input": False}, **ROWS),
    "standard_scale": Case({"name": "standard"}, {**FINE, "finetuning_method": "scale"}, **ROWS),
    "standard_decoder": Case(
        {"name": "standard", "apply_b_dec_to_input": False}, {**FINE, "finetuning_method": "decoder"}, **ROWS),
    "jumprelu": Case({"name": "jumprelu"}, ALIVE, **ROWS),
    "transcoder": Case({"name": "transcoder", "skip_connection": True}, widths=(6, 5), reads=1, **ROWS),
    "crosscoder": Case({"name": "crosscoder", "l1_coefficient": 0.05, "decoder_norm": "l2"}, widths=(6, 5), **ROWS),
}  # fmt: skip


class Counted(Threads):
    """Notes the numbers that are added up and those that are told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.added: list[int] = []
        self.spread: list[int] = []

    def sum_parts_(self, value: Tensor, memory: Tensor) -> None:
        self.added.append(value.numel())
        super().sum_parts_(value, memory)

    def spread_parts_(self, value: Tensor) -> None:
        self.spread.append(value.numel())
        super().spread_parts_(value)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "LARGE", 128)


def trained(case: Case, group: Group | None, lower: float = 0.0, above: int = 0) -> SAETrainer:
    """After all steps; with biases lower by ``lower``, but in processes from number ``above`` on."""
    world: World = ALONE if group is None else attrs.evolve(ALONE, all=group, data=group)
    trainer = case.trainer(world)
    trainer.sae.workspaces = Workspaces()  # threads take turns, in the middle of their work
    if lower and (group is None or group.rank >= above):
        with torch.no_grad():
            trainer.sae.b_enc -= lower  # type: ignore[operator]
    for batch in case.batches():
        part = part_of(batch, case, world)
        trainer.train_on(*trainer.rows_of(part), part)
    return trainer


def by_two(case: Case, **options: Any) -> list[tuple[SAETrainer, Counted]]:
    def work(group: Group) -> tuple[SAETrainer, Counted]:
        counted = Counted(group.rank, group._barrier, group._table)  # type: ignore[attr-defined]
        return trained(case, counted, **options), counted

    return by_all(2, work)


def assert_same(case: Case, found: list[tuple[SAETrainer, Counted]], **options: Any) -> None:
    expected = dict(trained(case, None, **options).sae.named_parameters())
    for trainer, _ in found:
        parameters = dict(trainer.sae.named_parameters())
        torch.testing.assert_close(parameters, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str) -> None:
    found = by_two(CASES[name], lower=4.0)
    assert_same(CASES[name], found, lower=4.0)
    for _, group in found:
        assert group.added == [], "no gradient is added up"
        assert group.spread


def test_a_batch_in_which_nothing_is_active() -> None:
    found = by_two(CASES["standard"], lower=1e3)
    assert_same(CASES["standard"], found, lower=1e3)
    assert found[0][1].added == []


def test_what_is_sent_is_rows_and_weights() -> None:
    (_, group), _ = by_two(attrs.evolve(CASES["topk"], steps=1))
    rows, entries, weights = 16 * 6, 16 * 4 * 2, 64 * 6
    assert group.spread == [rows, rows, entries, entries, weights, weights]


def test_where_one_has_dense_features_all_add_up_gradients() -> None:
    """Every process of them does the same, whatever its own rows are like."""
    case = attrs.evolve(CASES["standard"], steps=1)
    found = by_two(case, lower=3.0, above=1)
    for _, group in found:
        assert group.added == [64 * 6] * 2
    plain = by_two(attrs.evolve(case, fast=False), lower=3.0, above=1)
    for (one, _), (other, _) in zip(found, plain, strict=True):
        for own, expected in zip(one.sae.parameters(), other.sae.parameters(), strict=True):
            torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-6)


def test_what_revives_dead_features_is_added_up() -> None:
    case = attrs.evolve(CASES["topk"], training={"dead_feature_window": 2})
    found = by_two(case, lower=2.0)
    assert_same(case, found, lower=2.0)
    assert found[0][1].added == [64 * 6] * 2, "from the step on in which some are dead"


@pytest.mark.parametrize(
    ("counts", "d_sae", "size", "less"),
    [
        ((8, 8), 32, 2, True),
        ((8, 8), 31, 2, False),
        ((8, 8), 33, 2, False),
        ((8, 7), 64, 2, False),
        ((8,), 64, 1, False),
    ],
)
def test_rows_are_sent_where_they_are_less(counts: tuple[int, ...], d_sae: int, size: int, less: bool) -> None:
    group = Group()
    group.size = size
    assert rows_are_less(Share(rows=group, counts=counts), d_sae) is less


def test_who_may_add_to_gradients_later_has_those_of_all_features() -> None:
    """As kernels of strangers may, which do not say that theirs are final."""
    summed = attrs.evolve(CASES["crosscoder"], sae={"name": "crosscoder", "l1_coefficient": 0.05, "decoder_norm": "l1"})
    found = by_two(summed, lower=2.0)
    assert_same(summed, found, lower=2.0)
    assert found[0][1].added
