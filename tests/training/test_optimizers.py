"""Optimizers as plugins: the ones that ship against their papers, a stranger's, groups, and what is saved of them."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from saekit_plugins.optimizers.adam import AdamConfig
from saekit_plugins.optimizers.signum import SignumConfig
from support.optimizers import adam_for, optimizer_for
from support.training import fake_run as run_of
from support.training import fakes, train
from torch import Tensor, nn

import saekit
from saekit.config import OptimizerConfig, TrainConfig
from saekit.config.files import dump_config, load_config
from saekit.errors import ConfigError, PluginError, PluginFailedError, StorageError
from saekit.kernels.workspace import SHARED
from saekit.sae import Parameter, init
from saekit.testing import FakeConfig, fake_plugin, isolated_manager
from saekit.training.optimizer import ScheduledOptimizer
from saekit.values import StepInput, StepOutput

SHAPES = {"W": (6, 4), "b": (4,), "turned": (5, 3)}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    made = {name: value.to(dtype) for name, value in made.items()}
    made["turned"] = made["turned"].T.contiguous().T
    return {name: nn.Parameter(value) for name, value in made.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def stepped(optimizer: ScheduledOptimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, value in gradients(step).items():
            parameters[name].grad = torch.empty_like(parameters[name]).copy_(value)
        optimizer.step(step)


# ---- those that ship


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "decay"), [(0.9, 0.0), (0.0, 0.0), (0.5, 0.1)])
def test_signum_is_the_papers(beta: float, decay: float, dtype: torch.dtype) -> None:
    """Algorithm 2 of Bernstein et al. 2018, again in float64."""
    parameters = weights(dtype)
    config = SignumConfig(beta=beta, weight_decay=decay, clip_grad_norm=0)
    optimizer = optimizer_for(parameters.items(), config, lambda step: 0.1 / (step + 1))
    expected = {name: value.detach().double().clone() for name, value in parameters.items()}
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    stepped(optimizer, parameters, range(6))
    for step in range(6):
        lr = 0.1 / (step + 1)
        for name, gradient in gradients(step).items():
            momentum[name] = beta * momentum[name] + (1 - beta) * gradient
            expected[name] = expected[name] - lr * (torch.sign(momentum[name]) + decay * expected[name])
    for name, value in parameters.items():
        assert torch.allclose(value.double(), expected[name], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signum_clips_before_it_averages(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    optimizer = optimizer_for(parameters.items(), SignumConfig(beta=0.5, clip_grad_norm=0.25), lambda step: 0.1)
    stepped(optimizer, parameters, range(1))
    norm = torch.cat([value.flatten() for value in gradients(0).values()]).norm()
    for name, gradient in gradients(0).items():
        kept = optimizer.state_dict()[name]["momentum"]
        assert torch.allclose(kept.double(), gradient * 0.25 / (norm + 1e-6) / 2, rtol=1e-6)


@pytest.mark.parametrize(("beta", "decay"), [(0.9, 0.0), (0.0, 0.1), (0.3, 0.1)])
def test_signum_leaves_a_failed_step_out_without_a_look(beta: float, decay: float) -> None:
    """As on a GPU, by the optimizer's flag."""
    config = SignumConfig(beta=beta, weight_decay=decay)
    looked, blind = weights(), weights()
    expected, optimizer = (optimizer_for(one.items(), config, lambda step: 0.1) for one in (looked, blind))
    optimizer.looks = False
    optimizer._inner.found_inf = optimizer._failed  # type: ignore[attr-defined]
    for one, parameters in ((expected, looked), (optimizer, blind)):
        stepped(one, parameters, range(3))
    for name, value in looked.items():
        torch.testing.assert_close(blind[name], value, rtol=1e-6, atol=1e-7)
    before = {name: value.detach().clone() for name, value in blind.items()}
    kept = copy.deepcopy(optimizer.state_dict())
    blind["W"].grad = torch.full_like(blind["W"], torch.nan)
    blind["b"].grad = torch.ones_like(blind["b"])
    optimizer.step(3)
    stepped(optimizer, blind, range(4, 5))
    assert optimizer.failed
    for name, value in before.items():
        assert torch.equal(blind[name], value), name
        assert torch.equal(optimizer.state_dict()[name]["momentum"], kept[name]["momentum"]), name


