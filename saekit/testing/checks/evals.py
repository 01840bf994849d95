"""What an eval promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.errors import PluginFailedError, SaekitError
from saekit.site import Sites
from saekit.testing.backend import FakeBackend
from saekit.testing.checks import accumulating_evals
from saekit.testing.checks.check import Checks, NotTried, Subject, must
from saekit.testing.checks.measured_saes import ONE, SEVERAL, TRANSCODER, built_for, some_contexts, some_sae
from saekit.testing.checks.numbers import is_number, must_be_equal

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SAEModule

CHECKS = Checks()


def _measured(
    measure: Any,
    sae: SAEModule,
    backend: FakeBackend | None = None,
    contexts: Tensor | None = None,
    sites: Sites = ONE,
) -> Any:
    from saekit.evals.calling import called

    contexts = some_contexts() if contexts is None else contexts
    found = called(measure, sae, backend=backend or FakeBackend(), sites=sites, contexts=contexts)
    return dict(found) if isinstance(found, dict) else found  # it may use the same again


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options, and keeps to its protocol."""
    built_for(subject)


@CHECKS.add
def numbers(subject: Subject) -> None:
    """It gives numbers by name."""
    _must_be_numbers(_measured(built_for(subject), some_sae(subject)))


def _must_be_numbers(found: object) -> None:
    must(isinstance(found, dict), f"it returns {type(found).__name__}, expected a dict of numbers by name")
    assert isinstance(found, dict)
    for name, value in found.items():
        must(isinstance(name, str) and name.strip(), f"it calls a number {name!r}, expected a text")
        must(is_number(value), f"{name} is {value!r}, expected a plain number")


@CHECKS.add
def repeatable(subject: Subject) -> None:
    """The same SAE on the same contexts has the same numbers, however often it is measured."""
    measure, sae = built_for(subject), some_sae(subject)
    first = _measured(measure, sae)
    must_be_equal("the numbers of a second time", _measured(measure, sae), first)


@CHECKS.add
def leaves_the_sae(subject: Subject) -> None:
    """The SAE is as it was: weights, hooks, what learns, and the mode that it is in."""
    sae = some_sae(subject)
    before = _state(sae)
    _measured(built_for(subject), sae)
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
    backend, contexts = FakeBackend(), some_contexts()
    weights = backend._embedding().clone()
    _measured(built_for(subject), some_sae(subject), backend, contexts)
    must_be_equal("the model's weights, afterwards,", backend._embedding(), weights)
    must_be_equal("the contexts, afterwards,", contexts, some_contexts())


@CHECKS.add
def several(subject: Subject) -> None:
    """One that measures several SAEs, also of other sizes, keeps nothing of one for the next."""
    measure, one, other = built_for(subject), some_sae(subject), some_sae(subject, d_sae=40, seed=1)
    expected = _measured(built_for(subject), one)
    _measured(measure, other)
    must_be_equal("the numbers of an SAE after another's", _measured(measure, one), expected)


@CHECKS.add
def transcoder(subject: Subject) -> None:
    """A dictionary that reads one site and writes another, of another width, is measured as well; or refused, by an
    error of saekit's, when the eval is built for its sites."""
    _must_measure(subject, TRANSCODER)


@CHECKS.add
def several_sites(subject: Subject) -> None:
    """So is one that reads several sites and writes several."""
    _must_measure(subject, SEVERAL)


def _must_measure(subject: Subject, sites: Sites) -> None:
    sae = some_sae(subject, sites)
    before = _state(sae)
    try:
        measure = built_for(subject, sites)
    except PluginFailedError:  # whatever else its build raises
        raise
    except SaekitError as error:
        raise NotTried(f"it refuses: {error}") from None
    found = _measured(measure, sae, sites=sites)
    _must_be_numbers(found)
    must_be_equal("the numbers of a second time", _measured(measure, sae, sites=sites), found)
    must_be_equal("of the dictionary, afterwards", _state(sae), before)


CHECKS.extend(accumulating_evals.CHECKS)
