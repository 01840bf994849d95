"""What an eval promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.kinds import SAE_ARCHITECTURES
from saekit.site import Site, Sites
from saekit.testing.backend import FakeBackend
from saekit.testing.checks.check import Checks, Subject, must
from saekit.testing.checks.numbers import is_number, must_be_equal, seeded
from saekit.values import EvalRun

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SAEModule

CHECKS = Checks()
_SITES = Sites.one(Site(hook_name="blocks.0.hook_resid_post"))
_KEY = "saekit:standard"


def _contexts() -> Tensor:
    import torch

    return torch.randint(1, 120, (6, 16), generator=seeded())


def _sae(subject: Subject, *, d_sae: int = 24, seed: int = 0) -> SAEModule:
    """One of the built-in architecture, at the site."""
    import attrs

    from saekit.sae.build import build_module, initialize

    item = subject.plugins.get(SAE_ARCHITECTURES, _KEY)
    sae = build_module(item, item.entry.config(d_sae=d_sae), FakeBackend.d_model, subject.plugins)
    initialize(sae, seeded(seed))
    sae.info = attrs.evolve(sae.info, sites=_SITES)
    return sae


def _measured(measure: Any, sae: SAEModule, backend: FakeBackend | None = None, contexts: Tensor | None = None) -> Any:
    from saekit.evals.calling import called

    contexts = _contexts() if contexts is None else contexts
    found = called(measure, sae, backend=backend or FakeBackend(), sites=_SITES, contexts=contexts)
    return dict(found) if isinstance(found, dict) else found  # it may use the same again


def _built(subject: Subject) -> Any:
    run = EvalRun(
        name="sae",
        backend=FakeBackend(),
        sites=_SITES,
        device="cpu",
        steps=10,
        seed=0,
        open_contexts=_contexts,
    )
    return subject.build(run=run)


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options, and keeps to its protocol."""
    _built(subject)


@CHECKS.add
def numbers(subject: Subject) -> None:
    """It gives numbers by name."""
    found = _measured(_built(subject), _sae(subject))
    must(isinstance(found, dict), f"it returns {type(found).__name__}, expected a dict of numbers by name")
    for name, value in found.items():
        must(isinstance(name, str) and name.strip(), f"it calls a number {name!r}, expected a text")
        must(is_number(value), f"{name} is {value!r}, expected a plain number")


@CHECKS.add
def repeatable(subject: Subject) -> None:
    """The same SAE on the same contexts has the same numbers, however often it is measured."""
    measure, sae = _built(subject), _sae(subject)
    first = _measured(measure, sae)
    must_be_equal("the numbers of a second time", _measured(measure, sae), first)


@CHECKS.add
def leaves_the_sae(subject: Subject) -> None:
    """The SAE is as it was: weights, hooks, what learns, and the mode that it is in."""
    sae = _sae(subject)
    before = _state(sae)
    _measured(_built(subject), sae)
    must_be_equal("of the SAE, afterwards", _state(sae), before)


def _state(sae: SAEModule) -> dict[str, Any]:
    parameters = dict(sae.named_parameters())
    return {
        "weights": {name: value.detach().clone() for name, value in sae.state_dict().items()},
        "what learns": [name for name, value in parameters.items() if value.requires_grad],
        "gradients": [name for name, value in parameters.items() if value.grad is not None],
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in sae.modules()),
        "the mode": [part.training for part in sae.modules()],
        "use_error_term": sae.use_error_term,
        "kernels": sae.kernels,
    }


@CHECKS.add
def leaves_the_model(subject: Subject) -> None:
    """The model and the contexts are as they were."""
    backend, contexts = FakeBackend(), _contexts()
    weights = backend._embedding().clone()
    _measured(_built(subject), _sae(subject), backend, contexts)
    must_be_equal("the model's weights, afterwards,", backend._embedding(), weights)
    must_be_equal("the contexts, afterwards,", contexts, _contexts())


@CHECKS.add
def several(subject: Subject) -> None:
    """One that measures several SAEs, also of other sizes, keeps nothing of one for the next."""
    measure, one, other = _built(subject), _sae(subject), _sae(subject, d_sae=40, seed=1)
    expected = _measured(_built(subject), one)
    _measured(measure, other)
    must_be_equal("the numbers of an SAE after another's", _measured(measure, one), expected)
