"""``saekit.evaluate``: what evals find of SAEs in their models, and where that is kept.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs

from saekit._version import __version__
from saekit.backends.loading import check_nothing_attached
from saekit.commands.material import Group, Material, Text
from saekit.commands.subjects import Subject, subjects_of
from saekit.config import PluginChoice, TokensConfig
from saekit.config.files import load_config
from saekit.defaults import DEFAULT_EVALS
from saekit.errors import ConfigError, StorageError
from saekit.measuring import Evaluation, Evaluations, json_text
from saekit.plugins.building import blamed
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.reasons import alike
from saekit.runs.checks import chosen_evals
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.evals.measured import Measured
    from saekit.protocols import Eval, ModelBackend
    from saekit.status import Status
    from saekit.tokens import Mask, TokenChoice

__all__ = ["ChosenTokens", "asked_evals", "check_arguments", "checked_data", "evaluate", "evaluated"]


def evaluate(
    saes: object,
    *,
    model: object | None = None,
    backend: PluginChoice | None = None,
    dataset: object | None = None,
    contexts: Tensor | None = None,
    n_contexts: int = 64,
    context_size: int | None = None,
    evals: Iterable[PluginChoice] = DEFAULT_EVALS,
    site: Site | Sites | str | None = None,
    exclude_special_tokens: bool | Sequence[int] | None = None,
    seqpos_slice: Sequence[int | None] | None = None,
    mask: Mask | None = None,
    device: str = "auto",
    seed: int = 0,
    save: bool = True,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    **options: Any,
) -> Evaluation | Evaluations:
    """How good SAEs are, in their models and on text that they were not trained on.

    ``saes`` is an SAE, what :func:`saekit.train` returned, a run folder, a sweep's, that of an SAE of any format, or
    ``RELEASE:ID``; or a list of these, or a mapping of names.  Of one an :class:`~saekit.measuring.Evaluation` comes
    back, of several :class:`~saekit.measuring.Evaluations`, by name.  SAEs that share a model and contexts share each
    clean forward.

    ``model`` is a name, a model that you have loaded, or what :func:`saekit.load_model` returned.  By a name it is
    loaded with the backend and options that the SAE says, or with ``backend``, as :func:`saekit.load_model` takes it.
    ``dataset`` is a path, a name on the Hub, options of a configuration, or texts in memory.  Left out, both are what
    an SAE says, held out from its training; ``contexts [n, context_size]`` are token ids in the place of a dataset.

    ``evals`` are chosen as ``evals.run`` of a configuration: keys, tables or options.  ``options`` are set in every one
    of them that has an option of that name: ``kl=True``, ``top1=True``, ``mean_ablation_contexts=32``,
    ``n_bootstrap=200``, ``batch_size_prompts=8``.

    The tokens that count are those that each SAE says; ``exclude_special_tokens`` and ``seqpos_slice`` say it anew, and
    ``mask`` leaves out others: ``[n, context_size]`` bool for ``contexts``, or a function of tokens ``[b, t]``.

    What is found of an SAE that was read from a folder is written beside it (``evals.json``), unless ``save`` is off.
    What is worse than the mean is a ``UserWarning``; what is not found or does not fit, a :class:`SaekitError`.
    """
    plugins = plugins or default_manager()
    chosen = asked_evals(evals, options, plugins)
    choice = check_arguments(n_contexts, contexts, exclude_special_tokens, seqpos_slice, mask)
    contexts, mask = checked_data(contexts, mask)
    from saekit.devices import resolve_device
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        say("reading the SAEs")
        found = subjects_of(saes, plugins, device=resolve_device(device, "device"))
        text = Text(
            dataset=dataset, contexts=contexts, n_contexts=n_contexts, context_size=context_size, seed=seed, mask=mask
        )
        material = Material(plugins, text, model=model, backend=backend, device=device, say=say)
        results = evaluated(found, chosen, material, choice, site=site, verbose=verbose, say=say)
    told = _tell_and_save(results, found, save)
    return told if len(told) > 1 or isinstance(saes, (Mapping, list, tuple)) else next(iter(told.values()))


def check_arguments(
    n_contexts: object, contexts: object, exclude: object, places: object, mask: object, *, least: int = 1
) -> ChosenTokens:
    """The tokens that are asked for, of arguments that mean something; :class:`ConfigError` for others."""
    if type(n_contexts) is not int or n_contexts < least:
        why = "" if least < 2 else ": one context cannot say how much contexts differ"
        raise ConfigError([("n_contexts", f"must be a whole number of {least} or more, found {n_contexts!r}{why}")])
    if contexts is None and mask is not None and not callable(mask):
        raise ConfigError([("mask", "must be a function of tokens, where the contexts are not given (contexts=...)")])
    return ChosenTokens.asked_for(exclude, places)


def checked_data(contexts: Any, mask: Any) -> tuple[Tensor | None, Mask | None]:
    """``contexts`` and ``mask`` as tensors, as far as they can be looked at without a model."""
    if contexts is None:
        return None, mask
    from saekit.evals.measured import checked_contexts, checked_mask

    contexts = checked_contexts(contexts)
    return contexts, checked_mask(mask, contexts)


@attrs.frozen(eq=False)
class ChosenTokens:
    """What is asked for beside what SAEs say of the tokens that count."""

    asked: TokensConfig = attrs.field(factory=TokensConfig)
    by_id: bool = False
    """Whether the ids that do not count are said."""
    by_place: bool = False
    """Likewise positions."""

    @classmethod
    def asked_for(cls, exclude: object, places: object) -> ChosenTokens:
        """What ``exclude_special_tokens`` and ``seqpos_slice`` say; :class:`ConfigError` for what means nothing."""
        from saekit.tokens import asked_tokens

        return cls(asked_tokens(exclude, places), exclude is not None, places is not None)

    def asked_of(self, sae: Any, backend: ModelBackend) -> TokenChoice:
        """The choice for ``sae``; :class:`ConfigError` for one that the model has no tokens for."""
        from saekit.tokens import TokenChoice, special_ids, token_choice

        asked = token_choice(self.asked, backend, section="")
        choice = TokenChoice.of_metadata(sae.info.metadata, special_ids(backend))
        choice = attrs.evolve(choice, exclude=asked.exclude) if self.by_id else choice
        return attrs.evolve(choice, seqpos_slice=asked.seqpos_slice) if self.by_place else choice

    def of(self, sae: Any, backend: ModelBackend, contexts: Tensor) -> TokenChoice:
        """As :meth:`asked_of`, and a :class:`ConfigError` for one that leaves none of ``contexts [n, t]``."""
        choice = self.asked_of(sae, backend)
        self.asked.positions(contexts.shape[1], section="", size="{} tokens")
        if not bool(choice.kept(contexts).any()):
            place = "the SAE" if sae.info.sites is None else f"the SAE at {sae.info.sites.name}"
            raise ConfigError(
                f"no token of the contexts counts for {place} ({choice.metadata()}): nothing can be measured. Say "
                "anew which do: exclude_special_tokens, seqpos_slice"
            )
        return choice


def asked_evals(
    evals: Iterable[PluginChoice], options: Mapping[str, Any], plugins: PluginManager
) -> dict[str, Choice[Eval]]:
    """The evals by qualified key, each with those of ``options`` that it has; :class:`ConfigError` for one of none."""
    evals = [evals] if isinstance(evals, (str, Mapping)) else list(evals)
    config = load_config({"evals": {"run": evals}}, plugins=plugins)
    chosen = chosen_evals(config, plugins)
    if not chosen:
        raise ConfigError([("evals", "names none")])
    asked, known = {name: value for name, value in options.items() if value is not None}, set[str]()
    for key, choice in chosen.items():
        names = {field.name for field in attrs.fields(type(choice.options))}
        given = {name: value for name, value in asked.items() if name in names}
        chosen[key] = dataclasses.replace(choice, options=attrs.evolve(choice.options, **given))
        known |= names
    if unknown := sorted(asked.keys() - known):
        there, arguments = ", ".join(sorted(known)), inspect.signature(evaluate).parameters
        hint = alike(unknown[0], {*known, *arguments} - {"options"})
        said = f"is no argument, and no option of {', '.join(chosen)}: these have {there}{hint}"
        raise ConfigError([(unknown[0], said)])
    return chosen


def evaluated(
    subjects: Mapping[str, Subject],
    evals: Mapping[str, Choice[Eval]],
    material: Material,
    tokens: ChosenTokens | None = None,
    *,
    site: Site | Sites | str | None = None,
    verbose: bool = True,
    say: Status | None = None,
) -> Evaluations:
    """What ``evals`` find of ``subjects``; those with one model and the same contexts are measured together."""
    from saekit.ambient import ambient

    tokens = tokens or ChosenTokens()
    found: dict[str, Evaluation] = {}
    with ambient():
        groups = [*material.groups(subjects, site)]
        for group in groups:
            check_nothing_attached(group.backend, "what is measured")
        choices = {
            name: tokens.of(subjects[name].sae, group.backend, group.contexts)
            for group in groups for name in group.names
        }  # fmt: skip
        for group in groups:
            if say is not None:
                say.rest()
            chosen = {name: (subjects[name], choices[name]) for name in group.names}
            found |= _of_group(group, chosen, evals, verbose)
    return Evaluations({name: found[name] for name in subjects})


def _of_group(
    group: Group,
    chosen: Mapping[str, tuple[Subject, TokenChoice]],
    evals: Mapping[str, Choice[Eval]],
    verbose: bool,
) -> dict[str, Evaluation]:
    """SAEs that share a model and contexts."""
    from saekit.evals.engine import measure
    from saekit.evals.measured import Measured
    from saekit.progress import ProgressDisplay

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
    with ProgressDisplay(contexts.numel(), doing="measuring", verbose=verbose) as progress:
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done)

        sums = measure(measured, backend=backend, contexts=contexts, mask=group.mask, report=report)
    digest = hashlib.sha256(contexts.cpu().numpy().tobytes()).hexdigest()
    found = {}
    for name, subject, own in zip(chosen, measured, sums, strict=True):
        parts = [_part(subject, key, built, own, backend, contexts) for key, built in made[name].items()]
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
    from saekit.abilities import Accumulates

    return isinstance(built, Accumulates)


def _built(
    evals: Mapping[str, Choice[Eval]], name: str, one: Subject, backend: ModelBackend, sites: Sites, contexts: Tensor
) -> dict[str, Eval]:
    from saekit.values import EvalRun

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
    from saekit.evals.calling import called
    from saekit.training.metrics import numbers_of

    with subject.guard(key):
        if key in sums:
            result: Evaluation = built.result(sums[key])
            return attrs.evolve(result, sums={key: sums[key]})
        told = called(built, subject.sae, backend=backend, sites=subject.sites, contexts=contexts)
    return Evaluation(values=numbers_of(key, told), contexts=tuple(range(len(contexts))))


def _tell_and_save(results: Evaluations, subjects: Mapping[str, Subject], save: bool) -> Evaluations:
    """Remarks as warnings, and the numbers beside the SAEs; gives them with the files."""
    told = Evaluations()
    for name, one in results.items():
        for remark in one.remarks:
            warnings.warn(f"{name}: {remark}" if len(results) > 1 else remark, UserWarning, stacklevel=3)
        file = subjects[name].file
        written = file is not None and save and _save(file, one)
        told[name] = attrs.evolve(one, file=file) if written else one
    return told


def _save(file: Path, found: Evaluation) -> bool:
    """All or nothing; a place that cannot be written to takes nothing away from what was found."""
    from saekit.files.storage import write_text

    try:
        write_text(file, json_text(found.to_dict()) + "\n")
    except StorageError as error:
        warnings.warn(f"{error}: the numbers are not kept there", UserWarning, stacklevel=3)
        return False
    return True
