"""Steps on a device that is not waited for are those of plain torch, and wait for nothing."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import attrs
import pytest
import torch
from saekit_plugins.architectures.abstopk import AbsTopKConfig
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.crosscoder import CrosscoderConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.topk.module import TopKKernel
from saekit_plugins.architectures.transcoder import TopKTranscoderConfig, TranscoderConfig
from saekit_plugins.optimizers.adam import AdamConfig
from saekit_plugins.optimizers.signum import SignumConfig
from support.kernels import built, seeded
from support.unwaited import Alike, Watch, WouldWaitError, as_gpu, moved
from torch import Tensor

import saekit
import saekit.devices
from saekit.config import OptimizerConfig, SAEConfig, TrainingConfig
from saekit.distributed.share import Share
from saekit.distributed.world import ALONE, World
from saekit.kernels import SparseFeatures
from saekit.kernels.outer import Outer
from saekit.training.firing import FiringStatistics
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.together import of_whole_batch
from saekit.training.trainer import SAETrainer
from saekit.values import StepInput, StepOutput

REVIVING = {
    "topk": TopKConfig(d_sae=96, k=4, k_aux=6),
    "topk, unscaled, shares": TopKConfig(
        d_sae=96, k=4, k_aux=6, rescale_acts_by_decoder_norm=False, aux_loss_normalization="share"
    ),
    "topk, shrinking": TopKConfig(d_sae=96, k=4, k_aux=6, aux_loss_normalization="none"),
    "topk, encoder left alone": TopKConfig(d_sae=96, k=4, k_aux=6, aux_loss_trains_encoder=False),
    "topk, large k_aux": TopKConfig(d_sae=96, k=4, k_aux=40),
    "topk, larger than all": TopKConfig(d_sae=96, k=4, k_aux=400),
    "batchtopk": BatchTopKConfig(d_sae=96, k=4, k_aux=6),
    "matryoshka": MatryoshkaConfig(d_sae=96, k=4, k_aux=6, widths=(24, 96)),
    "matryoshka, each": MatryoshkaConfig(d_sae=96, k=4, k_aux=6, widths=(24, 96), aux_loss_levels="each"),
    "jumprelu": JumpReLUConfig(d_sae=96, k_aux=6, pre_act_loss_coefficient=0.3, aux_loss_coefficient=0.1),
    "transcoder": TopKTranscoderConfig(d_sae=96, k=4, k_aux=6),
}


@pytest.fixture
def unwaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's numbers are taken for a device's, which nobody looks at."""
    monkeypatch.setattr(saekit.devices, "AT_HAND", frozenset())


