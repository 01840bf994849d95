"""What an eval promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.defaults import DEFAULT_ARCHITECTURE
from saekit.errors import PluginFailedError, SaekitError
from saekit.kinds import SAE_ARCHITECTURES
from saekit.site import Site, Sites
from saekit.testing.backend import FakeBackend
from saekit.testing.checks.check import Checks, NotTried, Subject, must
from saekit.testing.checks.numbers import is_number, must_be_equal, seeded
from saekit.values import EvalRun, Ports

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SAEModule

CHECKS = Checks()
_EARLY, _LATE = (Site(hook_name=f"blocks.{block}.hook_resid_post") for block in (0, 1))
_HEAD = Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)  # of another width than those
_ONE = Sites.one(_EARLY)
_TRANSCODER = Sites((_HEAD,), (_LATE,))
_SEVERAL = Sites((_EARLY, _HEAD), (_HEAD, _LATE, _EARLY))


def _contexts() -> Tensor:
    import torch

    return torch.randint(1, 120, (6, 16), generator=seeded())


def _sae(subject: Subject, sites: Sites = _ONE, *, d_sae: int = 24, seed: int = 0) -> SAEModule:
    """One of the built-in architecture, at ``sites``."""
    import attrs

    from saekit.data.stream import probe
    from saekit.sae.build import build_module, initialize

    item = subject.plugins.get(SAE_ARCHITECTURES, DEFAULT_ARCHITECTURE)
    ports = Ports.of(sites, {site: width for site, (width, _) in probe(FakeBackend(), sites.all).items()})
    of_one = {} if sites.same else {"apply_b_dec_to_input": False, "init_encoder_as_decoder_transpose": False}
    sae = build_module(item, item.entry.config(d_sae=d_sae, **of_one), ports, subject.plugins)
    initialize(sae, seeded(seed))
    sae.info = attrs.evolve(sae.info, sites=sites)
    return sae


def _measured(
    measure: Any,
    sae: SAEModule,
    backend: FakeBackend | None = None,
    contexts: Tensor | None = None,
    sites: Sites = _ONE,
) -> Any:
    from saekit.evals.calling import called

    contexts = _contexts() if contexts is None else contexts
    found = called(measure, sae, backend=backend or FakeBackend(), sites=sites, contexts=contexts)
    return dict(found) if isinstance(found, dict) else found  # it may use the same again


def _built(subject: Subject, sites: Sites = _ONE) -> Any:
    run = EvalRun(
        name="sae",
        backend=FakeBackend(),
        sites=sites,
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
    _must_be_numbers(_measured(_built(subject), _sae(subject)))


def _must_be_numbers(found: object) -> None:
    must(isinstance(found, dict), f"it returns {type(found).__name__}, expected a dict of numbers by name")
    assert isinstance(found, dict)
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


@CHECKS.add
def transcoder(subject: Subject) -> None:
    """A dictionary that reads one site and writes another, of another width, is measured as well; or refused, by an
    error of saekit's, when the eval is built for its sites."""
    _must_measure(subject, _TRANSCODER)


@CHECKS.add
def several_sites(subject: Subject) -> None:
    """So is one that reads several sites and writes several."""
    _must_measure(subject, _SEVERAL)


def _must_measure(subject: Subject, sites: Sites) -> None:
    sae = _sae(subject, sites)
    before = _state(sae)
    try:
        measure = _built(subject, sites)
    except PluginFailedError:  # whatever else its build raises
        raise
    except SaekitError as error:
        raise NotTried(f"it refuses: {error}") from None
    found = _measured(measure, sae, sites=sites)
    _must_be_numbers(found)
    must_be_equal("the numbers of a second time", _measured(measure, sae, sites=sites), found)
    must_be_equal("of the dictionary, afterwards", _state(sae), before)
