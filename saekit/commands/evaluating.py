"""``saekit.evaluate``: what evals find of SAEs in their models, and where that is kept.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import attrs

from saekit.backends.loading import check_nothing_attached
from saekit.cautions import warn
from saekit.commands.material import Material, Text
from saekit.commands.subjects import Subject, subjects_of
from saekit.config import DistributedConfig, PluginChoice, TokensConfig
from saekit.config.files import load_config
from saekit.defaults import DEFAULT_EVALS
from saekit.distributed.launched import Launched
from saekit.errors import ConfigError, StorageError
from saekit.measuring import Evaluation, Evaluations, json_text
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.reasons import alike
from saekit.runs.checks import chosen_evals
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.distributed.world import World
    from saekit.protocols import Eval, ModelBackend
    from saekit.runs.results import SweepResult, TrainResult
    from saekit.sae.module import SAEModule
    from saekit.status import Status
    from saekit.tokens import Mask, TokenChoice

__all__ = ["ChosenTokens", "asked_evals", "check_arguments", "checked_data", "evaluate", "evaluated"]


@overload
def evaluate(
    saes: list[Any] | tuple[Any, ...] | Mapping[Any, Any] | SweepResult,
    *,
    model: object | None = ...,
    backend: PluginChoice | None = ...,
    dataset: object | None = ...,
    contexts: Tensor | None = ...,
    n_contexts: int = ...,
    context_size: int | None = ...,
    evals: Iterable[PluginChoice] = ...,
    site: Site | Sites | str | None = ...,
    exclude_special_tokens: bool | Sequence[int] | None = ...,
    seqpos_slice: Sequence[int | None] | None = ...,
    mask: Mask | None = ...,
    device: str = ...,
    seed: int = ...,
    save: bool = ...,
    verbose: bool = ...,
    plugins: PluginManager | None = ...,
    **options: Any,
) -> Evaluations: ...


@overload
def evaluate(
    saes: SAEModule | TrainResult,
    *,
    model: object | None = ...,
    backend: PluginChoice | None = ...,
    dataset: object | None = ...,
    contexts: Tensor | None = ...,
    n_contexts: int = ...,
    context_size: int | None = ...,
    evals: Iterable[PluginChoice] = ...,
    site: Site | Sites | str | None = ...,
    exclude_special_tokens: bool | Sequence[int] | None = ...,
    seqpos_slice: Sequence[int | None] | None = ...,
    mask: Mask | None = ...,
    device: str = ...,
    seed: int = ...,
    save: bool = ...,
    verbose: bool = ...,
    plugins: PluginManager | None = ...,
    **options: Any,
) -> Evaluation: ...


@overload
def evaluate(
    saes: str | Path,
    *,
    model: object | None = ...,
    backend: PluginChoice | None = ...,
    dataset: object | None = ...,
    contexts: Tensor | None = ...,
    n_contexts: int = ...,
    context_size: int | None = ...,
    evals: Iterable[PluginChoice] = ...,
    site: Site | Sites | str | None = ...,
    exclude_special_tokens: bool | Sequence[int] | None = ...,
    seqpos_slice: Sequence[int | None] | None = ...,
    mask: Mask | None = ...,
    device: str = ...,
    seed: int = ...,
    save: bool = ...,
    verbose: bool = ...,
    plugins: PluginManager | None = ...,
    **options: Any,
) -> Evaluation | Any: ...  # of a sweep's folder Evaluations


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
    an SAE says, held out from training; ``seed`` draws contexts of it.  ``contexts [n, context_size]`` are token ids
    in the place of a dataset.

    ``evals`` are chosen as ``evals.run`` of a configuration: keys, tables or options.  ``options`` are set in every one
    of them that has an option of that name: ``kl=True``, ``top1=True``, ``mean_ablation_contexts=32``,
    ``n_bootstrap=200``, ``batch_size_prompts=8``.

    The tokens that count are those that each SAE says; ``exclude_special_tokens`` and ``seqpos_slice`` say it anew, and
    ``mask`` leaves out others: ``[n, context_size]`` bool for ``contexts``, or a function of tokens ``[b, t]``.

    What is found of an SAE from a folder is written beside it (``evals.json``), unless ``save`` is off, or it is put
    into another place or model than in training.  What is worse than the mean is a ``UserWarning``; what is not found
    or does not fit, a :class:`SaekitError`.

    Of several processes (``torchrun``), each measures on a part; all get the numbers, and the first warns and writes.
    """
    plugins = plugins or default_manager()
    chosen = asked_evals(evals, options, plugins)
    choice = check_arguments(n_contexts, contexts, exclude_special_tokens, seqpos_slice, mask)
    contexts, mask = checked_data(contexts, mask)
    verbose = verbose and Launched.here(os.environ).rank == 0
    with _by_all(device, verbose=verbose) as (world, say):
        found = _read(saes, plugins, device, say)
        text = Text(dataset=dataset, contexts=contexts, n_contexts=n_contexts, context_size=context_size, seed=seed,
                    mask=mask)  # fmt: skip
        material = Material(plugins, text, model=model, backend=backend, device=device, say=say)
        results = evaluated(found, chosen, material, choice, site=site, verbose=verbose, say=say, world=world)
        told = _told_to_all(results, found, save, world)
    return told if len(told) > 1 or isinstance(saes, (Mapping, list, tuple)) else next(iter(told.values()))