def gradients(config: SAEConfig, kernels: str, dead: Tensor, x: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    sae: Any = built(attrs.evolve(config, dtype="float64"), d_in=12).double()
    sae.kernels = kernels
    target = torch.randn(x.shape, generator=seeded(5), dtype=x.dtype) if "Transcoder" in type(config).__name__ else None
    found = sae.training_step(x, StepInput(step=0, generator=seeded(), dead=dead, target=target))
    numbers = {name: value.grad for name, value in sae.named_parameters()} | {"fired": found.fired.double()}
    return numbers, {name: float(loss) for name, loss in found.losses.items()} | {"loss": float(found.loss.detach())}


@pytest.mark.usefixtures("unwaited")
@pytest.mark.parametrize("dead", [0, 3, 50, 96])
@pytest.mark.parametrize("kind", REVIVING)
def test_dead_features_learn_as_in_plain_torch(kind: str, dead: int) -> None:
    """None are dead, fewer than AuxK takes, more, and all."""
    x = torch.randn(70, 12, generator=seeded(1), dtype=torch.float64)
    mask = torch.zeros(96, dtype=torch.bool)
    mask[torch.randperm(96, generator=seeded(2))[:dead]] = True
    numbers, losses = gradients(REVIVING[kind], "fast", mask, x)
    expected, expected_losses = gradients(REVIVING[kind], "reference", mask, x)
    assert losses == pytest.approx(expected_losses, rel=1e-11)
    assert (losses["auxiliary_reconstruction_loss"] > 0) == (dead > 0)
    for name, value in expected.items():
        torch.testing.assert_close(
            numbers[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.usefixtures("unwaited")
def test_products_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by segments, and outer products without blocks."""
    dense = torch.rand(7, 30, generator=seeded(), dtype=torch.float64)
    dense *= torch.rand(7, 30, generator=seeded(1)) < 0.3
    rows, columns = dense.nonzero(as_tuple=True)
    found = SparseFeatures(rows, columns, dense[rows, columns], 7, 30)
    vectors = torch.randn(7, 5, generator=seeded(2), dtype=torch.float64)
    out = torch.ones(30, 5, dtype=torch.float64)
    found.add_outer_products(found.values, vectors, out)
    torch.testing.assert_close(out, 1 + dense.T @ vectors)
    torch.testing.assert_close(found.sums(found.values), dense.sum(0))
    torch.testing.assert_close(found.row_sums(found.values), dense.sum(1))
    assert torch.equal(found.counts(), (dense > 0).sum(0))


UNWAITED = [
    StandardConfig(d_sae=256), TopKConfig(d_sae=256, k=4), BatchTopKConfig(d_sae=256, k=4),
    MatryoshkaConfig(d_sae=256, k=4), MatryoshkaConfig(d_sae=256, k=4, aux_loss_levels="each"),
    GatedConfig(d_sae=256), JumpReLUConfig(d_sae=256, aux_loss_coefficient=0.1, pre_act_loss_coefficient=0.1),
    TranscoderConfig(d_sae=256, skip_connection=True), TopKConfig(d_sae=256, k=200),
    TopKConfig(d_sae=256, k=4, mse_loss_normalization="variance"), CrosscoderConfig(d_sae=256),
    AbsTopKConfig(d_sae=256, k=4), GroupMaxConfig(d_sae=256, k=4),
]  # fmt: skip


def trainer_on_meta(
    config: SAEConfig,
    world: World = ALONE,
    *,
    dead: bool = True,
    optimizer: OptimizerConfig = AdamConfig(beta1=0.9),  # noqa: B008
) -> SAETrainer:
    sae = moved(built(config, d_in=12))
    plugins = saekit.default_manager()
    build = functools.partial(plugins.build, "optimizers", optimizer)
    trainer = SAETrainer(
        name="one", sae=sae, sites=saekit.Sites.one(saekit.Site()), generator=torch.Generator(), device="meta",
        training=TrainingConfig(training_tokens=10**9, log_frequency=10**6, dead_feature_window=1),
        optimizer=ScheduledOptimizer(
            sae.named_parameters(), build, lambda step: 1e-3, table=sae.table, features=world.features, rows=world.data,
            large=1000,
        ),
        world=world,
        firing=FiringStatistics(sae.d_sae, dead_after=1 if dead else 10**6, window=10**6, device="meta"),
    )  # fmt: skip
    trainer.step = 5  # features can be dead
    return trainer


@pytest.mark.parametrize("config", UNWAITED, ids=lambda config: type(config).__name__)
def test_a_step_waits_for_nothing(config: SAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    as_gpu(monkeypatch)
    trainer = trainer_on_meta(config)
    plain = isinstance(config, (AbsTopKConfig, GroupMaxConfig)) or getattr(config, "k", 0) == 200
    assert trainer.step_path().startswith("plain torch" if plain else "fast kernels")
    rows = torch.zeros(64, 12)
    target = torch.zeros(64, 12) if isinstance(config, TranscoderConfig) else None
    with Watch() as watch:
        assert trainer.train_on(rows, target) == {}
    assert watch.sent == (1 if target is None else 2), "each batch once, and nothing else"


def test_a_step_by_signum_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    as_gpu(monkeypatch)
    trainer = trainer_on_meta(StandardConfig(d_sae=256), optimizer=SignumConfig(weight_decay=0.1))
    with Watch() as watch:
        assert trainer.train_on(torch.zeros(64, 12)) == {}
    assert watch.sent == 1


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "none dead"])
@pytest.mark.parametrize("split", ["rows", "features", "both"])
@pytest.mark.parametrize("config", UNWAITED, ids=lambda config: type(config).__name__)
def test_a_step_of_many_processes_waits_once_to_know_which_entries_count(
    config: SAEConfig, split: str, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where entries compete with those of others; with dead features among parts, plain torch makes the step."""
    as_gpu(monkeypatch)
    data, features = (Alike(1 if split == other else 2) for other in ("features", "rows"))
    trainer = trainer_on_meta(config, World(Alike(data.size * features.size), data, features), dead=dead)
    rows = torch.zeros(64, 12)
    target = torch.zeros(64, 12) if isinstance(config, TranscoderConfig) else None
    batch = saekit.Batch({saekit.Site(): rows}, counts=(64, 64) if data.size == 2 else ())
    competes = isinstance(config, TopKConfig) and (isinstance(config, BatchTopKConfig) or split != "rows")
    plain = isinstance(config, (AbsTopKConfig, GroupMaxConfig)) or getattr(config, "k", 0) == 200
    with Watch(looks=9) as watch:
        assert trainer.train_on(rows, target, batch) == {}
    assert watch.looked == (competes and not (plain or (dead and split != "rows")))


@pytest.mark.parametrize("asks", [True, False], ids=["on the CPU", "on the device"])
def test_processes_add_up_plain_numbers_without_waiting(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tell each other their names only where they cannot ask on the CPU."""
    told: list[int] = []
    sums = Alike.sums
    monkeypatch.setattr(Alike, "sums", lambda self, values: told.append(len(values)) or sums(self, values))
    sae, device = moved(built(StandardConfig(d_sae=8), d_in=3)), torch.device("meta")
    share = Share(rows=Alike(2, asks=asks), counts=(4, 4))
    loss, fired = torch.zeros((), device=device), torch.zeros(8, dtype=torch.int64, device=device)
    given = StepOutput(loss, {"a": loss}, torch.zeros(4, 3, device=device), fired, {}, {"b": 1.5, "c": loss})
    with Watch():
        found, _ = of_whole_batch(sae, share, given, 4, {}, look=False)
    assert (found.losses.keys(), found.metrics.keys()) == ({"a"}, {"b", "c"})
    assert told == [5 if asks else 6]


@pytest.mark.parametrize(
    "what", ["a number", "a mask", "numbers of places", "a blocking copy", "a plain number", "the way back"]
)
def test_what_waits_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_gpu(monkeypatch)
    there = torch.zeros(4, device="meta")
    waiting = {
        "a number": lambda: float(there.sum()),
        "a mask": lambda: there[there > 0],
        "numbers of places": lambda: (there > 0).nonzero(),
        "a blocking copy": lambda: torch.zeros(4).to("meta"),
        "a plain number": lambda: torch.tensor(0.5, device="meta"),
        "the way back": lambda: there.to("cpu", non_blocking=True),
    }
    with Watch(), pytest.raises(WouldWaitError):
        waiting[what]()


def test_a_batch_is_sent_from_pinned_memory_and_fetched_without_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the flags say, since there is no device here."""
    asked: list[tuple[str, bool]] = []
    rows = torch.arange(6.0).reshape(2, 3)
    pinned = rows.clone()

    def to(self: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        asked.append((device.type, non_blocking))
        assert device.type == "cpu" or self is pinned
        return self

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: self is pinned)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned)
    assert saekit.devices.sent("cuda:0", rows) is pinned
    assert saekit.devices.sent("cuda:0", pinned) is pinned
    assert saekit.devices.sent("cpu", rows) is rows
    assert asked == [("cuda", True), ("cuda", True), ("cpu", False)]


class OwnFeatures(SparseFeatures):
    """As those of a kernel that makes products in its own way."""

    made: ClassVar[set[str]] = set()

    def decoded(self, decoder: Tensor) -> Tensor:
        self.made.add("decoded")
        return super().decoded(decoder)

    def inner_products(self, vectors: Tensor, weights: Tensor) -> Tensor:
        self.made.add("inner products")
        return super().inner_products(vectors, weights)

    def add_outer_products(self, values: Tensor, vectors: Tensor, out: Tensor, *, replace: bool = False) -> None:
        self.made.add("outer products")
        super().add_outer_products(values, vectors, out, replace=replace)


class OwnKernel(TopKKernel):
    sparse = OwnFeatures


@pytest.mark.parametrize("looked_at", [True, False])
def test_products_of_auxk_are_those_of_the_kernel(looked_at: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not looked_at:
        monkeypatch.setattr(saekit.devices, "AT_HAND", frozenset())
    monkeypatch.setattr(OwnFeatures, "made", set())
    sae: Any = built(REVIVING["topk"], d_in=12)
    sae.step_kernels = (OwnKernel(),)  # what it finds itself is of the plain class
    sae.training_step(
        torch.randn(70, 12, generator=seeded(1)),
        StepInput(step=0, generator=seeded(), dead=torch.arange(96) < 90),
    )
    assert OwnFeatures.made == {"decoded", "inner products", "outer products"}


def test_joined_outer_products_are_those_of_the_kernel() -> None:
    rows, features, values = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.ones(2)
    part = Outer(OwnFeatures(rows, features, values, 2, 3), values, torch.ones(2, 4), torch.ones(2, 4))
    assert type(Outer.joined([part, part]).features) is OwnFeatures
