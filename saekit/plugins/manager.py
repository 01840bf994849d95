"""Finding plugins, keeping the broken ones apart, and building what a configuration chooses."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar, overload

import attrs
import pluggy

from saekit.cautions import warn
from saekit.config.fields import PLUGIN_KIND
from saekit.errors import PluginError, PluginWarning, SaekitError
from saekit.kinds import KINDS, Kind, kind_of
from saekit.plugins import hookspecs
from saekit.plugins.absent import disabled, not_there
from saekit.plugins.building import built
from saekit.plugins.choice import Choice
from saekit.plugins.entries import check_hook_names, checked_entries, defines
from saekit.plugins.loading import Point, installed_points, watched
from saekit.plugins.registry import Entry, Registered, Registry
from saekit.plugins.text import normalized, printable
from saekit.reasons import last_line

__all__ = ["DISABLE_VARIABLE", "Failure", "Note", "PluginManager", "default_manager"]

T = TypeVar("T")
DISABLE_VARIABLE = "SAEKIT_DISABLE_PLUGINS"
_OWNED = "the options class of another plugin, {}; define your own"


@attrs.frozen
class Failure:
    """A plugin that was left out, and why."""

    plugin: str
    """``distribution:entry point``."""
    version: str
    reason: str
    """The last line of the traceback, or what the plugin did wrong."""


@attrs.frozen
class Note:
    """Something that a plugin did while it was loaded, and that its author should know of."""

    plugin: str
    """``distribution:entry point``."""
    version: str
    text: str


class PluginManager:
    """Plugins by kind and key.

    ``discover`` loads the entry points of the installed distributions, sorted by distribution and name.
    ``disabled`` names plugins to leave out, by distribution, entry point or ``distribution:entry point``; by default
    it is read from the environment variable ``SAEKIT_DISABLE_PLUGINS``, separated by commas.
    """

    def __init__(self, *, discover: bool = True, disabled: Iterable[str] | None = None) -> None:
        self._pluggy = pluggy.PluginManager("saekit")
        self._pluggy.add_hookspecs(hookspecs)
        self._plugins: dict[str, object] = {}
        self.registries = {name: Registry(kind) for name, kind in KINDS.items()}
        self.failures: list[Failure] = []
        self.notes: list[Note] = []
        self.blocked: list[str] = []
        by_variable = disabled is None
        if disabled is None:
            disabled = os.environ.get(DISABLE_VARIABLE, "").split(",")
        self._disabled = {name.strip() for name in disabled if name.strip()}
        asked = sorted(self._disabled)
        # A distribution may be written in any spelling of its name, an entry point only in its own.
        self._disabled |= set(map(_spelled, self._disabled))
        if discover:
            points = installed_points()
            self._discover(points)
            names = {name for point in points for name in (point.distribution, point.name, point.plugin)}
            missed = [name for name in asked if not {name, _spelled(name)} & names]
            if missed and by_variable and os.environ.get("RANK", "0") == "0":  # of several processes, the first
                _tell(f"{DISABLE_VARIABLE} names {printable(', '.join(missed))}, which is no plugin that is installed")

    # ---- loading

    def _discover(self, points: Iterable[Point]) -> None:
        for point in points:
            plugin = point.plugin
            if self._disabled & {point.distribution, point.name, plugin}:
                self.blocked.append(plugin)
                continue
            reason = None
            with watched() as notes:
                try:
                    entries, evicted = self._taken_in(point.load(), plugin)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a stranger's module may raise anything; the rest must go on
                    reason = last_line(error)
            self.notes += [Note(plugin, point.version, text) for text in notes]
            if reason is None:
                self._include(entries, evicted, plugin, point.distribution, point.version)
            else:
                self._fail(plugin, point.version, reason)

    def copy(self) -> PluginManager:
        """Another one with the same plugins, which need not be looked at again; to each, others can be added."""
        other = PluginManager(discover=False, disabled=self._disabled)
        other._plugins = dict(self._plugins)
        for name, registry in self.registries.items():
            other.registries[name].items = list(registry.items)
        other.failures, other.notes, other.blocked = list(self.failures), list(self.notes), list(self.blocked)
        return other

    def register(
        self, plugin: object, *, name: str | None = None, distribution: str = "local", version: str = ""
    ) -> None:
        """Add one plugin (a module or any object with hook methods), all of it or, raising, nothing of it.

        ``name`` stands for it in messages; None: that of the module, or of the object's class.
        :class:`PluginError` names the plugin and what is wrong with it, whatever its own code raises.
        """
        distribution, version = printable(distribution), printable(version)
        name = getattr(plugin, "__name__", type(plugin).__name__) if name is None else name
        full_name = f"{distribution}:{printable(name)}"
        with watched() as notes:
            try:
                entries, evicted = self._taken_in(plugin, full_name)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise PluginError(f"plugin {full_name} {version}".rstrip() + f": {last_line(error)}") from error
        self.notes += [Note(full_name, version, text) for text in notes]
        self._include(entries, evicted, full_name, distribution, version)

    def _taken_in(self, plugin: object, full_name: str) -> tuple[list[tuple[Kind[Any], Entry]], list[Registered]]:
        """A plugin's entries by kind, checked, and the entries that must give way; raising, nothing of it stays."""
        if full_name in self._plugins or any(plugin is other for other in self._plugins.values()):
            raise PluginError(f"the plugin {full_name} is already registered")
        try:
            self._pluggy.register(plugin, name=full_name)
            check_hook_names(plugin)
            entries = self._entries(plugin)
            evicted = [item for kind, entry in entries for item in self._evicted(kind, entry)]
        except BaseException as error:
            if self._pluggy.has_plugin(full_name):
                self._pluggy.unregister(name=full_name)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(str(error).replace("\n", " ")) from error
            raise
        self._plugins[full_name] = plugin
        return entries, evicted

    def _include(
        self,
        entries: list[tuple[Kind[Any], Entry]],
        evicted: list[Registered],
        plugin: str,
        distribution: str,
        version: str,
    ) -> None:
        for item in evicted:
            self._remove(item, f"{item.entry.config.__qualname__} is {_OWNED.format(plugin)}")
        for kind, entry in entries:
            self.registries[kind.name].items.append(Registered(entry, kind, distribution, version, plugin))
        if not entries:
            self.notes.append(Note(plugin, version, "offers nothing: no hook of its returns an entry"))

    def _entries(self, plugin: object) -> list[tuple[Kind[Any], Entry]]:
        """What one plugin returns from all its hooks, checked."""
        found: list[tuple[Kind[Any], Entry]] = []
        for kind in KINDS.values():
            hook = kind.hook
            for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    if implementation.wrapper or implementation.hookwrapper:
                        raise PluginError(f"{hook} is a hook wrapper, which saekit does not call")
                    try:
                        entries = checked_entries(hook, implementation.function())
                    except (PluginError, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        raise PluginError(f"{hook} raised {last_line(error)}") from error
                    found += [(kind, entry) for entry in entries]
        return found

    def _evicted(self, kind: Kind[Any], entry: Entry) -> list[Registered]:
        """The entries that must give way because they use the options class that ``entry``'s plugin defines.

        A config object alone says which plugin it chooses, so a class has one owner: the plugin whose ``build`` stands
        in the class's own module.  Raises for an ``entry`` that is not the owner.
        """
        same_class = [item for item in self.registries[kind.name].items if item.entry.config is entry.config]
        others = [item for item in same_class if item.entry.build != entry.build]
        for item in others:
            if not defines(entry) or defines(item.entry):
                raise PluginError(f"{entry.config.__qualname__} is {_OWNED.format(item.key)}")
        return others

    def _remove(self, item: Registered, reason: str) -> None:
        """Leave out the whole plugin of ``item``."""
        for registry in self.registries.values():
            registry.items = [other for other in registry.items if other.plugin != item.plugin]
        if self._plugins.pop(item.plugin, None) is not None:
            if self._pluggy.has_plugin(item.plugin):  # not what a copy has from another
                self._pluggy.unregister(name=item.plugin)
            self._fail(item.plugin, item.version, reason)

    def _fail(self, plugin: str, version: str, reason: str) -> None:
        reason = printable(reason)
        self.failures.append(Failure(plugin, version, reason))
        _tell(f"plugin {plugin} {version}".rstrip() + f" was left out: {reason}")

    # ---- looking up

    def registry(self, kind: Kind[Any] | str) -> Registry:
        """All entries of ``kind``."""
        return self.registries[kind_of(kind).name]

    def get(self, kind: Kind[Any] | str, key: str) -> Registered:
        """The entry of ``kind`` with a bare or qualified ``key``; the errors say what there is instead."""
        return self.registry(kind).get(key, self.troubles)

    def find(self, kind: Kind[Any] | str, choice: object) -> Registered:
        """The entry that ``choice`` selects: a key, an instance of the entry's options class, or a bound choice."""
        if isinstance(choice, Choice):
            return choice.item
        return self.get(kind, choice) if isinstance(choice, str) else self.registry(kind).of_config(choice)

    @overload
    def build(self, kind: Kind[T], choice: object, **services: Any) -> T: ...

    @overload
    def build(self, kind: str, choice: object, **services: Any) -> Any: ...

    def build(self, kind: Kind[Any] | str, choice: object, **services: Any) -> Any:
        """Build what ``choice`` selects, passing it ``services`` (see the hook of its kind).

        ``choice`` is a key (then the options are the defaults), an instance of an options class, or a bound choice.
        Whatever goes wrong names the plugin, and what comes back is checked: see
        :func:`saekit.plugins.building.built`.
        """
        if isinstance(choice, Choice):
            return choice.build(**services)
        item = self.find(kind, choice)
        return built(item, self.with_choices(None if isinstance(choice, str) else choice, item), **services)

    @overload
    def bound(self, kind: Kind[T], choice: object) -> Choice[T]: ...

    @overload
    def bound(self, kind: str, choice: object) -> Choice[Any]: ...

    def bound(self, kind: Kind[Any] | str, choice: object) -> Choice[Any]:
        """``choice`` (as for :meth:`build`) with its plugin and its options; one that is bound is so already."""
        if isinstance(choice, Choice):
            return choice
        item, spelled = self.find(kind, choice), not isinstance(choice, str)
        return Choice(item.kind, item, self.with_choices(choice if spelled else item.entry.config(), item), spelled)

    def with_choices(self, options: Any, item: Registered) -> Any:
        """``options`` of ``item`` (None: its defaults) with the plugins that they choose bound, as those of a
        configuration that was loaded.  What cannot be bound stays, and is told where it is built."""
        fields = [field for field in attrs.fields(item.entry.config) if PLUGIN_KIND in field.metadata]
        if not fields:
            return options
        made: dict[str, Any] = {}
        with contextlib.suppress(TypeError):  # an option is required; building says so
            options = item.entry.config() if options is None else options
        for field in fields if options is not None else ():
            kind, value = field.metadata[PLUGIN_KIND], getattr(options, field.name)
            with contextlib.suppress(SaekitError):
                several = isinstance(value, (tuple, list))
                bound = [self.bound(kind, one) for one in (value if several else [value]) if one is not None]
                if bound:
                    made[field.alias or field.name] = tuple(bound) if several else bound[0]
        return attrs.evolve(options, **made) if made else options

    def options(self, kind: Kind[Any] | str, choice: object) -> Any:
        """The options object that ``choice`` stands for: a key stands for the defaults of its entry."""
        return self.bound(kind, choice).options if isinstance(choice, (str, Choice)) else choice

    def troubles(self, key: str = "", kind: Kind[Any] | None = None, guessed: bool = False) -> list[str]:
        """Lines about the plugins that were left out; of a qualified ``key`` of ``kind`` that is not there, about those
        of its distribution, or that it is not installed, unless it was ``guessed`` what is meant."""
        distribution = normalized(key.partition(":")[0]) if ":" in key else ""

        def of_it(plugin: str) -> bool:
            return not distribution or plugin.partition(":")[0] == distribution

        failures = [failure for failure in self.failures if of_it(failure.plugin)]
        lines = [f"Plugin {failure.plugin} failed to load: {failure.reason}" for failure in failures]
        lines += disabled(filter(of_it, self.blocked), DISABLE_VARIABLE)
        if distribution and not lines and not guessed:
            items = [item for registry in self.registries.values() for item in registry.items]
            versions = [item.version for item in items if item.distribution == distribution]
            lines.append(not_there(distribution, next(iter(versions), None), kind.label if kind else "plugin"))
        return lines


def _spelled(name: str) -> str:
    """A name of a plugin, with the one spelling of its distribution."""
    distribution, colon, point = name.partition(":")
    return f"{normalized(distribution)}{colon}{point}"


def _tell(text: str) -> None:
    try:
        warn(text, PluginWarning)
    except PluginWarning:  # warnings are errors; a stranger's plugin must still stop nobody
        with contextlib.suppress(Exception):
            sys.stderr.write(f"warning: {text}\n")


@functools.cache
def default_manager() -> PluginManager:
    """The manager of this process, with all installed plugins; made on first use."""
    return PluginManager()
