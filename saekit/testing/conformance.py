"""Whether plugins keep what their kinds promise; see :func:`saekit.testing.check_plugin`."""

from __future__ import annotations

import difflib
import importlib
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.ambient import ambient
from saekit.config.converter import ConfigConverter
from saekit.errors import PluginError
from saekit.kinds import KINDS, MODEL_BACKENDS
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.reasons import error_text
from saekit.site import Site
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
    sites: Mapping[str, Any] | None = None,
    distribution: str | None = None,
) -> Report:
    """Verify that every entry of ``plugins`` (modules, or objects with hook methods) keeps what its kind promises.

    Several are checked together: one may choose another, as an architecture does an activation function of its own.
    saekit's own plugins are there, too, and nobody else's.

    ``configs`` has by the names of entries the options to try them with, one or several, as objects or as tables; else
    they are the defaults.
    ``models`` has, for backends, a small model to run (what ``saekit.train(model=...)`` takes), or a
    :class:`saekit.config.ModelConfig` that names one.  ``folders`` has, for loaders, the path of an SAE's folder of
    their format, or several.  ``sites`` has, for sources with data of their own, the hook's name, or the
    :class:`saekit.Site`, of which they have activations, or several.  ``skip`` leaves out an entry, ``"halving"``, or a
    check of it, ``"halving: finite"``, and says why.  ``only`` has the names of the checks that are made, while one is
    mended.  ``distribution`` is that of the qualified keys by which plugins name each other; None: that whose entry
    points the modules are, or ``test``.

    Returns what was checked; :class:`ConformanceError`, an AssertionError, tells all faults at once.
    """
    given: dict[str, Any] = {"configs": configs, "models": models, "folders": folders, "skip": skip, "only": only}
    report = plugin_report(*plugins, sites=sites, distribution=distribution, **given)
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
    sites: Mapping[str, Any] | None = None,
    distribution: str | None = None,
) -> Report:
    """What :func:`check_plugin` finds, as a report; faults raise nothing."""
    given = _Given(configs or {}, models or {}, folders or {}, skip or {}, only, sites or {})
    outcomes = [outcome for plugin in plugins for outcome in _of_module(plugin, given)]
    try:
        manager, items = _managed(plugins, distribution)
    except PluginError as error:
        return Report((*outcomes, Outcome("the plugin", "registration", "", fault=str(error))))
    given.check_names(items)
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
    sites: Mapping[str, Any] = {}

    def wants(self, check: str) -> bool:
        """Whether it is to be made."""
        return self.only is None or check in self.only

    def check_names(self, items: Sequence[Registered]) -> None:
        """A slip of the pen would leave something unchecked."""
        checks: dict[str, set[str]] = {item.entry.name: set() for item in items}
        for item in items:
            checks[item.entry.name] |= {check.name for check in (*OF_EVERY_KIND, *_own_checks(item))}
        for what in ("configs", "models", "folders", "sites", "skip"):
            if wrong := [key for key in getattr(self, what) if key.partition(":")[0] not in checks]:
                raise ValueError(f"{what} names {', '.join(wrong)}; the entries are {', '.join(checks) or 'none'}")
        every = {"import", *(check for known in checks.values() for check in known)}
        for name in self.only or ():
            _must_be_one(name, every, "only")
        for name, _, check in (key.partition(": ") for key in self.skip if ":" in key):
            _must_be_one(check, checks[name], "skip")

    def options(self, item: Registered, manager: PluginManager) -> Iterator[Any]:
        """To try the entry with."""
        name, config = item.entry.name, item.entry.config
        if name not in self.configs:
            yield config()
            return
        chosen = self.configs[name]
        for one in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
            if isinstance(one, Mapping):
                yield ConfigConverter(manager).choice({**one, "name": item.key}, item.kind).options
            elif isinstance(one, config):
                yield one
            else:
                raise ValueError(f"configs has {one!r} for {name!r}, expected a {config.__qualname__}, or a table")

    def places(self, name: str) -> tuple[Site, ...]:
        """The sites of a source."""
        chosen = self.sites.get(name, ())
        several = chosen if isinstance(chosen, (list, tuple)) else [chosen]
        return tuple(one if isinstance(one, Site) else Site(hook_name=one) for one in several)

    def paths(self, name: str) -> tuple[Path, ...]:
        """The folders for a loader."""
        chosen = self.folders.get(name, ())
        return tuple(map(Path, chosen if isinstance(chosen, (list, tuple)) else [chosen]))


def _own_checks(item: Registered) -> Checks:
    """Those of its kind."""
    checks: Checks = importlib.import_module(f"saekit.testing.checks.{item.kind.name}").CHECKS
    return checks


def _must_be_one(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the checks are {', '.join(sorted(known))}"
        raise ValueError(f"{what} names the check {name!r}, which there is not; {hint}")


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
    found = []
    for item in wanted:
        alike = [other for other in manager.registry(item.kind).items if other.entry.name == item.entry.name]
        same = [other for other in alike if other.entry.config is item.entry.config]
        if not same:
            raise PluginError(
                f"{item.kind.hook} makes the options class {item.entry.config.__qualname__} anew whenever it is "
                "called; define it at the top of the module"
            )
        found.append(same[0])
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
        every = list(given.options(item, manager))
    except TypeError as error:
        fault = f"its options have no defaults; give configs={{{item.entry.name!r}: ...}} ({error})"
        yield Outcome(label, "options", "With some options it can be tried.", fault=fault)
        return
    missing = item.missing()
    wanted = [check for check in (*OF_EVERY_KIND, *_own_checks(item)) if given.wants(check.name)]
    for options in every:
        known: dict[object, Any] = {}
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
            if found.fault is not None:
                known.clear()  # it may be what is at fault, or left so
                failed = "it cannot be built" if check.name == _FIRST else failed


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
    known: dict[object, Any],
) -> Outcome:
    name = item.entry.name
    with tempfile.TemporaryDirectory() as place:
        model, sites = given.models.get(name), given.places(name)
        subject = Subject(item, options, manager, Path(place), model, given.paths(name), sites, known)

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
