"""What an optimizer promises."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.abilities import Elementwise
from saekit.reasons import error_text
from saekit.runs.state_files import write_state
from saekit.sae.init import zeros
from saekit.sae.parameters import Parameter, ParameterTable
from saekit.testing.checks.check import Checks, Fault, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal, seeded
from saekit.testing.checks.two_processes import DATA, FEATURES, Mesh, on_two
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.shown import Shown

if TYPE_CHECKING:
    from torch import nn

    from saekit.distributed import World

CHECKS = Checks()
_LR = 0.05
_SHAPES = {"matrix": (7, 5), "vector": (5,), "number": (), "slower": (3, 4)}
_FACTOR = 0.25
"""Of the rate of the parameter ``slower``, which is in a group of its own."""


class _Training:
    """Parameters that are drawn to a target, and an optimizer of them."""

    def __init__(self, subject: Subject, dtype: str = "float32", part: int | None = None) -> None:
        """``part``: of each parameter that has more than one number, this half alone."""
        import torch

        generator, kind = seeded(), getattr(torch, dtype)
        self.parameters: dict[str, nn.Parameter] = {}
        self.targets = {}
        for name, shape in _SHAPES.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            target = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn, target = (value if part is None else _half(value, part) for value in (drawn, target))
            self.parameters[name] = torch.nn.Parameter(drawn.to(kind))
            self.targets[name] = target.to(kind)
        self.groups = [self._group(list(_SHAPES)[:-1], 1.0), self._group(["slower"], _FACTOR)]
        self.optimizer: Any = subject.build(groups=self.groups, lr=_LR)

    def _group(self, names: list[str], factor: float) -> dict[str, Any]:
        flags = [False] * len(names)
        params = [self.parameters[name] for name in names]
        return {"params": params, "names": names, "unit_rows": flags, "transposed": list(flags), "lr_factor": factor}

    def step(self, n: int = 1, *, lr: float = _LR, without: tuple[str, ...] = ()) -> None:
        """As the kernel does: the rate is set, and gradients are gone afterwards."""
        import torch

        for _ in range(n):
            for name, value in self.parameters.items():
                value.grad = None if name in without else (value - self.targets[name]).detach()
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
            with torch.no_grad():
                self.optimizer.step()
            for value in self.parameters.values():
                value.grad = None

    def off(self) -> float:
        """How far parameters are from their targets."""
        squares = [(value - self.targets[name]).square().sum() for name, value in self.parameters.items()]
        return float(sum(squares[1:], squares[0]))

    def values(self) -> dict[str, Any]:
        """A copy."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built for groups of parameters, and keeps to its protocol."""
    _Training(subject)


@CHECKS.add
def step(subject: Subject) -> None:
    """Steps bring parameters of every shape nearer to where their gradient is zero, in float32 and float64."""
    for dtype in ("float32", "float64"):
        training = _Training(subject, dtype)
        before, first = training.off(), training.values()
        training.step()
        for name, value in training.parameters.items():
            must(not value.equal(first[name]), f"a step leaves {name} ({list(value.shape)}) where it was ({dtype})")
            must(value.isfinite().all(), f"a step makes {name} no number ({dtype})")
        training.step(200)
        must(training.off() < before, f"200 steps lead away from the minimum: {before:.3g} became {training.off():.3g}")


@CHECKS.add
def groups(subject: Subject) -> None:
    """Its ``param_groups`` have every parameter once, with the settings of its group."""
    training = _Training(subject)
    found = {id(value): group for group in training.optimizer.param_groups for value in group["params"]}
    count = sum(len(group["params"]) for group in training.optimizer.param_groups)
    for name, value in training.parameters.items():
        group = found.get(id(value))
        must(group is not None, f"its param_groups lack the parameter {name}")
        factor = _FACTOR if name == "slower" else 1.0
        lr_factor = (group or {}).get("lr_factor")
        must(lr_factor == factor, f"the group of {name} has the lr_factor {lr_factor}, expected {factor}")
        must("lr" in (group or {}), f"the group of {name} has no lr")
    must(count == len(training.parameters), f"its param_groups have {count} parameters, given {len(_SHAPES)}")


@CHECKS.add
def rate(subject: Subject) -> None:
    """It follows the ``lr`` of each group as it is set before the step: at 0 nothing changes."""
    training = _Training(subject)
    training.step(3)
    before = training.values()
    training.step(3, lr=0.0)
    must_be_equal("parameters after steps with lr 0", training.values(), before)
    small, large = _Training(subject), _Training(subject)
    start = small.values()
    small.step(lr=_LR / 100)
    large.step(lr=_LR)
    for name in _SHAPES:
        moved = [float((one.parameters[name] - start[name]).detach().norm()) for one in (small, large)]
        must(moved[0] < moved[1], f"{name} moves by {moved[0]:.3g} at {_LR / 100}, and by {moved[1]:.3g} at {_LR}")


@CHECKS.add
def no_gradient(subject: Subject) -> None:
    """A parameter without a gradient stays as it is; gradients are not kept."""
    training = _Training(subject)
    training.step(2)
    before = training.values()
    training.step(2, without=("matrix", "number"))
    for name in ("matrix", "number"):
        must_be_equal(f"{name}, which has no gradient,", training.parameters[name].detach(), before[name])


