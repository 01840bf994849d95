"""What can be seen to be wrong before anything heavy is imported: a slip costs half a second, not half a minute.

Nothing here imports torch or a library of models or datasets, leaves anything behind, or asks a network.  The work
makes the same checks again where it needs what they are about; they are the same functions, each in a light module of
its own room.  A plugin takes part by :attr:`saekit.Entry.precheck`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from saekit.config import PLUGIN_KIND, PretokenizeConfig, TrainConfig
from saekit.data.faults import problems_of
from saekit.data.in_memory import check_in_memory
from saekit.data.text import check_place
from saekit.errors import ConfigError, PlaceError, SaekitError
from saekit.files.storage import why_no_folder_in
from saekit.kinds import ACTIVATION_SOURCES, MODEL_BACKENDS, SAE_ARCHITECTURES
from saekit.planning.findings import of_some
from saekit.planning.plan import names_of
from saekit.plugins.building import blamed, placed
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.runs.checks import (
    check_finetuning,
    check_model_runs,
    check_without_model,
    chosen_evals,
    chosen_trackers,
    has_model,
    start_files,
)
from saekit.runs.folder import check_run_folder
from saekit.runs.sweep import check_together, member_names

__all__ = [
    "Faults",
    "check_writable",
    "kinds_read",
    "of_cache",
    "of_model",
    "of_plan",
    "of_pretokenize",
    "of_resume",
    "of_training",
]

Check: TypeAlias = Callable[[], object]


@attrs.frozen
class Faults:
    """What was found to be wrong."""

    absent: Sequence[SaekitError]
    """The text or the model is not there, so that nothing can be said of what would be made of them."""
    others: Sequence[SaekitError]

    @classmethod
    def of(cls, needed: Iterable[Check], others: Iterable[Check]) -> Faults:
        """What the checks raise, each fault once; those that are ``needed`` are about the text and the model."""
        absent = _raised(needed)
        return cls(list(absent.values()), [error for text, error in _raised(others).items() if text not in absent])

    @property
    def texts(self) -> list[str]:
        """Each as people read it."""
        return [str(error) for error in (*self.absent, *self.others)]

    def raise_any(self) -> None:
        """Raise one as it is, several as one :class:`ConfigError` that lists them."""
        found = [*self.absent, *self.others]
        if len(found) == 1:
            raise found[0]
        if found:
            raise ConfigError([problem for error in found for problem in _problems(error)], "the run")


def _raised(checks: Iterable[Check]) -> dict[str, SaekitError]:
    """The errors of ``checks`` by what they say: members of a sweep may share theirs."""
    errors: dict[str, SaekitError] = {}
    for check in checks:
        try:
            check()
        except SaekitError as error:
            errors.setdefault(str(error), error)
    return errors


def _problems(error: SaekitError) -> list[tuple[str, str]]:
    return error.problems if isinstance(error, ConfigError) else [("", str(error))]


# ---- what is looked at for each job


def of_training(
    configs: Sequence[TrainConfig],
    plugins: PluginManager,
    model: object | None = None,
    dataset: object | None = None,
    *,
    alone: bool = True,
) -> Faults:
    """What is wrong with a new run of ``configs``: of one that is ``alone``, or of those of a sweep."""
    folder = configs[0].checkpoints.folder
    return Faults.of(
        _inputs(configs, plugins, model, dataset),
        [
            partial(_check_names, configs, plugins, alone),
            partial(check_writable, folder, f"cannot make a run folder in {folder}: {{}} (checkpoints.folder)"),
            *([] if alone else [partial(check_together, configs, plugins)]),
            *_held_out(configs, dataset),
            *_members(configs, plugins),
            *_starts(configs),
        ],
    )


def of_plan(
    configs: Sequence[TrainConfig],
    plugins: PluginManager,
    model: object | None = None,
    dataset: object | None = None,
) -> tuple[Faults, list[str]]:
    """:func:`of_training` of one SAE or of several, and in words; what only some of several have says which."""
    if len(configs) == 1:
        faults = of_training(configs, plugins, model, dataset)
        return faults, faults.texts
    faults = of_training(configs, plugins, model, dataset, alone=False)
    names, having = names_of(configs, plugins), dict[str, dict[str, None]]()
    for name, config in zip(names, configs, strict=True):
        own = _raised([*_members([config], plugins), *_starts([config])])
        for text in _said(own.values()):
            having.setdefault(text, {})[name] = None
    texts = _said([*faults.absent, *faults.others])
    return faults, [of_some(text, having.get(text, names), names) for text in texts]


def _said(errors: Iterable[SaekitError]) -> list[str]:
    """Each problem of ``errors`` as people read it, once."""
    problems = dict.fromkeys(problem for error in errors for problem in problems_of(error))
    return [f"{path}: {message}" if path else message for path, message in problems]


def of_resume(
    configs: Sequence[TrainConfig],
    plugins: PluginManager,
    model: object | None = None,
    dataset: object | None = None,
    *,
    begun: bool,
) -> Faults:
    """What is wrong with going on with a run; one that has not ``begun`` still needs what it starts from."""
    return Faults.of(
        _inputs(configs, plugins, model, dataset),
        [
            *_held_out(configs, dataset),
            *_members(configs, plugins, begun=begun),
            *([] if begun else _starts(configs)),
        ],
    )


def of_cache(
    config: TrainConfig, plugins: PluginManager, model: object | None = None, dataset: object | None = None
) -> Faults:
    """What is wrong with writing the cache of ``config``."""
    from saekit.data.cache.left import check_target

    folder = config.activations.cache.folder
    return Faults.of(
        [*_text(config, dataset), *_model(config, plugins, model)],
        [
            partial(check_writable, folder, f"cannot write the activation cache {folder!r}: {{}}"),
            partial(check_target, Path(folder)),
            partial(check_model_runs, config, plugins),
        ],
    )


def of_reading(
    config: TrainConfig, plugins: PluginManager, model: object | None = None, dataset: object | None = None
) -> Faults:
    """What is wrong with reading the batches of ``config`` without training on them."""
    return Faults.of(_inputs([config], plugins, model, dataset), _held_out([config], dataset))


def of_model(config: TrainConfig, plugins: PluginManager) -> Faults:
    """What is wrong with loading the model of ``config`` alone."""
    return Faults.of(_model(config, plugins, None), [])


def of_pretokenize(
    config: PretokenizeConfig, plugins: PluginManager, model: object | None = None, dataset: object | None = None
) -> Faults:
    """What is wrong with packing the text of ``config``."""
    from saekit.commands import targets

    named = config.tokenizer
    ids = [partial(targets.check_tokenizer, named)] if named is not None else _model(config, plugins, model)
    others: list[Check] = [partial(targets.check_target, config)]
    if config.folder is not None and not Path(config.folder).exists():
        others.append(partial(check_writable, config.folder, f"cannot write the contexts to {config.folder!r}: {{}}"))
    return Faults.of([*_text(config, dataset), *ids], others)


# ---- the checks


def _inputs(
    configs: Sequence[TrainConfig], plugins: PluginManager, model: object | None, dataset: object | None
) -> Iterator[Check]:
    """Of the text, if it is read, and the model, which all of a sweep share."""
    if any(_needs_text(config, plugins) for config in configs):
        yield from _text(configs[0], dataset)
    yield from _model(configs[0], plugins, model)


def _needs_text(config: TrainConfig, plugins: PluginManager) -> bool:
    source = plugins.find(ACTIVATION_SOURCES, config.activations.source)
    return source.entry.needs_text or config.evals.reads_text


def kinds_read(configs: Iterable[TrainConfig], plugins: PluginManager) -> set[str]:
    """What runs take from where their configurations name it, unless it is given: of ``model``, ``dataset``."""
    listed = list(configs)
    read = {
        "model": any(has_model(config, plugins) for config in listed),
        "dataset": any(_needs_text(config, plugins) for config in listed),
    }
    return {kind for kind, is_read in read.items() if is_read}


def _text(config: TrainConfig | PretokenizeConfig, dataset: object | None) -> Iterator[Check]:
    if dataset is None:
        yield partial(check_place, config.dataset, config.dataset.split)
    else:
        yield partial(check_in_memory, dataset)


def _held_out(configs: Sequence[TrainConfig], dataset: object | None) -> Iterator[Check]:
    split = configs[0].evals.split
    if dataset is None and split is not None and any(config.evals.reads_text for config in configs):
        yield partial(check_place, configs[0].dataset, split)


def _model(config: TrainConfig | PretokenizeConfig, plugins: PluginManager, model: object | None) -> Iterator[Check]:
    chosen = plugins.bound(MODEL_BACKENDS, config.model.backend)
    yield chosen.item.check_requirements
    if model is None:
        yield partial(_precheck, chosen, config, "model.backend")


def _starts(configs: Sequence[TrainConfig]) -> Iterator[Check]:
    for config in configs:
        if (path := config.training.from_pretrained_path) is not None:
            yield partial(start_files, path)


def _members(configs: Sequence[TrainConfig], plugins: PluginManager, *, begun: bool = False) -> Iterator[Check]:
    """Of what each SAE has for itself.  Architectures that have ``begun`` are as they were, and go on."""
    for config in configs:
        yield partial(chosen_trackers, config, plugins)
        yield partial(chosen_evals, config, plugins)
        yield partial(check_without_model, config, plugins)
        yield partial(check_finetuning, config, plugins.options(SAE_ARCHITECTURES, config.sae))
        for place, chosen in _choices(config, plugins):
            if chosen.kind != MODEL_BACKENDS:
                yield chosen.item.check_requirements
                if not (begun and chosen.kind == SAE_ARCHITECTURES):
                    yield partial(_precheck, chosen, config, place)


def _choices(config: object, plugins: PluginManager, at: str = "") -> Iterator[tuple[str, Choice[Any]]]:
    """Every plugin that ``config`` chooses, and those that their options choose, with where each is chosen."""
    for field in attrs.fields(type(config)):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        kind = field.metadata.get(PLUGIN_KIND)
        for number, item in enumerate(value if isinstance(value, tuple) else (value,)):
            place = f"{at}{field.name}" + (f"[{number}]" if isinstance(value, tuple) else "")
            if kind is not None and item is not None:
                chosen = plugins.bound(kind, item)
                yield place, chosen
                yield from _choices(chosen.options, plugins, f"{place}.")
            elif attrs.has(type(item)):
                yield from _choices(item, plugins, f"{place}.")


def _precheck(chosen: Choice[Any], whole: TrainConfig | PretokenizeConfig, place: str) -> None:
    precheck = chosen.item.entry.precheck
    if precheck is None or chosen.item.missing():
        return
    # A fault of the plugin's must not look like the user's.
    with blamed(chosen.item, "precheck"), placed(chosen.item, place):
        precheck(chosen.options, whole)


def _check_names(configs: Sequence[TrainConfig], plugins: PluginManager, alone: bool) -> None:
    check_run_folder(configs[0], configs[0].checkpoints.name if alone else member_names(configs, plugins)[0])


def check_writable(folder: str, message: str) -> None:
    """:class:`StorageError` when ``folder`` cannot be made, or no folder in it."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if os.path.lexists(path))
    if (fault := why_no_folder_in(place)) is not None:
        raise PlaceError(message.format(f"{fault}: {place}"))
