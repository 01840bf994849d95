"""What evals find of the SAEs of a session: those that are measured on the same contexts share forwards."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import attrs
from torch import Tensor

from saekit.distributed.agreement import by_first
from saekit.evals.calling import Asked, Told, all_called, summed
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.building import blamed, unless_ours
from saekit.runs.checks import chosen_evals
from saekit.runs.session import Member, Session
from saekit.runs.spreading import sharing
from saekit.sae.splitting import infers_by_parts, outline_of
from saekit.training.metrics import as_one, eval_metrics, numbers_of, weight_metrics
from saekit.values import Histogram

__all__ = ["evaluate"]


def evaluate(session: Session, members: Collection[Member]) -> dict[str, dict[str, float | Histogram]]:
    """Of each of ``members``, by its name, what its evals find, under the names that are logged.

    What looks wrong with it is noted in :attr:`Member.remarks`.  Of several processes all must ask, and the first is
    told.
    """
    groups: dict[int, tuple[Tensor | None, Tensor | None, list[Member]]] = {}
    for member in members:
        if member.evals and member.here:
            held_out, mask = session.held_out_masked(member.config)
            groups.setdefault(id(held_out), (held_out, mask, []))[2].append(member)
    found: dict[str, dict[str, float | Histogram]] = {member.name: {} for member in members}
    _measure(session, groups.values(), found)
    return _of_all(session, members, found)


_Numbers: TypeAlias = tuple[dict[str, float], tuple[str, ...]]
"""What evals say of an SAE, all as one, and what looks wrong with it, in words."""

_Groups: TypeAlias = Collection[tuple[Tensor | None, Tensor | None, list[Member]]]
"""Those that are measured on the same contexts, with these and their mask."""


def _measure(session: Session, groups: _Groups, found: dict[str, dict[str, float | Histogram]]) -> None:
    for held_out, mask, group in groups:
        asked = [_asked(session, member) for member in group]
        weights = [weight_metrics(one.sae) for one in asked]
        told = _told(session, group, asked, held_out, mask)
        for member, histograms, (numbers, remarks) in zip(group, weights, told or [], strict=told is not None):
            found[member.name] = eval_metrics(numbers) | histograms
            member.remarks = remarks


def _of_all(
    session: Session, members: Collection[Member], found: Mapping[str, dict[str, float | Histogram]]
) -> dict[str, dict[str, float | Histogram]]:
    """``found`` with what other processes have of the SAEs that they train, who are waited for while they measure."""
    own = {member.name: (found[member.name], member.remarks) for member in members if member.here}
    every = {name: told for part in session.world.saes.objects(own) for name, told in part.items()}
    for member in members:
        member.remarks = every[member.name][1]
    return {member.name: every[member.name][0] for member in members}


def _asked(session: Session, member: Member) -> Asked:
    guard = functools.partial(_guard, session, member)
    trainer, sites = member.trainer, member.config.sites
    if not infers_by_parts(trainer.sae):
        return Asked(trainer.raw_sae(), sites, member.evals, guard)
    part = trainer.raw_part()
    return Asked(part, sites, member.evals, guard, outline_of(part))


def _told(
    session: Session, group: Sequence[Member], asked: Sequence[Asked], held_out: Tensor | None, mask: Tensor | None
) -> list[_Numbers] | None:
    """Of those that are measured on the same contexts; None in all processes but the first."""
    if len(session.members) == 1:
        session.say("measuring the SAE" if held_out is None else "measuring on held-out text")
    else:
        session.say(f"measuring {group[0].name}" if len(group) == 1 else f"measuring {len(group)} SAEs")
    try:
        # No source's thread may run the model while its hooks are in place.
        with session.model_lock, unless_ours(asked[0].guard(next(iter(asked[0].evals)))):
            return _by_all(session, group, asked, held_out, mask)
    finally:
        for member in group:
            for parameter in member.trainer.sae.parameters():
                parameter.grad = None


def _by_all(
    session: Session, group: Sequence[Member], asked: Sequence[Asked], held_out: Tensor | None, mask: Tensor | None
) -> list[_Numbers] | None:
    """Contexts are dealt out for the evals that say that theirs can be; the first process does all others, and what
    is left."""
    world, backend, known = session.world.column, session.backend, None
    if world.size > 1 and held_out is not None:
        # The processes that have the parts of an SAE work on the same contexts.
        among = world.all if all(one.outline is None for one in asked) else world.data
        shared = [attrs.evolve(one, evals=sharing(one.evals)) for one in asked]
        known = summed(shared, backend=backend, contexts=held_out, mask=mask, among=among)
    whole = [
        attrs.evolve(one, sae=member.trainer.raw_sae(), outline=None)
        if one.outline is not None and (held_out is None or len(sharing(one.evals)) < len(one.evals))
        else one
        for member, one in zip(group, asked, strict=True)
    ]

    def rest() -> list[_Numbers]:  # with what is wrong in it: one process alone cannot fail while others wait for it
        told = all_called(whole, backend=backend, contexts=held_out, mask=mask, known=known)
        return [_as_one(one) for one in told]

    return by_first(world.all, rest)


def _as_one(told: Told) -> _Numbers:
    """Of numbers of one name the first: a run goes on where evals that it was started with contradict each other."""
    numbers, doubts = as_one({key: numbers_of(key, value) for key, value in told.found.items()})
    return numbers, (*told.remarks, *doubts)


def _guard(session: Session, member: Member, key: str) -> AbstractContextManager[None]:
    """Says whose fault it is what goes wrong in the eval ``key``."""
    model = session.plugins.find(MODEL_BACKENDS, member.config.model.backend), session.backend
    return blamed(chosen_evals(member.config, session.plugins)[key].item, "__call__", at_work=True, parts=[model])
