"""How evals are called, wherever it is: as strangers, who compute numbers and no gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from saekit.abilities import Accumulates
from saekit.ambient import ambient
from saekit.distributed.group import ONE, Group
from saekit.evals.engine import batch_size_of, measure, together
from saekit.evals.measured import Guard, Measured
from saekit.protocols import Eval, ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.tokens import TokenChoice, special_ids

__all__ = ["Asked", "Told", "all_called", "called", "summed"]


@attrs.frozen(eq=False)
class Asked:
    """An SAE, and what is measured of it."""

    sae: SAEModule
    sites: Sites
    evals: Mapping[str, Eval]
    guard: Guard = nullcontext
    """``guard(name)`` surrounds what each eval does."""
    outline: SAEModule | None = None
    """Where ``sae`` is a part: see :attr:`saekit.evals.measured.Measured.outline`."""


@attrs.frozen(eq=False)
class Told:
    """What evals say of an SAE."""

    found: Mapping[str, Any]
    """What each gives, by its name: of those that accumulate, numbers with standard errors, ``NAME_se``."""
    remarks: tuple[str, ...] = ()
    """What looks wrong, in words."""


def called(measure: Any, sae: SAEModule, *, backend: ModelBackend, sites: Sites, contexts: Tensor | None) -> Any:
    """What the eval ``measure`` finds of ``sae``; see :class:`saekit.protocols.Eval`.

    Gradients are off, since what hooks hold is not for autograd; an eval that wants them turns them on, and asks the
    model for them (``grad=True``).  What it sets and leaves of torch's own state, nobody sees.
    """
    with ambient(), torch.no_grad():
        return measure(sae, backend=backend, sites=sites, contexts=contexts)


Summed: TypeAlias = Sequence[Mapping[str, Any]]
"""Of each SAE what its evals that accumulate have summed up, by their names."""


def all_called(
    asked: Sequence[Asked],
    *,
    backend: ModelBackend,
    contexts: Tensor | None,
    mask: Tensor | None = None,
    known: Summed | None = None,
) -> list[Told]:
    """What is found of each SAE of ``asked``: the very numbers that it would be measured with alone.

    Evals that accumulate share each clean forward of the model, those of all SAEs.  Tokens that do not count for an SAE
    are left out there, and those where ``mask [n, t]`` is false.  Of evals that are ``known`` the sums are there.
    """
    known = [{}] * len(asked) if known is None else known
    left = [
        attrs.evolve(one, evals={name: made for name, made in one.evals.items() if name not in sums})
        for one, sums in zip(asked, known, strict=True)
    ]
    made = [{}] * len(asked) if contexts is None else summed(left, backend=backend, contexts=contexts, mask=mask)
    told = []
    for one, sums in zip(asked, [{**there, **new} for there, new in zip(known, made or [], strict=True)], strict=True):
        found: dict[str, Any] = dict.fromkeys(one.evals)
        remarks: dict[str, None] = {}
        for name, state in sums.items():
            with one.guard(name), ambient(), torch.no_grad():
                result = one.evals[name].result(state)  # type: ignore[attr-defined]  # it accumulates
                found[name] = result.numbers()
                remarks |= dict.fromkeys(result.remarks)
        for name in [name for name in one.evals if name not in sums]:
            with one.guard(name):
                found[name] = called(one.evals[name], one.sae, backend=backend, sites=one.sites, contexts=contexts)
        told.append(Told(found, tuple(remarks)))
    return told


def summed(
    asked: Sequence[Asked], *, backend: ModelBackend, contexts: Tensor, mask: Tensor | None, among: Group = ONE
) -> Summed | None:
    """What the evals that accumulate have summed up of each.

    Contexts are dealt out ``among`` several processes, all of which must ask; None in all but the first.
    """
    special = special_ids(backend)
    subjects = []
    for one in asked:
        accumulating = {name: made for name, made in one.evals.items() if isinstance(made, Accumulates)}
        choice = TokenChoice.of_metadata(one.sae.info.metadata, special)
        subjects.append(Measured(one.sae, one.sites, accumulating, choice, one.guard, one.outline))
    found: dict[int, Mapping[str, Any]] = {}
    for numbers in _alike(subjects, backend, contexts.shape[1]):
        chosen = [subjects[number] for number in numbers]
        own = measure(chosen, backend=backend, contexts=contexts, mask=mask, among=among)
        found |= zip(numbers, together(chosen, own, among) or own, strict=True)
    return None if among.rank else [found.get(number, {}) for number in range(len(asked))]


def _alike(subjects: Sequence[Measured], backend: ModelBackend, context_size: int) -> Iterable[list[int]]:
    """Which of ``subjects`` go into one pass: batches of other sizes, and losses by way of logits, round otherwise."""
    groups: dict[object, list[int]] = {}
    for number, subject in enumerate(subjects):
        if subject.evals:
            key = subject.needs, batch_size_of([subject], backend, context_size)
            groups.setdefault(key, []).append(number)
    return groups.values()
