"""Whether plugins keep what their kinds promise; see :func:`saekit.testing.check_plugin`."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.ambient import ambient
from saekit.errors import PluginError
from saekit.kinds import KINDS, MODEL_BACKENDS
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.reasons import error_text
from saekit.testing.checks.check import Check, Checks, Fault, NotTried, Subject
from saekit.testing.checks.every_kind import OF_EVERY_KIND, check_import
from saekit.testing.checks.surroundings import changed, surroundings
from saekit.testing.fakes import isolated_manager

__all__ = ["ConformanceError", "Outcome", "Report", "check_plugin", "plugin_report"]

_FIRST = "build"


class ConformanceError(AssertionError):
    """A plugin does not keep what its kind promises; the message says which entry, which check, and what was found."""


@attrs.frozen
class Outcome:
    """What a check found."""

    entry: str
    """The label of the kind, the entry's name, and the options it was tried with; or the module."""
    check: str
    promise: str
    """What is checked, in words."""
    fault: str | None = None
    not_tried: str | None = None
    """Why it says nothing."""

    def __str__(self) -> str:
        return f"{self.entry}: {self.check}: {self.fault or self.not_tried or 'fine'}"


@attrs.frozen
class Report:
    """What all checks found."""

    outcomes: tuple[Outcome, ...]

    @property
    def faults(self) -> list[Outcome]:
        """Those that found something."""
        return [outcome for outcome in self.outcomes if outcome.fault is not None]

    @property
    def not_tried(self) -> list[Outcome]:
        """Those that say nothing, each with the reason."""
        return [outcome for outcome in self.outcomes if outcome.not_tried is not None]

    def __str__(self) -> str:
        lines = [f"{len(self.faults)} of {len(self.outcomes)} checks found faults" + (":" if self.faults else "")]
        for entry in dict.fromkeys(outcome.entry for outcome in self.faults):
            lines.append(f"  {entry}")
            for outcome in (fault for fault in self.faults if fault.entry == entry):
                lines.append(f"    {outcome.check}: {outcome.fault}")
                lines += [f"      promised: {outcome.promise}"] if outcome.promise else []
        if self.not_tried:
            lines += ["not tried:", *(f"  {outcome}" for outcome in self.not_tried)]
        return "\n".join(lines)


def check_plugin(
    *plugins: Any,
    configs: Mapping[str, Any] | None = None,
    models: Mapping[str, object] | None = None,
    folders: Mapping[str, Any] | None = None,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    distribution: str | None = None,
) -> Report:
    """Verify that every entry of ``plugins`` (modules, or objects with hook methods) keeps what its kind promises.

    Several are checked together: one may choose another, as an architecture does an activation function of its own.
    saekit's own plugins are there, too, and nobody else's.

    ``configs`` has by the names of entries the options to try them with, one or several; else they are the defaults.
    ``models`` has, for backends, a small model to run (what ``saekit.train(model=...)`` takes), or a
    :class:`saekit.config.ModelConfig` that names one.  ``folders`` has, for loaders, the path of an SAE's folder of
    their format, or several.  ``skip`` leaves out an entry, ``"halving"``, or a check of it, ``"halving: finite"``, and
    says why.  ``only`` has the names of the checks that are made, while one is mended.  ``distribution`` is that of the
    qualified keys by which plugins name each other; None: that whose entry points the modules are, or ``test``.

    Returns what was checked; :class:`ConformanceError`, an AssertionError, tells all faults at once.
    """
    given: dict[str, Any] = {"configs": configs, "models": models, "folders": folders, "skip": skip, "only": only}
    report = plugin_report(*plugins, distribution=distribution, **given)
    if report.faults:
        raise ConformanceError(str(report))
    return report


def plugin_report(
    *plugins: Any,
    configs: Mapping[str, Any] | None = None,
    models: Mapping[str, object] | None = None,
    folders: Mapping[str, Any] | None = None,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    distribution: str | None = None,
) -> Report:
    """What :func:`check_plugin` finds, as a report; faults raise nothing."""
    given = _Given(configs or {}, models or {}, folders or {}, skip or {}, only)
    outcomes = [outcome for plugin in plugins for outcome in _of_module(plugin, given)]
    try:
        manager, items = _managed(plugins, distribution)
    except PluginError as error:
        return Report((*outcomes, Outcome("the plugin", "registration", "", fault=str(error))))
    given.check_names([item.entry.name for item in items])
    with ambient():
        outcomes += [outcome for item in items for outcome in _of_entry(item, manager, given)]
    return Report(tuple(outcomes))