@contextlib.contextmanager
def _by_all(device: str, *, verbose: bool) -> Iterator[tuple[World, Status]]:
    """The processes that measure together, of which the first warns, and who says what is being done."""
    from saekit.distributed.world import open_world, uses_cuda
    from saekit.status import Status

    with (
        warnings.catch_warnings(),
        Status(verbose=verbose) as say,
        open_world(DistributedConfig(), cuda=uses_cuda(device)) as world,
        world.accounted(),
    ):
        if not world.main:
            warnings.simplefilter("ignore")
        yield world, say


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
    world: World | None = None,
) -> Evaluations:
    """What ``evals`` find of ``subjects``; those with one model and the same contexts are measured together.

    Contexts are dealt out over the processes of ``world``, all of which must ask; the first is told.
    """
    from saekit.ambient import ambient
    from saekit.commands.dealing import measured_together
    from saekit.commands.without_model import have_no_model, measured_without_model
    from saekit.distributed.agreement import by_first
    from saekit.distributed.world import ALONE

    world = world or ALONE
    tokens = tokens or ChosenTokens()
    found: dict[str, Evaluation] = {}
    with ambient():
        alone = have_no_model(subjects, evals, material) if site is None else {}
        if alone:
            found |= by_first(world.all, lambda: measured_without_model(alone, evals, material.plugins)) or {}
        others = {name: one for name, one in subjects.items() if name not in alone}
        groups = [*material.groups(others, site)]
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
            found |= measured_together(group, chosen, evals, world, verbose=verbose)
    return Evaluations({name: found[name] for name in subjects if name in found})


def _read(saes: object, plugins: PluginManager, device: str, say: Status) -> dict[str, Subject]:
    from saekit.devices import resolve_device

    say("reading the SAEs")
    return subjects_of(saes, plugins, device=resolve_device(device, "device"))


def _told_to_all(results: Evaluations, subjects: Mapping[str, Subject], save: bool, world: World) -> Evaluations:
    """By the first process, which has the results: all get them."""
    told = _tell_and_save(results, subjects, save) if world.main else None
    return next(one for one in world.all.objects(told) if one is not None)


def _tell_and_save(results: Evaluations, subjects: Mapping[str, Subject], save: bool) -> Evaluations:
    """Remarks as warnings, and the numbers beside the SAEs; gives them with the files."""
    told = Evaluations()
    for name, one in results.items():
        for remark in one.remarks:
            warn(f"{name}: {remark}" if len(results) > 1 else remark, UserWarning)
        file = subjects[name].file if save else None
        written = file is not None and _is_of_its_place(file, one) and _save(file, one)
        told[name] = attrs.evolve(one, file=file) if written else one
    return told


def _is_of_its_place(file: Path, found: Evaluation) -> bool:
    """Whether the numbers are of the SAE as it was trained, so that they may stand beside it as its own."""
    own = not found.about.get("unlike_training")
    if not own:
        told = f"the numbers are not kept in {file}: that is for those of the SAE in the place where it was trained"
        warn(told)
    return own


def _save(file: Path, found: Evaluation) -> bool:
    """All or nothing; a place that cannot be written to takes nothing away from what was found."""
    from saekit.files.storage import write_text

    try:
        write_text(file, json_text(found.to_dict()) + "\n")
    except StorageError as error:
        warn(f"{error}: the numbers are not kept there", UserWarning)
        return False
    return True