@pytest.mark.parametrize("config", [SignumConfig(), AdamConfig()])
def test_a_gradient_that_is_no_number_changes_nothing(config: OptimizerConfig) -> None:
    parameters = weights()
    optimizer = optimizer_for(parameters.items(), config, lambda step: 0.1)
    stepped(optimizer, parameters, range(2))
    before = {name: value.detach().clone() for name, value in parameters.items()}
    for name, gradient in gradients(2).items():
        parameters[name].grad = torch.full_like(gradient, torch.nan).float()
    optimizer.step(2)
    stepped(optimizer, parameters, range(3, 4))
    assert optimizer.failed
    assert all(torch.equal(before[name], value) for name, value in parameters.items())


def test_those_that_ship_are_guarded_but_in_float64() -> None:
    """Where the optimizer does not look for itself, :class:`ScheduledOptimizer` does, and waits for a GPU."""
    assert adam_for(weights().items(), lambda step: 0.1)._guarded is not None
    assert adam_for(weights(torch.float64).items(), lambda step: 0.1)._guarded is None
    assert optimizer_for(weights().items(), SignumConfig(), lambda step: 0.1)._guarded is not None
    assert optimizer_for(weights(torch.float64).items(), SignumConfig(), lambda step: 0.1)._guarded is None


class Differing(torch.optim.SGD):
    """Goes by what the gradient has become since the step before, which it keeps as it is."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, *, beside: bool) -> None:
        super().__init__(groups, lr=lr)
        self.before: dict[str, Any] = {}
        self.beside = beside

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for number, p in enumerate(self.param_groups[0]["params"]):
            kept = self.before.setdefault(str(number), {}) if self.beside else self.state[p]
            p.sub_(p.grad - kept.get("before", 0), alpha=self.param_groups[0]["lr"])
            kept["before"] = p.grad.view(-1).view_as(p) if p.grad.is_contiguous() else p.grad


@pytest.mark.parametrize("beside", [False, True])
def test_the_memory_of_a_gradient_that_an_optimizer_keeps_is_left_alone(beside: bool) -> None:
    parameter = nn.Parameter(torch.zeros(1024, 1024))  # of small ones, it is not used again anyway
    optimizer = ScheduledOptimizer(
        [("W", parameter)], functools.partial(Differing, beside=beside), lambda step: 1.0, clip=0
    )
    for step, value in enumerate((1.0, 3.0, 2.0)):
        with SHARED.lent() as workspace:  # as a step's kernels do
            parameter.grad = workspace.gradient_for(parameter.detach()).fill_(value)
        optimizer.step(step)
    assert torch.all(parameter == -2), "1, then 3 - 1, then 2 - 3"


# ---- what is saved


@attrs.frozen(kw_only=True)
class OwnConfig(OptimizerConfig):
    """A stranger's."""

    amsgrad: bool = True


def own(config: OwnConfig, *, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, amsgrad=config.amsgrad, weight_decay=0.1)


