"""SAE architectures that break a promise each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardKernel, StandardSAE
from support.faulty.case import cases
from torch import Tensor, nn

from saekit.values import StepInput, StepOutput

COUNT = itertools.count(1)


@attrs.frozen(kw_only=True)
class Config(StandardConfig):
    """That of an SAE with which nothing is wrong."""


def rounded(config: Any, **services: Any) -> Any:
    return StandardSAE(config, **services).float()


class Extra(StandardSAE):
    def __init__(self, config: Any, **services: Any) -> None:
        super().__init__(config, **services)
        self.extra = nn.Parameter(torch.zeros(3))


class Restless(StandardSAE):
    @classmethod
    def parameters_of(cls, config: Any) -> Any:
        first, *others = super().parameters_of(config)
        return (attrs.evolve(first, init=lambda start, shape: torch.full(shape, next(COUNT) / 100)), *others)


class Shifted(StandardSAE):
    """Has a bias of its own, which shifts with what is read."""

    def shift_pre_activations(self, shift: Tensor) -> None:
        pass


class Widening(StandardSAE):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Attached(StandardSAE):
    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        return super().losses(x, step)._replace(output=self(x))


class Drawing(StandardSAE):
    """Draws from where nobody can look."""

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        result = super().losses(x, step)
        return result._replace(loss=result.loss * next(COUNT))


class Deaf(StandardSAE):
    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        return super().losses(x, attrs.evolve(step, target=None if self.ports.same else step.target))


class WrongKernel(StandardKernel):
    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Any) -> StepOutput:
        result = super().step(sae, x, step, workspace)
        sae.b_dec.grad *= 1.0001
        return result


class Wrong(StandardSAE):
    step_kernels = (WrongKernel(),)


class Growing(StandardSAE):
    def after_update(self) -> None:
        pass


class Counting(StandardSAE):
    """Has a state that nobody saves."""

    steps = 0

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        self.steps += 1
        result = super().losses(x, step)
        return result._replace(loss=result.loss * self.steps)


class Unscaled(StandardSAE):
    @classmethod
    def parameters_of(cls, config: Any) -> Any:
        return tuple(attrs.evolve(entry, scale={}) for entry in super().parameters_of(config))


class Shifting(StandardSAE):
    def public_tensors(self) -> dict[str, Tensor]:
        tensors = super().public_tensors()
        return {**tensors, "b_dec": tensors["b_dec"] + 1}


class Lenient(StandardSAE):
    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.public_tensors()
        super().load_public_tensors({name: tensors.get(name, own[name]) for name in own})


class Teaching(StandardSAE):
    """Gives everything a gradient."""

    def training_step(self, x: Tensor, step: StepInput) -> StepOutput:
        result = super().training_step(x, step)
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return result


class Unpicklable(StandardSAE):
    def __init__(self, config: Any, **services: Any) -> None:
        super().__init__(config, **services)
        self.function = lambda x: x

    def __deepcopy__(self, memo: Any) -> Unpicklable:
        copy = Unpicklable(self.config, ports=self.ports, activation=self.activation)
        copy.load_state_dict(self.state_dict())
        return copy


class Partial(StandardSAE):
    """Says that its features may be split, and sums what is its own."""

    spreads_over = frozenset({"data", "features"})

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        features = self.activation(self.pre_activations(x))
        output = features @ self.W_dec + self.b_dec
        mse = (output - step.target_for(x)).square().sum(-1).mean()
        return StepOutput(mse, {"mse_loss": mse.detach()}, output.detach(), (features.detach() > 0).sum(0))


class OfOwnRows(StandardSAE):
    """Says that batches may be split, and weighs rows by those that it has."""

    spreads_over = frozenset({"data"})

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        found = super().losses(x, step)
        return found._replace(loss=found.loss * x.detach().mean(0).norm())


class OwnKernel(StandardKernel):
    """Says so too, and forgets to sum its penalty."""

    spreads_over = frozenset({"data", "features"})

    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Any) -> StepOutput:
        found = super().step(sae, x, step, workspace)
        own = found.losses["l1_loss"] / sae.share.parts
        return found._replace(losses={**found.losses, "l1_loss": own})


class OfKernel(StandardSAE):
    spreads_over = frozenset({"data", "features"})
    step_kernels = (OwnKernel(),)


class Uneven(StandardSAE):
    """Asks the others in one process alone."""

    spreads_over = frozenset({"data"})

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        if self.share.rows.rank:
            self.share.row_mean(x)
        return super().losses(x, step)


class Straying(StandardSAE):
    """Says that batches may be split, and changes weights after an update by what is another in each process."""

    spreads_over = frozenset({"data"})

    def after_update(self) -> None:
        super().after_update()
        self.W_dec.data *= 1 + 1e-6 * self.share.rows.rank


class Silent(StandardSAE):
    """Another loss, and not a word of many processes."""

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        found = super().losses(x, step)
        return found._replace(loss=found.loss * 2)


CASES = cases(
    "sae_architectures",
    {
        "build": ("with dtype float64 it is in torch.float32", rounded),
        "table": (r"extra is a parameter that its table \(parameters_of\) does not have", Extra),
        "initialization": ("starting values of the same seed, b_enc: other numbers", Restless),
        "inference": ("of torch.float32 it makes outputs in torch.float64", Widening),
        "step": ("its output is not detached", Attached),
        "draws": ("the loss: off by", Drawing),
        "targets": ("its loss is the same whatever step.target is", Deaf),
        "kernels": (r"the gradient of b_dec \(one site, fast kernels\): off by 0.0001", Wrong),
        "unit_rows": ("norms of rows of W_dec: off by", Growing),
        "two_processes": (r"the loss \(features split over 2 processes, one site, autograd\): off by", Partial),
        "checkpoint": ("the loss of a step from saved state: off by", Counting),
        "folding": (r"outputs after a scale was folded in \(one site\): off by", Unscaled),
        "mapping": (r"features after a map was folded in \(a target of another width\): off by", Shifted),
        "saving": (r"outputs after it was saved \(one site, None\): off by", Shifting),
        "wrong_tensors": ("a folder without .* is taken, expected a SAEFormatError", Lenient),
        "learn_only": ("has a gradient where it does not learn", Teaching),
        "copies": ("cannot be pickled: .*; define its class at a module's top level", Unpicklable),
    },
    config=Config,
)
