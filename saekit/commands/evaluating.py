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
from saekit.commands.material import Material, Text
from saekit.commands.subjects import Subject, subjects_of
from saekit.config import PluginChoice
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

    from saekit.evals.measured import Mask, Measured
    from saekit.protocols import Eval, ModelBackend
    from saekit.status import Status
    from saekit.tokens import TokenChoice

__all__ = ["ChosenTokens", "asked_evals", "checked_arguments", "evaluate", "evaluated"]


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
    loaded with the backend and the options that the SAE says, unless ``backend`` says it, as for
    :func:`saekit.load_model`.  ``dataset`` is a path, a name on the Hub, options as of ``dataset`` in a configuration,
    or texts in memory.  Left out, they are those that an SAE says, and documents that were held out from its training.
    ``contexts [n, context_size]`` are token ids in the place of a dataset.

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
    contexts, mask = checked_arguments(n_contexts, contexts, mask)
    from saekit.devices import resolve_device
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        say("reading the SAEs")
        found = subjects_of(saes, plugins, device=resolve_device(device, "device"))
        text = Text(dataset=dataset, contexts=contexts, n_contexts=n_contexts, context_size=context_size, seed=seed)
        material = Material(plugins, text, model=model, backend=backend, device=device, say=say)
        choice = ChosenTokens(exclude_special_tokens, None if seqpos_slice is None else tuple(seqpos_slice), mask)
        results = evaluated(found, chosen, material, choice, site=site, verbose=verbose, say=say)
    results = _tell_and_save(results, found, save)
    alone = len(results) == 1 and not isinstance(saes, (Mapping, list, tuple))
    return next(iter(results.values())) if alone else results


def checked_arguments(n_contexts: object, contexts: Any, mask: Any) -> tuple[Tensor | None, Mask | None]:
    """``contexts`` and ``mask``, as far as they can be looked at without a model."""
    if type(n_contexts) is not int or n_contexts < 1:
        raise ConfigError([("n_contexts", f"must be a whole number of 1 or more, found {n_contexts!r}")])
    if contexts is None and mask is not None and not callable(mask):
        raise ConfigError([("mask", "must be a function of tokens, where the contexts are not given (contexts=...)")])
    if contexts is None:
        return None, mask
    from saekit.evals.measured import checked_contexts, checked_mask

    contexts = checked_contexts(contexts)
    return contexts, checked_mask(mask, contexts)


@attrs.frozen(eq=False)
class ChosenTokens:
    """What is asked for beside what SAEs say of the tokens that count."""

    exclude: bool | Sequence[int] | None = None
    places: tuple[int | None, ...] | None = None
    mask: Any = None

    def of(self, sae: Any, backend: ModelBackend) -> TokenChoice:
        """The choice for ``sae``."""
        from saekit.tokens import TokenChoice, special_ids

        special = special_ids(backend)
        choice = TokenChoice.of_metadata(sae.info.metadata, special)
        if self.exclude is not None:
            ids = special if self.exclude is True else () if self.exclude is False else self.exclude
            choice = attrs.evolve(choice, exclude=ids)
        return choice if self.places is None else attrs.evolve(choice, seqpos_slice=self.places)


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
        for backend, contexts, names, about in material.groups(subjects, site):
            if say is not None:
                say.rest()
            group = {name: subjects[name] for name in names}
            found |= _of_group(group, evals, backend, contexts, about, tokens, verbose)
    return Evaluations({name: found[name] for name in subjects})


def _of_group(
    group: Mapping[str, Subject],
    evals: Mapping[str, Choice[Eval]],
    backend: ModelBackend,
    contexts: Tensor,
    about: Mapping[str, Mapping[str, Any]],
    tokens: ChosenTokens,
    verbose: bool,
) -> dict[str, Evaluation]:
    """SAEs that share a model and contexts."""
    from saekit.evals.engine import measure
    from saekit.evals.measured import Measured
    from saekit.progress import ProgressDisplay

    if tokens.mask is None:
        _warn_of_masks(group)

    def guard(key: str) -> AbstractContextManager[None]:
        return blamed(evals[key].item, "__call__", at_work=True)

    made = {name: _built(evals, name, one, backend, about[name]["sites"], contexts) for name, one in group.items()}
    measured = [
        Measured(
            one.sae,
            about[name]["sites"],
            {key: cast("Any", built) for key, built in made[name].items() if _accumulates(built)},
            tokens.of(one.sae, backend),
            guard,
        )
        for name, one in group.items()
    ]
    with ProgressDisplay(contexts.numel(), doing="measuring", verbose=verbose) as progress:
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done)

        sums = measure(measured, backend=backend, contexts=contexts, mask=tokens.mask, report=report)
    digest = hashlib.sha256(contexts.cpu().numpy().tobytes()).hexdigest()
    found = {}
    for name, subject, own in zip(group, measured, sums, strict=True):
        parts = [_part(subject, key, built, own, backend, contexts) for key, built in made[name].items()]
        facts = {key: value for key, value in about[name].items() if key != "sites"}
        facts |= {
            "sae": name,
            **group[name].weights,
            "sites": subject.sites.name,
            "evals": {key: attrs.asdict(choice.options) for key, choice in evals.items()},
            "tokens": subject.tokens.metadata(),
            "masked": tokens.mask is not None,
            "contexts_digest": digest,
            "saekit": __version__,
        }
        whole = Evaluation.joined([Evaluation(values={}, about=facts), *parts])
        if whole.about.get("tokens_used") == 0:
            raise ConfigError(f"no token of the contexts counts for {name}: nothing can be measured")
        found[name] = attrs.evolve(whole, about={**whole.about, "contexts_used": len(whole.contexts)})
    return found


def _warn_of_masks(group: Mapping[str, Subject]) -> None:
    """An SAE says which column of its data had a mask, not what was in it."""
    for name, one in group.items():
        if column := one.sae.info.metadata.get("mask_column"):
            warnings.warn(
                f"{name} was trained on tokens that the column {column!r} of its data chose, and none is read here: "
                "all that its other choices keep count. Give mask= to leave out others",
                RuntimeWarning,
                stacklevel=4,
            )


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
