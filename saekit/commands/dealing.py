"""What evals find of SAEs that share a model and contexts, by one process or by several that deal out the contexts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import attrs
from torch import Tensor

from saekit._version import __version__
from saekit.abilities import Accumulates
from saekit.commands.material import Group
from saekit.commands.subjects import Subject
from saekit.distributed.agreement import by_first
from saekit.distributed.world import ALONE, World
from saekit.errors import ConfigError
from saekit.evals.calling import called
from saekit.evals.engine import measure, together
from saekit.evals.measured import Measured
from saekit.measuring import Evaluation
from saekit.plugins.building import blamed
from saekit.plugins.choice import Choice
from saekit.progress import ProgressDisplay
from saekit.protocols import Eval, ModelBackend
from saekit.runs.spreading import sharing
from saekit.site import Sites
from saekit.tokens import TokenChoice
from saekit.training.metrics import apart, numbers_of
from saekit.values import EvalRun

__all__ = ["measured_together"]


def measured_together(
    group: Group,
    chosen: Mapping[str, tuple[Subject, TokenChoice]],
    evals: Mapping[str, Choice[Eval]],
    world: World = ALONE,
    *,
    verbose: bool = True,
) -> dict[str, Evaluation]:
    """What ``evals`` find of the SAEs of ``group``; nothing in all processes of ``world`` but the first."""

    def guard(key: str) -> AbstractContextManager[None]:
        return blamed(evals[key].item, "__call__", at_work=True)

    backend, contexts, about = group.backend, group.contexts, group.about
    made = {
        name: _built(evals, name, one, backend, about[name]["sites"], contexts) for name, (one, _) in chosen.items()
    }
    measured = [
        Measured(
            one.sae,
            about[name]["sites"],
            {key: cast("Any", built) for key, built in made[name].items() if _accumulates(built)},
            choice,
            guard,
        )
        for name, (one, choice) in chosen.items()
    ]
    digest = hashlib.sha256(contexts.cpu().numpy().tobytes()).hexdigest()
    _check_alike(world, {"contexts": digest, **{name: chosen[name][0].weights for name in chosen}})
    dealt = [attrs.evolve(one, evals=sharing(one.evals) if world.size > 1 else {}) for one in measured]
    shared = _sums(group, dealt, world, verbose=verbose)

    def rest() -> dict[str, Evaluation]:
        """By the first process: evals whose contexts are not dealt out, and all numbers."""
        others = [
            attrs.evolve(one, evals={key: part for key, part in one.evals.items() if key not in some.evals})
            for one, some in zip(measured, dealt, strict=True)
        ]
        left = _sums(group, others, ALONE, verbose=verbose)
        sums = [{**some, **more} for some, more in zip(shared or [], left or [], strict=True)]
        return _joined(group, chosen, evals, made, measured, sums, digest)

    return by_first(world.all, rest) or {}


def _sums(group: Group, measured: list[Measured], world: World, *, verbose: bool) -> list[dict[str, Any]] | None:
    """What the evals of each have summed up of contexts that are dealt out; None in all processes but the first."""
    if not any(one.evals for one in measured):
        return [{} for _ in measured]
    with ProgressDisplay(group.contexts.numel(), doing="measuring", verbose=verbose) as progress:
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done)

        backend, contexts, among = group.backend, group.contexts, world.all
        own = measure(measured, backend=backend, contexts=contexts, mask=group.mask, report=report, among=among)
    return together(measured, own, among)


def _joined(
    group: Group,
    chosen: Mapping[str, tuple[Subject, TokenChoice]],
    evals: Mapping[str, Choice[Eval]],
    made: Mapping[str, Mapping[str, Eval]],
    measured: Sequence[Measured],
    sums: Sequence[Mapping[str, Any]],
    digest: str,
) -> dict[str, Evaluation]:
    """What all evals have found of each SAE, and of what."""
    backend, contexts, about = group.backend, group.contexts, group.about
    found = {}
    for name, subject, own in zip(chosen, measured, sums, strict=True):
        told = {key: _part(subject, key, built, own, backend, contexts) for key, built in made[name].items()}
        apart({key: part.numbers() for key, part in told.items()})
        parts = told.values()
        facts = {key: value for key, value in about[name].items() if key != "sites"}
        facts |= {
            "sae": name,
            **chosen[name][0].weights,
            "sites": subject.sites.name,
            "evals": {key: attrs.asdict(choice.options) for key, choice in evals.items()},
            "tokens": subject.tokens.metadata(),
            "masked": group.mask is not None,
            "contexts_digest": digest,
            "saekit": __version__,
        }
        whole = Evaluation.joined([Evaluation(values={}, about=facts), *parts])
        if whole.about.get("tokens_used") == 0:
            raise ConfigError(f"no token of the contexts counts for {name}: nothing can be measured")
        found[name] = attrs.evolve(whole, about={**whole.about, "contexts_used": len(whole.contexts)})
    return found


def _accumulates(built: object) -> bool:
    return isinstance(built, Accumulates)


def _built(
    evals: Mapping[str, Choice[Eval]], name: str, one: Subject, backend: ModelBackend, sites: Sites, contexts: Tensor
) -> dict[str, Eval]:
    run = EvalRun(
        name=name,
        backend=backend,
        sites=sites,
        device=str(one.sae.device),
        steps=0,
        seed=0,
        open_contexts=lambda: contexts,
    )
    return {key: choice.build(run=run) for key, choice in evals.items()}


def _part(
    subject: Measured, key: str, built: Any, sums: Mapping[str, Any], backend: ModelBackend, contexts: Tensor
) -> Evaluation:
    """What one eval has found: of sums, or by being called."""
    with subject.guard(key):
        if key in sums:
            result: Evaluation = built.result(sums[key])
            return attrs.evolve(result, sums={key: sums[key]})
        told = called(built, subject.sae, backend=backend, sites=subject.sites, contexts=contexts)
    return Evaluation(values=numbers_of(key, told), contexts=tuple(range(len(contexts))))


def _check_alike(world: World, own: Mapping[str, Any]) -> None:
    """:class:`ConfigError` in every process, where one measures other SAEs, or on other contexts."""
    every = world.all.objects(dict(own))
    for rank, found in enumerate(every):
        if odd := [name for name in {**every[0], **found} if found.get(name) != every[0].get(name)]:
            raise ConfigError(
                f"the processes must measure the same, and {' and '.join(odd)} of process {rank} are others than those "
                "of process 0. Start all by the same command, where they see the same files"
            )