@attrs.frozen
class _Given:
    configs: Mapping[str, Any]
    models: Mapping[str, object]
    folders: Mapping[str, Any]
    skip: Mapping[str, str]
    only: Collection[str] | None = None

    def wants(self, check: str) -> bool:
        """Whether it is to be made."""
        return self.only is None or check in self.only

    def check_names(self, names: Sequence[str]) -> None:
        """A slip of the pen would leave something unchecked."""
        for what in ("configs", "models", "folders", "skip"):
            if wrong := [key for key in getattr(self, what) if key.partition(":")[0] not in names]:
                raise ValueError(f"{what} names {', '.join(wrong)}; the entries are {', '.join(names) or 'none'}")

    def options(self, item: Registered) -> Iterator[Any]:
        """To try the entry with."""
        if item.entry.name not in self.configs:
            yield item.entry.config()
            return
        chosen = self.configs[item.entry.name]
        yield from chosen if isinstance(chosen, (list, tuple)) else [chosen]

    def paths(self, name: str) -> tuple[Path, ...]:
        """The folders for a loader."""
        chosen = self.folders.get(name, ())
        return tuple(map(Path, chosen if isinstance(chosen, (list, tuple)) else [chosen]))


def _managed(plugins: Sequence[Any], distribution: str | None) -> tuple[PluginManager, list[Registered]]:
    """A manager with all of ``plugins`` and saekit's own, and the entries of ``plugins``."""
    alone, manager = isolated_manager(*plugins, distribution=distribution), isolated_manager(builtins=True)
    wanted = [item for kind in KINDS for item in alone.registry(kind).items]
    own = {(kind, item.entry.name, item.entry.config) for kind in KINDS for item in manager.registry(kind).items}
    strange = not all((item.kind.name, item.entry.name, item.entry.config) in own for item in wanted)
    if strange or not wanted:
        manager = isolated_manager(*plugins, distribution=distribution, builtins=True)
    if notes := [note for note in alone.notes if "import" not in note.text]:  # importing has a check of its own
        raise PluginError("; ".join(f"{note.plugin} {note.text}" for note in notes))
    found = [
        next(
            other
            for other in manager.registry(item.kind).items
            if (other.entry.name, other.entry.config) == (item.entry.name, item.entry.config)
        )
        for item in wanted
    ]
    return manager, found


def _of_module(plugin: Any, given: _Given) -> Iterator[Outcome]:
    if not given.wants("import"):
        return
    name = getattr(plugin, "__name__", type(plugin).__name__)
    with tempfile.TemporaryDirectory() as place:
        promise = " ".join((check_import.__doc__ or "").split())
        outcome = Outcome(f"the module {name}", "import", promise)
        if isinstance(plugin, type(importlib)):
            yield _tried(lambda: check_import(name, Path(place)), outcome)
        else:
            yield attrs.evolve(outcome, not_tried="it is no module")


def _of_entry(item: Registered, manager: PluginManager, given: _Given) -> Iterator[Outcome]:
    label = f"{item.kind.label} {item.entry.name!r}"
    if (reason := given.skip.get(item.entry.name)) is not None:
        yield Outcome(label, "all", "", not_tried=reason)
        return
    try:
        every = list(given.options(item))
    except TypeError as error:
        fault = f"its options have no defaults; give configs={{{item.entry.name!r}: ...}} ({error})"
        yield Outcome(label, "options", "", not_tried=fault)
        return
    own: Checks = importlib.import_module(f"saekit.testing.checks.{item.kind.name}").CHECKS
    missing = item.missing()
    wanted = [check for check in (*OF_EVERY_KIND, *own) if given.wants(check.name)]
    for options in every:
        known: dict[str, Any] = {}
        failed = f"needs {', '.join(missing)}, not installed here" if missing else ""
        for check in wanted:
            outcome = Outcome(f"{label} ({_shown(options)})", check.name, check.promise)
            reason = given.skip.get(f"{item.entry.name}: {check.name}")
            if reason is None and failed and check not in OF_EVERY_KIND:
                reason = failed
            if reason is not None:
                yield attrs.evolve(outcome, not_tried=reason)
                continue
            yield (found := _run(check, outcome, item, options, manager, given, known))
            if check.name == _FIRST and found.fault is not None:
                failed = "it cannot be built"


def _shown(options: Any) -> str:
    """The options that are not the defaults."""
    fields = attrs.fields(type(options))
    given = [
        f"{field.name}={getattr(options, field.name)!r}"
        for field in fields
        if field.init and getattr(options, field.name) != field.default
    ]
    return f"{type(options).__qualname__}({', '.join(given)})"


def _run(
    check: Check,
    outcome: Outcome,
    item: Registered,
    options: Any,
    manager: PluginManager,
    given: _Given,
    known: dict[str, Any],
) -> Outcome:
    name = item.entry.name
    with tempfile.TemporaryDirectory() as place:
        subject = Subject(item, options, manager, Path(place), given.models.get(name), given.paths(name), known)

        def run() -> None:
            before = surroundings(item.entry.requires)
            check.run(subject)
            # A model's library may draw its first weights from torch's own random numbers.
            if others := changed(before, item.entry.requires, random_too=item.kind is not MODEL_BACKENDS):
                raise Fault(f"it changed {', '.join(others)}, which belong to the whole process")

        return _tried(run, outcome)


def _tried(run: Any, outcome: Outcome) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except KeyboardInterrupt:
        raise
    except NotTried as reason:
        return attrs.evolve(outcome, not_tried=str(reason))
    except Fault as fault:
        return attrs.evolve(outcome, fault=str(fault))
    except BaseException as error:
        return attrs.evolve(outcome, fault=f"it raised {error_text(error)}")
    return outcome
