"""Dictionaries of an architecture to try it with, and what comes of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from saekit.errors import SaekitError
from saekit.site import Site
from saekit.testing.checks.check import Fault, NotTried, Subject
from saekit.testing.checks.numbers import must_agree, seeded
from saekit.values import Ports, StepInput, StepOutput

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.pretrained.sae import SAE

__all__ = [
    "ONE",
    "PORTS",
    "ROWS",
    "copied",
    "inputs",
    "made",
    "methods",
    "must_be_one_step",
    "rows",
    "step_input",
    "stepped",
    "takes",
    "uninitialized",
    "with_factors",
]

ROWS = 24
ONE = Ports.one(6, Site().name)
PORTS = {
    "one site": ONE,
    "two sites": Ports({"a": 4, "b": 3}),
    "a target of another width": Ports({"a": 5}, {"b": 7}),
    "two inputs and three targets": Ports({"a": 4, "b": 3}, {"c": 2, "d": 5, "e": 1}),
}
"""What a dictionary may read and write, in words."""
_D_SAE = 48


def uninitialized(subject: Subject, ports: Ports = ONE, dtype: str = "float64") -> SAE:
    """A dictionary as the kernel makes it, before it has any weights."""
    from saekit.sae.build import build_module

    options = attrs.evolve(
        subject.options, d_in=None, d_sae=subject.options.d_sae or _D_SAE, expansion_factor=None, dtype=dtype
    )
    if not ports.same:  # what is for one site that is both
        options = attrs.evolve(options, apply_b_dec_to_input=False, init_encoder_as_decoder_transpose=False)
    found: Any = build_module(subject.item, options, ports, subject.plugins)
    return found  # type: ignore[no-any-return]


def made(subject: Subject, ports: Ports = ONE, *, seed: int = 0) -> SAE:
    """One in float64 with weights of which none is like another, after two steps, in which it may count or average.

    It is made once, and each check gets a copy.
    """
    widths = (tuple(ports.inputs.items()), tuple(ports.targets.items()))
    if (what := ("made", widths, seed)) not in subject.known:
        subject.known[what] = _made(subject, ports, seed)
    return copied(subject.known[what])


def _made(subject: Subject, ports: Ports, seed: int) -> SAE:
    from saekit.sae.build import initialize

    sae = uninitialized(subject, ports)
    x, target = rows(ports)
    initialize(sae, seeded(seed), x, target=target, scale=1.0, target_scale=1.0)
    _stir(sae, seed)
    sae.kernels = "reference"
    for step in range(2 if sae.why_no_training is None else 0):
        stepped(sae, step=step, seed=step + 1)
        sae.zero_grad(set_to_none=True)
    sae.kernels = "auto"
    return sae


def _stir(sae: SAE, seed: int) -> None:
    """Move every weight a little: numbers that are alike would hide which is which."""
    import torch

    generator = seeded(seed + 100)
    with torch.no_grad():
        for parameter in sae.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            if spread > 0:
                parameter.add_(0.1 * spread * drawn)
            else:  # a constant: a number of another sign could mean something else
                parameter.mul_(1 + 0.2 * drawn.tanh()).add_(0.05 * drawn * (parameter == 0))
        sae.after_update()


def takes(subject: Subject) -> Iterator[tuple[str, Ports]]:
    """The ports that the architecture takes, in words and in numbers."""
    for name, ports in PORTS.items():
        if (what := ("takes", name)) not in subject.known:
            try:
                uninitialized(subject, ports)
            except (SaekitError, ValueError):
                if ports is ONE:
                    raise
                subject.known[what] = False
            else:
                subject.known[what] = True
        if subject.known[what]:
            yield name, ports


def rows(ports: Ports, n: int = ROWS, seed: int = 5) -> tuple[Tensor, Tensor | None]:
    """Rows ``[n, d_in]``, and targets ``[n, d_out]``, or None where they are the rows."""
    import torch

    generator = seeded(seed)
    x = torch.randn(n, ports.d_in, generator=generator, dtype=torch.float64) * 2 + 0.3
    return x, None if ports.same else torch.randn(n, ports.d_out, generator=generator, dtype=torch.float64) - 0.2


def inputs(sae: SAE) -> Tensor:
    """``[..., d_in]``, as it takes them: rows, or the same rows as sequences."""
    x, _ = rows(sae.ports)
    return x.reshape(4, -1, sae.d_in) if sae.reads_sequences else x


def step_input(sae: SAE, *, step: int = 3, dead: float = 0.0, target: Tensor | None = None) -> StepInput:
    """For a step; ``dead`` is the part of the features that is.  What is for inference alone has no steps."""
    import torch

    if sae.why_no_training is not None:
        raise NotTried(f"it is for inference alone: {sae.why_no_training}")
    mask = None
    if dead:
        mask = (torch.rand(sae.d_sae, generator=seeded(9)) < dead).to(sae.device)
    return StepInput(step=step, steps=10, generator=seeded(7), dead=mask, target=target)


def stepped(sae: SAE, *, n: int = ROWS, seed: int = 5, **how: Any) -> StepOutput:
    """A training step, which leaves gradients; by the way that ``sae.kernels`` says."""
    x, target = (None if one is None else one.to(sae.device) for one in rows(sae.ports, n, seed))
    return sae.training_step(x, step_input(sae, target=target, **how))  # type: ignore[arg-type]


def must_be_one_step(
    sae: SAE, one: StepOutput, reference: SAE, other: StepOutput, *, tolerance: float = 1e-9, where: str = ""
) -> None:
    """Two ways of a step found the same: what they report, the gradients, and the state that they leave."""
    import torch

    must_agree(f"the loss{where}", one.loss, other.loss, tolerance)
    must_agree(f"output{where}", one.output, other.output, tolerance)
    must_agree(f"fired{where}", one.fired, other.fired, 0)
    for what in ("losses", "coefficients", "metrics"):
        found, expected = getattr(one, what), getattr(other, what)
        for name in {**found, **expected}:
            if name not in found or name not in expected:
                raise Fault(f"{name} is among {what} of one way alone{where}")
            own, right = (torch.as_tensor(value, dtype=torch.float64) for value in (found[name], expected[name]))
            must_agree(f"{name} of {what}{where}", own, right, tolerance)
    gradients = dict(reference.named_parameters())
    for name, parameter in sae.named_parameters():
        own, right = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, gradients[name]))
        must_agree(f"the gradient of {name}{where}", own, right, tolerance)
    buffers = dict(reference.named_buffers())
    for name, buffer in sae.named_buffers():
        must_agree(f"the buffer {name} after the step{where}", buffer, buffers[name], tolerance)


def copied(sae: SAE, kernels: Any = None) -> SAE:
    """One of its own, which goes another way if wanted.

    What never changes is shared: to copy that, too, would take most of the time.
    """
    from saekit.sae.hooks import HookPoint

    points = [point for point in sae.children() if isinstance(point, HookPoint) and not point.hooked]
    found = copy.deepcopy(sae, {id(one): one for one in (sae.config, sae.ports, sae.info, sae.table, *points)})
    if kernels is not None:
        found.kernels = kernels
    return found


def methods(sae: SAE) -> list[str]:
    """The ways to fine-tune that its table knows."""
    return list(dict.fromkeys(method for entry in sae.table for method in entry.groups))


def with_factors(sae: SAE, method: str | None) -> SAE:
    """With factors that ``method`` trains, none of them 1."""
    import torch

    if method is not None:
        sae.add_factors_for(method)
        with torch.no_grad():
            for entry in sae.table:
                if entry.optional and (value := getattr(sae, entry.name)) is not None:
                    value.copy_(0.5 + torch.rand(value.shape, generator=seeded(3), dtype=torch.float64))
    return sae
