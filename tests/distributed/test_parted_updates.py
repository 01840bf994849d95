"""Of what all processes have, each updates a part, and keeps the moments of that; the rest goes as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.processes import Case, part_of
from torch import Tensor

from saekit.distributed import ALONE
from saekit.distributed.group import Group
from saekit.errors import PluginFailedError, StorageError
from saekit.runs.checkpoints import Checkpoint
from saekit.runs.parts import moment_bytes
from saekit.runs.spread_checkpoints import part_of_training, training_of
from saekit.runs.state_files import write_state
from saekit.sae.module import SAEModule
from saekit.training import SAETrainer, shown

TOPK = Case(
    {"name": "topk", "k": 4},
    {"log_frequency": 10**6},
    {"name": "adam", "clip_grad_norm": 0.0},  # by the norm of the whole, which nobody tells
    dtype="float32",
)
"""In float32 the memory of ``W_enc`` is turned; in float64 it is not, and ``W_enc`` is updated whole."""


class Heard(Group):
    """Two processes in one: what this one is sent of the other's parts is what it had before, and all is noted."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.asked: list[str] = []

    def sum_(self, value: Tensor) -> Tensor:
        self.asked.append(f"sum of {value.numel()}")
        return value

    def sum_parts_(self, value: Tensor, memory: Tensor) -> None:
        assert memory.numel() == value.numel() // 2
        self.asked.append(f"parts of {value.numel()}")

    def spread_parts_(self, value: Tensor) -> None:
        self.asked.append(f"spreads {value.numel()}")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "LARGE", 64)


def stepped(rank: int, case: Case = TOPK, kind: type[SAEModule] | None = None) -> tuple[SAETrainer, Heard]:
    """After a step on half a batch."""
    group = Heard(rank)
    world = attrs.evolve(ALONE, all=group, data=group)
    trainer = case.trainer(world)
    if kind is not None:
        trainer.sae.__class__ = kind
    batch = part_of(next(case.batches()), case, world)
    trainer.train_on(*trainer.rows_of(batch), batch)
    return trainer, group


@pytest.mark.parametrize("rank", [0, 1])
def test_each_updates_its_part_of_the_features(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, group = stepped(rank)
    before: Any = TOPK.trainer(ALONE).sae
    after: Any = trainer.sae
    monkeypatch.setattr(shown, "LARGE", 1 << 16)
    whole: Any = stepped(rank)[0].sae
    own, others = slice(16 * rank, 16 * rank + 16), slice(16 - 16 * rank, 32 - 16 * rank)
    for one, old, all_of_it in (
        (after.W_dec, before.W_dec, whole.W_dec),
        (after.W_enc.T, before.W_enc.T, whole.W_enc.T),
    ):
        assert not torch.equal(one[own], old[own])
        assert torch.equal(one[own], all_of_it[own])
        assert torch.equal(one[others], old[others]), "the other process would send them"
    assert torch.equal(after.b_enc, whole.b_enc)
    kept = trainer.optimizer.state_dict()
    assert kept["W_enc"]["exp_avg"].shape == (6, 16)
    assert kept["W_dec"]["exp_avg_sq"].shape == (16, 6)
    assert kept["b_enc"]["exp_avg"].shape == (32,), "it is small"
    assert kept["b_dec"]["exp_avg"].shape == (6,)
    assert trainer.optimizer.parted_state().keys() == {"W_enc", "W_dec"}
    assert [asked for asked in group.asked if "192" in asked] == ["parts of 192"] * 2 + ["spreads 192"] * 2


def test_a_state_is_that_of_the_whole_when_it_is_gone_on_from() -> None:
    trainer, _ = stepped(1)
    whole: Any = TOPK.trainer(ALONE)
    batch = next(TOPK.batches())
    whole.train_on(*whole.rows_of(batch), batch)
    state = whole.optimizer.state_dict()
    trainer.optimizer.load_state_dict(state)
    kept = trainer.optimizer.state_dict()
    assert torch.equal(kept["W_enc"]["exp_avg"], state["W_enc"]["exp_avg"][:, 16:])
    assert torch.equal(kept["W_dec"]["exp_avg"], state["W_dec"]["exp_avg"][16:])
    assert torch.equal(kept["b_enc"]["exp_avg"], state["b_enc"]["exp_avg"])


def test_what_others_look_at_is_summed_whole() -> None:
    """A ``before_update`` of one's own may look at all of a gradient."""
    plain: Any = type(TOPK.trainer(ALONE).sae)
    _, group = stepped(0, kind=type("Own", (plain,), {"before_update": lambda self: None}))
    assert not [asked for asked in group.asked if asked.startswith("parts")]
    assert [asked for asked in group.asked if asked.startswith("spreads")] == ["spreads 192"] * 2


def test_what_cannot_be_divided_is_updated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, group = stepped(0, attrs.evolve(TOPK, dtype="float64"))
    assert {parameter.shape for parameter in trainer.optimizer.parted} == {(32, 6)}
    trainer, group = stepped(0, attrs.evolve(TOPK, d_sae=33))
    assert not trainer.optimizer.parted
    assert trainer.optimizer.state_dict()["W_dec"]["exp_avg"].shape == (33, 6)
    monkeypatch.setattr(shown, "LARGE", 1 << 16)
    trainer, group = stepped(0)
    assert not trainer.optimizer.parted
    assert not [asked for asked in group.asked if "spreads" in asked]


def test_an_optimizer_that_does_not_say_that_it_may_updates_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit_plugins.optimizers.signum.module import Signum

    case = attrs.evolve(TOPK, optimizer={"name": "signum"})
    assert stepped(0, case)[0].optimizer.parted
    monkeypatch.setattr(Signum, "elementwise", False)
    trainer, _ = stepped(0, case)
    assert not trainer.optimizer.parted
    assert trainer.optimizer.state_dict()["W_dec"]["momentum"].shape == (32, 6)


@pytest.mark.parametrize("kept", [torch.zeros(48), {"codes": torch.zeros(6, 16)}], ids=["flat", "nested"])
def test_an_optimizer_that_keeps_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch, kept: Any) -> None:
    from saekit_plugins.optimizers.signum.module import Signum

    case, work = attrs.evolve(TOPK, optimizer={"name": "signum"}), Signum.step

    def step(optimizer: Any, *rest: Any) -> Any:
        work(optimizer, *rest)
        for state in optimizer.state.values():
            state["codes"] = kept

    monkeypatch.setattr(Signum, "step", step)
    with pytest.raises(PluginFailedError, match=r"and keeps codes of W_dec as .*expected shape \[16, 6\]"):
        stepped(0, case)
    monkeypatch.setattr(Signum, "elementwise", False)
    stepped(0, case)


