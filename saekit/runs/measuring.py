"""What evals find of the SAEs of a session: those that are measured on the same contexts share forwards."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from saekit.evals.calling import Asked, Told, all_called
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.building import blamed, unless_ours
from saekit.runs.checks import chosen_evals
from saekit.runs.session import Member, Session
from saekit.training.metrics import eval_metrics, numbers_of
from saekit.values import Histogram

__all__ = ["evaluate"]


def evaluate(session: Session, members: Collection[Member]) -> dict[str, dict[str, float | Histogram]]:
    """Of each of ``members``, by its name, what its evals find, under the names that are logged.

    What looks wrong with it is noted in :attr:`Member.remarks`.
    """
    groups: dict[int, tuple[Tensor | None, Tensor | None, list[Member]]] = {}
    for member in members:
        if member.evals:
            held_out, mask = session.held_out_masked(member.config)
            groups.setdefault(id(held_out), (held_out, mask, []))[2].append(member)
    found: dict[str, dict[str, float | Histogram]] = {member.name: {} for member in members}
    for held_out, mask, group in groups.values():
        asked = [_asked(session, member) for member in group]
        if not session.world.main:  # which has taken part in putting them together
            continue
        for member, one, told in zip(group, asked, _told(session, group, asked, held_out, mask), strict=True):
            numbers: dict[str, float] = {}
            for key, value in told.found.items():
                numbers |= numbers_of(key, value)
            found[member.name] = eval_metrics(one.sae, numbers)
            member.remarks = told.remarks
    return found


def _asked(session: Session, member: Member) -> Asked:
    guard = functools.partial(_guard, session, member)
    return Asked(member.trainer.raw_sae(), member.config.sites, member.evals, guard)


def _told(
    session: Session, group: Sequence[Member], asked: Sequence[Asked], held_out: Tensor | None, mask: Tensor | None
) -> list[Told]:
    """Of those that are measured on the same contexts."""
    if len(session.members) == 1:
        session.say("measuring the SAE" if held_out is None else "measuring on held-out text")
    else:
        session.say(f"measuring {group[0].name}" if len(group) == 1 else f"measuring {len(group)} SAEs")
    try:
        # No source's thread may run the model while its hooks are in place.
        with session.model_lock, unless_ours(asked[0].guard(next(iter(asked[0].evals)))):
            return all_called(asked, backend=session.backend, contexts=held_out, mask=mask)
    finally:
        for member in group:
            for parameter in member.trainer.sae.parameters():
                parameter.grad = None


def _guard(session: Session, member: Member, key: str) -> AbstractContextManager[None]:
    """Says whose fault it is what goes wrong in the eval ``key``."""
    model = session.plugins.find(MODEL_BACKENDS, member.config.model.backend), session.backend
    return blamed(chosen_evals(member.config, session.plugins)[key].item, "__call__", at_work=True, parts=[model])
