"""Where rows are less to send than gradients, each process makes its part of the gradients from the rows of all."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.topk.module import TopKKernel
from support.processes import Case, part_of
from support.threads import Threads, by_all
from torch import Tensor

from saekit.distributed import ALONE, World
from saekit.distributed.exchange import Exchange
from saekit.distributed.group import Group
from saekit.distributed.sizes import most_entries
from saekit.kernels.workspace import Workspace, Workspaces
from saekit.training import SAETrainer, shown
from saekit.values import StepInput, StepOutput

WEIGHTS = 96 * 6
ROWS = {"rows": 16, "d_sae": 96, "steps": 4, "dtype": "float32", "fast": True}
"""Few rows beside features, of two processes."""
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
    "crosscoder": Case({"name": "batchtopk_crosscoder", "k": 2.5}, ALIVE, widths=(6, 5), **ROWS),
    "crosscoder_of_norms": Case({"name": "crosscoder", "l1_coefficient": 0.05}, widths=(6, 5), **ROWS),
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
    monkeypatch.setattr(shown, "LARGE", 300)


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


@pytest.mark.parametrize("name", [name for name in CASES if name != "crosscoder_of_norms"])
def test_steps_are_those_of_one_process(name: str) -> None:
    found = by_two(CASES[name], lower=5.0)
    assert_same(CASES[name], found, lower=5.0)
    for _, group in found:
        assert group.added == [], "no gradient is added up"
        assert group.spread


def test_a_batch_in_which_nothing_is_active() -> None:
    found = by_two(CASES["standard"], lower=1e3)
    assert_same(CASES["standard"], found, lower=1e3)
    assert found[0][1].added == []


def test_what_is_sent_is_rows_and_weights() -> None:
    (_, group), _ = by_two(attrs.evolve(CASES["topk"], steps=1))
    rows, entries, weights = 16 * 6, 16 * 4 * 2, WEIGHTS
    assert group.spread == [rows, rows, entries, entries, weights, weights]


def test_where_one_has_dense_features_all_add_up_gradients() -> None:
    """Every process of them does the same, whatever its own rows are like."""
    case = attrs.evolve(CASES["standard"], steps=1)
    found = by_two(case, lower=3.0, above=1)
    for _, group in found:
        assert group.added == [WEIGHTS] * 2
    plain = by_two(attrs.evolve(case, fast=False), lower=3.0, above=1)
    for (one, _), (other, _) in zip(found, plain, strict=True):
        for own, expected in zip(one.sae.parameters(), other.sae.parameters(), strict=True):
            torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-6)


def test_what_revives_dead_features_is_added_up() -> None:
    case = attrs.evolve(CASES["topk"], training={"dead_feature_window": 2})
    found = by_two(case, lower=2.0)
    assert_same(case, found, lower=2.0)
    assert found[0][1].added == [WEIGHTS] * 2, "from the step on in which some are dead"


@pytest.mark.parametrize(
    ("counts", "d_sae", "possible"),
    [
        ((8, 8), 64, True),
        ((8, 8), 32, True),
        ((8, 8), 30, False),
        ((8, 8), 65, False),
        ((8, 7), 64, False),
        ((8,), 64, False),
    ],
)
def test_rows_are_sent_where_they_can_be_less(counts: tuple[int, ...], d_sae: int, possible: bool) -> None:
    group = Group()
    group.size = len(counts)
    assert (Exchange.of(group, counts, ["W_dec"], d_sae, 12, 4) is not None) is possible
    assert Exchange.of(group, counts, [], d_sae, 12, 4) is None


@pytest.mark.parametrize("k", [2, 4, 12])
def test_rows_with_many_entries_are_more_to_send(k: int) -> None:
    """Per process: rows, and 16 bytes for each entry, beside half of the gradients of its part."""
    case = attrs.evolve(CASES["topk"], sae={"name": "topk", "k": k}, steps=1, d_sae=256)
    found = by_two(case)
    assert_same(case, found)
    rows, entries, gradients = 8 * 2 * 6, 8 * k, 256 * 2 * 6 // 2
    assert found[0][1].added == ([256 * 6] * 2 if rows * 4 + entries * 16 > gradients * 4 // 2 else [])
    assert most_entries(8, 2, 256, 12) == (gradients * 4 // 2 - rows * 4) // 16


class Decays(TopKKernel):
    """What somebody made of one that leaves weights, who changes their gradients."""

    spreads_over = frozenset({"data", "features"})

    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        result = super().step(sae, x, step, workspace)
        sae.W_dec.grad.add_(sae.W_dec, alpha=5)
        return result


class LeavesSome(TopKKernel):
    """Its steps are those of autograd in one process."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    def leaves(self, sae: Any, x: Tensor, step: StepInput) -> bool:
        return bool(sae.share.rows.rank == 1)


@pytest.mark.parametrize("kernel", [Decays(), LeavesSome()], ids=lambda one: type(one).__name__)
def test_kernels_of_others_need_know_nothing_of_it(kernel: TopKKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    case = attrs.evolve(CASES["topk"], steps=2)
    monkeypatch.setattr(type(case.trainer(ALONE).sae), "step_kernels", (kernel,))
    found = by_two(case)
    assert_same(case, found)
    for _, group in found:
        assert group.added == [WEIGHTS] * 4


def test_who_looks_at_gradients_in_a_step_of_his_own_has_them_whole() -> None:
    """What an architecture does around the step of another."""
    found = by_two(CASES["crosscoder_of_norms"], lower=2.0)
    assert_same(CASES["crosscoder_of_norms"], found, lower=2.0)
    assert found[0][1].added
