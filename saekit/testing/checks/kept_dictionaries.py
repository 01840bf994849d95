"""What an SAE architecture promises of what is kept: checkpoints, folders, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit.errors import SAEFormatError
from saekit.reasons import error_text
from saekit.runs.state_files import read_state, write_state
from saekit.site import Site, Sites
from saekit.testing.checks.check import Checks, Fault, Subject, must
from saekit.testing.checks.dictionaries import (
    ONE,
    copied,
    inputs,
    made,
    methods,
    must_be_one_step,
    stepped,
    takes,
    with_factors,
)
from saekit.testing.checks.numbers import must_agree, must_be_equal
from saekit.values import Ports

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.pretrained.sae import SAE

__all__ = ["KEPT"]

KEPT = Checks()
_EXACT = 1e-9


@KEPT.add
def checkpoint(subject: Subject) -> None:
    """Its state is that of its module: a fresh one that takes it over makes the very next steps."""
    sae = made(subject)
    stepped(sae)
    sae.zero_grad(set_to_none=True)
    write_state(subject.place, "state", dict(sae.state_dict()))
    fresh = made(subject, seed=1)
    fresh.load_state_dict(read_state(subject.place, "state"))
    for number in (2, 3):
        expected, found = stepped(sae, step=number, seed=number), stepped(fresh, step=number, seed=number)
        must_be_one_step(fresh, found, sae, expected, tolerance=0, where=" of a step from saved state")
        for one in (sae, fresh):
            one.zero_grad(set_to_none=True)


@KEPT.add
def saving(subject: Subject) -> None:
    """It is saved and loaded again as the same, with factors of fine-tuning, too; twice moves no digit."""
    for where, ports in takes(subject):
        for method in (None, *(methods(made(subject, ports)) if ports is ONE else ())):
            sae = with_factors(made(subject, ports), method)
            sae.info = attrs.evolve(sae.info, sites=_sites(ports), metadata={"model_name": "fake"})
            folder = subject.place / f"{where} {method}"
            again = _saved(sae, folder / "once", subject)
            must(type(again) is type(sae), f"it is loaded as {type(again).__name__}")
            must(again.ports == sae.ports, f"it is loaded with the ports {again.ports}, expected {sae.ports}")
            must(again.info.sites == sae.info.sites, f"it is loaded with the sites {again.info.sites}")
            x = inputs(sae)
            must_agree(f"outputs after it was saved ({where}, {method})", again(x), sae(x), _EXACT)
            twice = _saved(again, folder / "twice", subject)
            must_be_equal(f"tensors saved twice ({where})", twice.public_tensors(), again.public_tensors())


def _sites(ports: Ports) -> Sites:
    """Those whose names are the ports'."""
    inputs, targets = (tuple(Site(hook_name=name) for name in widths) for widths in (ports.inputs, ports.targets))
    return Sites(inputs) if ports.same else Sites(inputs, targets)


def _saved(sae: SAE, folder: Any, subject: Subject) -> SAE:
    from saekit.pretrained.sae import SAE
    from saekit.sae.folder import save_sae

    folder.parent.mkdir(exist_ok=True)
    save_sae(sae, folder)
    return SAE.load(folder, plugins=subject.plugins)


@KEPT.add
def wrong_tensors(subject: Subject) -> None:
    """Tensors that do not fit are refused: one that is missing, one that is unknown, one of another shape."""
    sae = made(subject)
    tensors: Mapping[str, Tensor] = sae.public_tensors()
    for what, given in _wrong(tensors):
        try:
            copied(sae).load_public_tensors(given)
        except SAEFormatError:
            continue
        except Exception as error:
            raise Fault(f"{what} raises {error_text(error)}, expected a SAEFormatError") from error
        raise Fault(f"{what} is taken, expected a SAEFormatError")


def _wrong(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    import torch

    for name, value in tensors.items():
        others = {other: tensors[other] for other in tensors if other != name}
        yield f"a folder without {name}", others
        yield f"{name} of another shape", others | {name: torch.cat([value.flatten(), value.flatten()])}
    yield "an unknown tensor", {**tensors, "nobody_knows_it": torch.zeros(3)}


@KEPT.add
def copies(subject: Subject) -> None:
    """It can be copied and pickled, also to other processes; a copy has weights of its own."""
    import torch

    sae = made(subject)
    x = inputs(sae)
    expected = sae(x)
    try:
        again = pickle.loads(pickle.dumps(sae))
    except Exception as error:
        raise Fault(f"it cannot be pickled: {error_text(error)}; define its class at a module's top level") from error
    must_be_equal("outputs of what was pickled", again(x), expected)
    with torch.no_grad():
        for value in copy.deepcopy(sae).parameters():
            value.zero_()
    must_be_equal("outputs after a copy was changed", sae(x), expected)