class Counting(torch.optim.SGD):
    """Keeps what no torch optimizer knows: a setting that changes, and a state of the whole."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, momentum=0.5)
        self.seen = 0
        for group in self.param_groups:
            group["size"] = 1.0

    def step(self, closure: Any = None) -> Any:
        self.seen += 1
        for group in self.param_groups:
            group["size"] *= 1 + self.seen
            group["lr"] *= group["size"]
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.seen = state_dict.pop("seen")
        super().load_state_dict(state_dict)


BUILDS: dict[str, Any] = {
    "adam": lambda parameters, schedule: adam_for(parameters, schedule, beta1=0.9),
    "signum": lambda parameters, schedule: optimizer_for(parameters, SignumConfig(), schedule),
    "torch's": lambda parameters, schedule: ScheduledOptimizer(
        parameters, functools.partial(own, OwnConfig()), schedule
    ),
    "its own": lambda parameters, schedule: ScheduledOptimizer(parameters, Counting, schedule),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_a_state_goes_on_bit_by_bit(kind: str) -> None:
    whole, first, second = weights(), weights(), weights()
    build = functools.partial(BUILDS[kind], schedule=lambda step: 0.01 * (step + 1))
    stepped(build(whole.items()), whole, range(6))
    before = build(first.items())
    stepped(before, first, range(3))
    for name, value in first.items():
        second[name].data.copy_(value.data)
    after = build(second.items())
    after.load_state_dict(before.state_dict())
    stepped(after, second, range(3, 6))
    for name, value in whole.items():
        assert torch.equal(second[name], value), name
    assert whole["turned"].T.is_contiguous()


def test_a_state_is_by_name_and_of_the_parameters_own_shape() -> None:
    parameters = weights()
    optimizer = optimizer_for(parameters.items(), SignumConfig(), lambda step: 0.1)
    stepped(optimizer, parameters, range(1))
    state = optimizer.state_dict()
    assert {name: list(kept) for name, kept in state.items()} == {key: ["momentum"] for key in SHAPES}
    assert {name: tuple(kept["momentum"].shape) for name, kept in state.items()} == SHAPES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": {}}, "the saved optimizer has no moments of W"),
        ({"W": {"exp_avg": torch.zeros(6, 4)}}, "the saved optimizer has exp_avg of W"),
        ({"W": {"momentum": torch.zeros(4, 6)}}, r"the saved momentum of W has shape \[4, 6\], expected \[6, 4\]"),
        ({"other": {"momentum": torch.zeros(1)}}, "moments of other, which this SAE does not have"),
    ],
)
def test_what_was_saved_is_checked(change: dict[str, Any], message: str) -> None:
    parameters = weights()
    optimizer = optimizer_for(parameters.items(), SignumConfig(), lambda step: 0.1)
    stepped(optimizer, parameters, range(1))
    with pytest.raises(StorageError, match=message):
        optimizer.load_state_dict(optimizer.state_dict() | change)


def test_an_optimizer_that_loses_a_parameter_or_a_factor_is_refused() -> None:
    def loses(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups[0]["params"][1:], lr=lr)

    def forgets(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=lr)

    for build in (loses, forgets):
        with pytest.raises(PluginFailedError, match="SGD has not the parameters that it was given in its param_groups"):
            ScheduledOptimizer(weights().items(), build, lambda step: 0.1)


# ---- groups


class SlowSAE(StandardSAE):
    """Its encoder's bias learns at a tenth of the rate, and a parameter of its own at three times that."""

    @classmethod
    def parameters_of(cls, config: saekit.SAEConfig) -> tuple[Parameter, ...]:
        found = {entry.name: entry for entry in super().parameters_of(config)}
        found["b_enc"] = attrs.evolve(found["b_enc"], lr_factor=0.1)
        return (*found.values(), Parameter("gain", ("d_sae",), init=init.ones, lr_factor=3.0))

    step_kernels = ()

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        found = super().losses(x, step)
        return found._replace(loss=found.loss + self.gain.sum(), metrics={"own/gain": self.gain.detach().mean()})


@attrs.frozen(kw_only=True)
class SlowConfig(StandardConfig):
    """Options of :class:`SlowSAE`."""

    optimizer_defaults = {"test:seen": {"start": 7}}  # noqa: RUF012


@attrs.frozen(kw_only=True)
class SeenConfig(OptimizerConfig):
    """Options of an optimizer that tells what it was given."""

    start: int | None = None


def run_with(folder: Path, build: Any, **optimizer: Any) -> saekit.TrainResult:
    slow = fake_plugin("sae_architectures", "slow", SlowSAE, SlowConfig)
    config = run_of(folder, training={"lr": 0.01, "training_tokens": 256}, optimizer={"name": "seen", **optimizer})
    config["sae"] = {"name": "slow", "d_sae": 32, "l1_coefficient": 0.1}
    return train(config, slow, fake_plugin("optimizers", "seen", build, SeenConfig))