def test_parts_that_make_no_whole_are_refused() -> None:
    trainers = [stepped(rank)[0] for rank in range(2)]
    first, second = trainers[0].state_dict(), trainers[1].optimizer.parted_state()
    table = trainers[0].sae.table
    part_of_training([first], table, moments=[[second]])
    for value in (torch.tensor(7.0), torch.zeros(96), {"codes": torch.zeros(6, 16)}):
        odd = {**first, "optimizer": {**first["optimizer"], "W_enc": {**first["optimizer"]["W_enc"], "step": value}}}
        with pytest.raises(StorageError, match="step of W_enc in the state of the optimizer is not of the shape"):
            part_of_training([odd], table, moments=[[second]])
    del second["W_enc"]["step"]
    with pytest.raises(StorageError, match="W_enc are not of one optimizer"):
        part_of_training([first], table, moments=[[second]])


def test_a_part_that_is_lost_is_missed(tmp_path: Path) -> None:
    """Some of the others' files, but not all."""
    facts = {"mesh": [3, 1], "saes": {"sae": {}}, "files": {"sae/moments-0-2.json": ""}}
    with pytest.raises(StorageError, match=r"lacks sae/moments-0-1\.json, a part of what the optimizer keeps"):
        Checkpoint(tmp_path, facts).moments("sae", 0)


def test_weights_in_other_memory_are_still_updated() -> None:
    """As after a step of somebody who gives a parameter a tensor of his own."""
    trainer, _ = stepped(0)
    sae: Any = trainer.sae
    for parameter in (sae.W_enc, sae.W_dec):
        parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
    before = sae.W_enc.detach().clone()
    batch = part_of(next(TOPK.batches()), TOPK, trainer.world)
    trainer.train_on(*trainer.rows_of(batch), batch)
    assert not torch.equal(sae.W_enc[:, :16], before[:, :16])
    assert torch.equal(sae.W_enc[:, 16:], before[:, 16:])


def test_plans_know_what_one_process_keeps() -> None:
    trainer, group = stepped(0)
    import saekit

    def kept(*rest: Any) -> int | None:
        return moment_bytes(TOPK.config, saekit.default_manager(), trainer.sae, *rest)

    small = 2 * (32 + 6)
    assert kept() == 4 * (2 * 2 * 192 + small)
    assert kept(group) == 4 * (2 * 192 + small)


def test_what_each_wrote_makes_the_state_of_the_whole(tmp_path: Path) -> None:
    """Or of other parts of the features, which each read no more than they need of."""
    trainers = [stepped(rank)[0] for rank in range(2)]
    first, second = trainers[0].state_dict(), {"optimizer": trainers[1].optimizer.parted_state()}
    (tmp_path / "sae").mkdir()
    sums = write_state(tmp_path / "sae", "training-0", first)
    sums |= write_state(tmp_path / "sae", "moments-0-1", second)
    about = {"step": 1, "tokens": 24, "diverged": None}
    facts = {"mesh": [2, 1], "saes": {"sae": about}, "files": {f"sae/{name}": "" for name in sums}}
    checkpoint, table = Checkpoint(tmp_path, facts), trainers[0].sae.table
    own = [trainer.optimizer.state_dict()["W_enc"]["exp_avg"] for trainer in trainers]
    whole = training_of(checkpoint, "sae", TOPK.trainer(ALONE).sae)
    assert torch.equal(whole["optimizer"]["W_enc"]["exp_avg"], torch.cat(own, dim=1))
    assert torch.equal(whole["weights"]["W_dec"], first["weights"]["W_dec"])
    assert torch.equal(whole["optimizer"]["b_enc"]["exp_avg"], first["optimizer"]["b_enc"]["exp_avg"])
    parts = [part_of_training([whole], table, number, 4)["optimizer"] for number in range(4)]
    for number, part in enumerate(parts):
        again = part_of_training([first], table, number, 4, [checkpoint.moments("sae", 0, mapped=True)])["optimizer"]
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(again[name][moment], part[name][moment]), (name, moment)
    alone = TOPK.trainer(ALONE)
    alone.load_state_dict(whole)
    assert torch.equal(alone.optimizer.state_dict()["W_enc"]["exp_avg"], torch.cat(own, dim=1))
    with pytest.raises(StorageError, match="the saved exp_avg of W_dec has shape .16, 6., expected .32, 6."):
        TOPK.trainer(ALONE).load_state_dict(first)
