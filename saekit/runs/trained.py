"""The SAEs of a session when they have made their steps: saved, judged, and handed to whoever asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from saekit.backends.around import LoadedModel
from saekit.distributed.agreement import done_by_all
from saekit.distributed.group import Group
from saekit.plugins.manager import PluginManager
from saekit.pretrained.sae import SAE
from saekit.reports.pictures import Pictures
from saekit.runs.doubts import doubts_of_density, doubts_of_features
from saekit.runs.opening import warn_of
from saekit.runs.record import RunRecord
from saekit.runs.results import SweepResult, TrainResult
from saekit.runs.session import Member, Session
from saekit.runs.spread_saes import sae_of, save_trained

__all__ = ["healthy", "is_alone", "result_of", "save_saes", "warn_of_saes"]


def is_alone(record: RunRecord) -> bool:
    """Whether the run is of one SAE, and no sweep."""
    return list(record.saes.values()) == ["."]


def healthy(session: Session) -> list[Member]:
    """Those that have not diverged."""
    return [member for member in session.members.values() if member.trainer.diverged is None]


def save_saes(session: Session, record: RunRecord) -> None:
    """Write the folder of each SAE; when this returns, all are there, whichever process wrote them."""
    world = session.world

    def save() -> None:
        for member in healthy(session):
            if member.here:
                save_trained(member.trainer, record.home(member.name) / "sae")

    done_by_all(world.all if world.saes.size > 1 else Group(), save)


def warn_of_saes(session: Session) -> None:
    """Say which do worse than the mean, or have mostly dead features; after all else: nothing is to be lost by it."""
    own = {
        member.name: [
            *doubts_of_features(member.config, member.trainer, member.latest.get("metrics/l0", 0.0)),
            *doubts_of_density(member.config, member.trainer, member.latest),
        ]
        for member in healthy(session)
        if member.here
    }
    doubts = {name: texts for part in session.world.saes.objects(own) for name, texts in part.items()}
    if not session.world.main:
        return
    for member in healthy(session):
        who = f"{member.name}, " if len(session.members) > 1 else ""
        for remark in member.remarks:
            warn_of(f"{who}the SAE at {member.config.sites.name}: {remark}")
        for text in doubts[member.name]:
            warn_of(f"{member.name}: {text}" if len(session.members) > 1 else text)


def result_of(
    session: Session, record: RunRecord, summary: Sequence[Mapping[str, Any]], pictures: Pictures
) -> TrainResult | SweepResult:
    """What the run leaves behind; SAEs that other processes have trained are read from their folders."""
    results = {
        member.name: TrainResult(
            sae=_sae_of(member, record.home(member.name) / "sae", session.plugins),
            folder=record.home(member.name),
            metrics=member.latest,
            backend=cast(LoadedModel, session.backend),
            held_out=session.held_out(member.config),
            corpus=session.corpus,
            pictures=pictures.of_saes.get(member.name, ()),
        )
        for member in healthy(session)
    }
    if is_alone(record):
        return next(iter(results.values()))
    diverged = {name: m.trainer.diverged for name, m in session.members.items() if m.trainer.diverged is not None}
    return SweepResult(record.folder, results, diverged, summary, pictures.of_sweep)


def _sae_of(member: Member, saved: Path, plugins: PluginManager) -> SAE | Callable[[], SAE]:
    if member.here:
        return sae_of(member.trainer, saved, plugins)
    return functools.partial(SAE.load, saved.absolute(), plugins=plugins)
