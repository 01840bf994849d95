"""What a step kernel for architectures of others promises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from saekit.errors import SaekitError
from saekit.kinds import SAE_ARCHITECTURES
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.dictionaries import copied, made
from saekit.testing.checks.kernel_ways import must_infer_alike, must_step_alike

if TYPE_CHECKING:
    from saekit.pretrained.sae import SAE

CHECKS = Checks()
_D_SAE = 1024
"""So that few features are active, as sparse ways want it."""


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from the defaults of its options, as a :class:`saekit.kernels.StepKernel` for some type of device."""
    from saekit.kernels import StepKernel

    kernel = subject.build()
    must(isinstance(kernel, StepKernel), f"it builds a {type(kernel).__name__}, expected a saekit.kernels.StepKernel")
    devices = kernel.devices
    fine = isinstance(devices, Collection) and not isinstance(devices, str) and devices
    must(
        fine and all(isinstance(one, str) for one in devices), f"its devices are {devices!r}, expected {{'cuda'}} or so"
    )


@CHECKS.add
def serves(subject: Subject) -> None:
    """``Entry.serves`` has the qualified keys of architectures, such as ``saekit:topk``."""
    keys = subject.item.entry.serves
    must(
        not isinstance(keys, str) and len(keys),
        f"it serves {keys!r}, expected keys such as ('my-distribution:my_architecture',)",
    )
    for key in keys:
        try:
            right = subject.plugins.get(SAE_ARCHITECTURES, key).key
        except SaekitError as error:
            if ":" in key and key.partition(":")[0] not in _distributions(subject):
                continue  # its architecture is of a plugin that is not here
            raise Fault(str(error).splitlines()[0]) from error
        must(key == right, f"it serves {key!r}, which must be {right!r}: one of another distribution is another")


def _distributions(subject: Subject) -> set[str]:
    return {item.distribution for item in subject.plugins.registry(SAE_ARCHITECTURES).items}


@CHECKS.add
def copies(subject: Subject) -> None:
    """It can be copied and pickled, as SAEs are."""
    for other in (copy.deepcopy(subject.build()), pickle.loads(pickle.dumps(subject.build()))):
        must(other.devices == subject.build().devices, f"a copy is for {other.devices}")


@CHECKS.add
def refusals(subject: Subject) -> None:
    """It refuses, in words, where plain torch is asked for, and where the loss is compiled."""
    import torch

    from saekit.kernels import Use

    kernel = subject.build()
    for where, sae in _served(subject, kernel):
        for why, how in (('kernels="reference"', {"asked": "reference"}), ("a compiled loss", {"compiled": True})):
            for training in (True, False):
                use: Any = Use(training=training, device=torch.device(sae.device), dtype=sae.dtype, **how)
                reason = kernel.refuses(sae, use)
                must(isinstance(reason, str) and reason, f"with {why} it says {reason!r}, expected why not ({where})")


@CHECKS.add
def steps(subject: Subject) -> None:
    """Its steps are autograd's, of every architecture that it serves: reports, gradients, state, to 1e-9 in float64."""
    for where, fast, plain in _ways(subject):
        must_step_alike(fast, plain, where)


@CHECKS.add
def inference(subject: Subject) -> None:
    """Its features and outputs are those of plain torch, of every architecture that it serves, to 1e-9 in float64."""
    for where, fast, plain in _ways(subject):
        must_infer_alike(fast, plain, where)


def _served(subject: Subject, kernel: Any) -> Iterator[tuple[str, SAE]]:
    """An SAE of each architecture that it serves and that is here, where the kernel works."""
    import torch

    here = [kind for kind in sorted(kernel.devices) if kind == "cpu" or _is_here(kind)]
    if not here:
        raise NotTried(f"there is no {' or '.join(sorted(kernel.devices))} here")
    keys = subject.item.entry.serves
    items = [item for item in subject.plugins.registry(SAE_ARCHITECTURES).items if item.key in keys]
    if not items:
        raise NotTried(
            f"no architecture of {', '.join(keys)} is here: give its module, too, check_plugin(kernel, architecture), "
            f"and distribution={keys[0].partition(':')[0]!r} where it is not installed"
        )
    for item in items:
        architecture = attrs.evolve(subject, item=item, options=item.entry.config(d_sae=_D_SAE))
        yield item.key, made(architecture).to(torch.device(here[-1]))


def _is_here(kind: str) -> bool:
    import torch

    module = getattr(torch, kind, None)
    return bool(module is not None and getattr(module, "is_available", lambda: False)())


def _ways(subject: Subject) -> Iterator[tuple[str, SAE, SAE]]:
    """The architectures that the kernel does not refuse, each with an SAE that has it alone, and one that has none."""
    from saekit.kernels.kernel import Served

    kernel, refused, tried = subject.build(), [], False
    for where, plain in _served(subject, kernel):
        fast: Any = copied(plain, "fast")
        fast.served_by, fast.step_kernels = Served([kernel]), ()
        if (reason := fast.why_reference()) is not None:
            refused.append(f"{where}: {reason}")
            continue
        tried = True
        yield where, fast, plain
    if not tried:
        raise NotTried("; ".join(refused))
