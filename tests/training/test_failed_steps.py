"""A step whose loss or gradient is not finite changes nothing, on a device that is not asked as well as on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.optimizers import adam_for
from torch import Tensor

import saekit
from saekit.config import SAEConfig, TrainingConfig
from saekit.devices import rows_on
from saekit.errors import DivergedError
from saekit.sae.build import build_module
from saekit.training.firing import FiringStatistics
from saekit.training.trainer import SAETrainer


def trainer(config: SAEConfig, device: str = "cpu", log_frequency: int = 1, **optimizer: Any) -> SAETrainer:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, 8, plugins)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 3)
    sae.to(device)
    sae.after_update()
    return SAETrainer(
        name="sae", sae=sae, sites=saekit.Sites.one(saekit.Site()), device=device, generator=torch.Generator(device),
        training=TrainingConfig(training_tokens=10**6, log_frequency=log_frequency),
        optimizer=adam_for(sae.named_parameters(), lambda step: 0.01, beta1=0.9, **optimizer),
        firing=FiringStatistics(sae.d_sae, dead_after=100, window=100, device=device),
    )  # fmt: skip


def batch(seed: int, bad: float | None = None) -> Tensor:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    if bad is not None:
        x[3, 2] = bad
    return x


def everything(state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and moments."""
    flat = {f"weights/{name}": value for name, value in state["weights"].items()}
    for name, moments in state["optimizer"].items():
        flat |= {f"{name}/{moment}": value for moment, value in moments.items()}
    return {name: value.clone() for name, value in flat.items()}


CONFIGS: dict[str, SAEConfig] = {
    "standard": StandardConfig(d_sae=32, l1_coefficient=0.1),
    "float64": StandardConfig(d_sae=32, l1_coefficient=0.1, dtype="float64"),
    "topk": TopKConfig(d_sae=32, k=3, aux_loss_coefficient=0),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_and_moments_are_those_before(kind: str, clip: float, bad: float, device: str) -> None:
    if kind == "float64" and bad == 1e30:
        return  # which is no trouble there
    own = trainer(CONFIGS[kind], device, clip_grad_norm=clip)
    for seed in range(3):
        own.train_on(batch(seed))
    before = everything(own.state_dict())
    with pytest.raises(DivergedError, match="(loss|gradient) of .* at step 4 .*Lower training.lr"):
        own.train_on(batch(4, bad))
    after = everything(own.state_dict())
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()
    assert after["W_dec/step"] == 3
    with pytest.raises(DivergedError, match="not finite|is nan|is inf"):
        own.check_weights()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_a_device_that_is_not_asked_makes_no_step_any_more(kind: str) -> None:
    own = trainer(CONFIGS[kind], "cuda", log_frequency=8)
    for seed in range(3):
        own.train_on(batch(seed))
    before = everything(own.state_dict())
    for seed in (4, 5, 6, 7):
        assert own.train_on(batch(seed, torch.nan if seed == 4 else None)) == {}
    after = everything(own.state_dict())
    for name, value in before.items():
        # Rows of norm 1 are set to norm 1 again.
        assert torch.allclose(value, after[name], rtol=1e-6, atol=1e-7), name
    assert after["W_dec/step"] == 3
    with pytest.raises(DivergedError, match="was not finite at a step after 1 and up to 7"):
        own.check_weights()
    with pytest.raises(
        DivergedError, match="was not finite at a step after 1 and before 8, and no step was made since"
    ):
        own.train_on(batch(8))


def test_the_kernel_of_adam_leaves_a_failed_step_out() -> None:
    """What a GPU does with the optimizer's flag, on the CPU, whose kernel does the same."""
    own, other = trainer(CONFIGS["standard"]), trainer(CONFIGS["standard"])
    other.optimizer.looks = False
    other.optimizer._inner.found_inf = other.optimizer._failed  # type: ignore[attr-defined]
    for seed in range(3):
        for one in (own, other):
            one.train_on(batch(seed))
    state = copy.deepcopy(own.state_dict())
    before, same = everything(state), everything(other.state_dict())
    assert all(torch.equal(value, same[name]) for name, value in before.items())
    other.training = TrainingConfig(training_tokens=10**6, log_frequency=100)
    other.train_on(batch(4, torch.nan))
    other.train_on(batch(5))
    after = everything(other.state_dict())
    assert after["W_enc/step"] == 3
    for name in ("weights/W_enc", "weights/b_enc", "W_enc/exp_avg", "W_enc/exp_avg_sq", "b_dec/exp_avg"):
        assert torch.equal(before[name], after[name]), name
    own.train_on(batch(5))
    fresh = trainer(CONFIGS["standard"])
    fresh.load_state_dict(state)  # of the SAE before
    fresh.train_on(batch(5))
    one, two = everything(own.state_dict()), everything(fresh.state_dict())
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_what_is_not_finite_in_the_gradient_alone() -> None:
    own = trainer(CONFIGS["standard"])

    def poison() -> None:
        assert own.sae.W_dec.grad is not None
        own.sae.W_dec.grad[0, 0] = torch.inf

    own.sae.before_update = poison  # type: ignore[method-assign]
    before = everything(own.state_dict())
    with pytest.raises(DivergedError, match=r"the gradient of .* is not finite at step 1, where the loss is \d"):
        own.train_on(batch(0))
    after = everything(own.state_dict())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_nobody_reads_a_copy_before_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the CPU is waited for; one to a GPU is not, and is made from pinned memory."""
    asked: list[tuple[str, bool]] = []

    class Rows:
        device = torch.device("cpu")
        pinned = False

        def is_pinned(self) -> bool:
            return self.pinned

        def pin_memory(self) -> Rows:
            pinned = Rows()
            pinned.pinned = True
            return pinned

        def to(self, device: Any, *, non_blocking: bool = False) -> Tensor:
            asked.append((str(device), non_blocking))
            assert self.pinned == non_blocking
            return batch(0)

        def __getitem__(self, some: slice) -> Tensor:
            return batch(0)[some]

    for device in ("cpu", "cuda", "cuda:1", "mps", torch.device("cpu")):
        rows_on(device, Rows(), torch.float32)  # type: ignore[arg-type]
    assert asked == [("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", False), ("cpu", False)]
    asked.clear()
    trainer(CONFIGS["standard"]).train_on(Rows())  # type: ignore[arg-type]
    assert asked == [("cpu", False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_rows_from_a_gpu_arrive_whole() -> None:
    for seed in range(20):
        generator = torch.Generator("cuda").manual_seed(seed)
        rows = torch.randn(4096, 4096, device="cuda", generator=generator)
        for _ in range(20):
            rows = rows @ torch.eye(4096, device="cuda")  # the device is still at it
        assert torch.equal(rows_on("cpu", rows, torch.float32), rows.cpu())