@CHECKS.add
def state(subject: Subject) -> None:
    """A state is plain values and tensors; with it and the weights, a fresh one makes the very next steps."""
    for taken_after in (0, 1, 5):
        one, other = _Training(subject), _Training(subject)
        one.step(taken_after)
        saved = copy.deepcopy(one.optimizer.state_dict())
        weights = one.values()
        _must_be_plain(saved, subject.place)
        one.step(4)
        other.step(2)  # which the state that is loaded replaces
        for name, value in other.parameters.items():
            value.data.copy_(weights[name])
        other.optimizer.load_state_dict(saved)
        other.step(4)
        must_be_equal(f"weights after a state was loaded, of {taken_after} steps,", other.values(), one.values())


@CHECKS.add
def divided_state(subject: Subject) -> None:
    """Where it says ``elementwise``, what it keeps of a parameter is of its shape, or plain: parts make a whole."""
    training = _Training(subject)
    optimizer: Any = training.optimizer
    if not _is_elementwise(optimizer):
        return
    training.step(3)
    saved = optimizer.state_dict()
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    names = {id(value): name for name, value in training.parameters.items()}
    for number, parameter in enumerate(parameters):
        for key, value in saved["state"].get(number, {}).items():
            must(
                Shown(names[id(parameter)], parameter, None).divides(value),
                f"it says elementwise, and keeps {key} of {names[id(parameter)]} ({list(parameter.shape)}) as "
                f"{_what(value)}, which cannot be divided: keep it of that shape or as one number, or do not say so",
            )


def _is_elementwise(optimizer: object) -> bool:
    return isinstance(optimizer, Elementwise) and bool(optimizer.elementwise)


def _what(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {list(shape)}"


@CHECKS.add
def two_processes(subject: Subject) -> None:
    """Two processes that are given the same make the same steps; where it says ``elementwise``, each with half of every
    parameter makes the steps of one with all of it, also where it has the whole and updates half."""
    import torch

    def alike(world: World) -> tuple[dict[str, Any], dict[str, Any]]:
        training = _Training(subject, "float64")
        training.step(5)
        return training.values(), _parted(subject, world)

    def halves(world: World) -> dict[str, Any]:
        training = _Training(subject, "float64", part=world.features.rank)
        training.step(5)
        return training.values()

    alone = _Training(subject, "float64")
    alone.step(5)
    works: dict[Mesh, Callable[[World], Any]] = {DATA: alike}
    if _is_elementwise(alone.optimizer):
        works[FEATURES] = halves
    found = on_two(works, subject.place)
    for number, (own, _) in enumerate(found[DATA]):
        must_be_equal(f"weights after steps in process {number} of two", own, alone.values())
    if FEATURES in found:
        for name, value in alone.values().items():
            parts = [own[name] for own in found[FEATURES]]
            joined = torch.cat(parts) if value.dim() else parts[0]
            must_agree(f"{name} after steps of two processes with half of it each (elementwise)", joined, value, 1e-12)
    whole = _parted(subject)
    for number, (_, updated) in enumerate(found[DATA]):
        for name, value in whole.items():
            what = f"{name} after steps in process {number} of two, each of which updates its part in place"
            must_agree(what, updated[name], value, 1e-12)


def _parted(subject: Subject, world: World | None = None) -> dict[str, Any]:
    """Weights after steps as of training, in which each process of ``world`` has a part of every gradient, and updates
    half of the matrix, whose rows are features, where it says ``elementwise``; None: one process."""
    import torch

    from saekit.distributed import ALONE

    world, generator = world or ALONE, seeded()
    dims: dict[str, tuple[str, ...]] = {"matrix": ("d_sae", "d_in"), "other": ("d_in",)}
    table = ParameterTable(tuple(Parameter(name, dim, init=zeros) for name, dim in dims.items()), {})
    shapes = {"matrix": (8, 5), "other": (5,)}
    drawn, targets = (
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(2)
    )
    parameters = {name: torch.nn.Parameter(value) for name, value in drawn.items()}
    optimizer = ScheduledOptimizer(
        parameters.items(), subject.build, lambda step: _LR, table=table, rows=world.data, large=1
    )
    own = (2 * world.data.rank + 1) / world.data.size**2  # 1/4 and 3/4 of the whole
    for number in range(5):
        for name, value in parameters.items():
            value.grad = (value - targets[name]).detach() * own
            if (part := optimizer.parted.get(value)) is not None:
                part.sum_gradient()
            else:
                world.data.sum_(value.grad)
        optimizer.step(number)
    return {name: value.detach().clone() for name, value in parameters.items()}


def _half(value: Any, part: int) -> Any:
    return value.chunk(2)[part] if value.dim() else value


def _must_be_plain(saved: Any, place: Path) -> None:
    try:
        write_state(Path(tempfile.mkdtemp(dir=place)), "state", _by_texts(saved))
    except Exception as error:
        raise Fault(f"its state_dict cannot be saved: {error_text(error)}") from error


def _by_texts(value: Any) -> Any:
    """Torch numbers parameters; the kernel saves them by their names."""
    return {str(key): _by_texts(item) for key, item in value.items()} if isinstance(value, dict) else value