def test_groups_come_from_the_table_and_rates_follow_their_factors(tmp_path: Path) -> None:
    made: list[Any] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            made.append({name: group["lr"] for group in self.param_groups for name in group["names"]})
            super().step()

    def build(config: SeenConfig, *, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        made.append([{key: value for key, value in group.items() if key != "params"} for group in groups])
        return Watched(groups, lr=lr)

    run_with(tmp_path, build)
    by_factor = {group["lr_factor"]: group for group in made[0]}
    assert by_factor[0.1]["names"] == ["b_enc"]
    assert by_factor[3.0]["names"] == ["gain"]
    unit = dict(zip(by_factor[1.0]["names"], by_factor[1.0]["unit_rows"], strict=True))
    turned = dict(zip(by_factor[1.0]["names"], by_factor[1.0]["transposed"], strict=True))
    assert unit == {"W_dec": True, "W_enc": False, "b_dec": False}
    assert turned == {"W_dec": False, "W_enc": True, "b_dec": False}
    assert made[1] == pytest.approx({"b_enc": 0.001, "gain": 0.03, "W_dec": 0.01, "W_enc": 0.01, "b_dec": 0.01})


def test_a_parameter_moves_by_its_factor(tmp_path: Path) -> None:
    """Signum moves every number by its rate."""
    result = saekit.train(
        run_of(tmp_path, training={"lr": 0.01, "training_tokens": 256}, optimizer={"name": "signum"})
        | {"sae": {"name": "slow", "d_sae": 32, "l1_coefficient": 0.1}},
        plugins=fakes(fake_plugin("sae_architectures", "slow", SlowSAE, SlowConfig)),
        dataset=[{"tokens": [(7 * n + t) % 120 + 1 for t in range(30)]} for n in range(40)],
    )
    moved = result.sae.b_enc.detach().abs()
    assert moved.max().item() == pytest.approx(0.001, rel=1e-3)
    gain: Any = result.sae.gain
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["own/gain"] == 1, "and its own metrics are logged as it names them"
    assert (gain.detach() - 1).abs().max().item() == pytest.approx(0.03, rel=1e-3)


# ---- choosing one


@pytest.mark.parametrize(("given", "start"), [({}, 7), ({"start": 3}, 3)])
def test_an_architecture_states_what_an_option_is_unless_it_is_set(
    tmp_path: Path, given: dict[str, int], start: int
) -> None:
    starts = []

    def build(config: SeenConfig, *, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        starts.append(config.start)
        return torch.optim.SGD(groups, lr=lr)

    run_with(tmp_path, build, **given)
    assert starts == [start]


def test_one_without_the_options_of_its_kind_is_refused() -> None:
    told = "entry 'fake': FakeConfig must derive from saekit.config.{}, whose options all of its kind have"
    for kind, base in (("optimizers", "OptimizerConfig"), ("sae_architectures", "SAEConfig")):
        with pytest.raises(PluginError, match=told.format(base)):
            isolated_manager(fake_plugin(kind, config=FakeConfig))


def test_files_keep_their_keys() -> None:
    """A section without a name is of Adam."""
    config = load_config({"optimizer": {"beta1": 0.5, "clip_grad_norm": 2.0}}, kind=TrainConfig)
    assert config.optimizer == AdamConfig(beta1=0.5, clip_grad_norm=2.0)
    assert load_config({}, ["optimizer.beta1=0.5"]).optimizer == AdamConfig(beta1=0.5)
    chosen = load_config({"optimizer": "signum"}, ["optimizer.beta=0.5"])
    assert chosen.optimizer == SignumConfig(beta=0.5)
    assert 'name = "saekit:signum"' in dump_config(chosen)
    with pytest.raises(
        ConfigError, match=r"optimizer.beta1: is not an option of saekit:signum \(optimizer.name\), but of "
    ):
        load_config({"optimizer": {"name": "signum", "beta1": 0.5}})
    with pytest.raises(ConfigError, match="optimizer.clip_grad_norm: must be 0 or more, found -1"):
        load_config({"optimizer": {"name": "signum", "clip_grad_norm": -1.0}})
