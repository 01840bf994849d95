"""Finding plugins, keeping the broken ones apart, and building what a configuration chooses."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import pluggy

from saekit import hookspecs
from saekit.errors import PluginError, PluginWarning, UnknownKeyError
from saekit.registry import KINDS, Entry, Registered, Registry

__all__ = ["DISABLE_VARIABLE", "Failure", "PluginManager", "default_manager"]

DISABLE_VARIABLE = "SAEKIT_DISABLE_PLUGINS"
_GROUP = "saekit"
_PREFIX = "saekit_register_"
_OWNED = "the options class of another plugin, {}; define your own"


@attrs.frozen
class Failure:
    """A plugin that was left out, and why."""

    plugin: str
    """``distribution:entry point``."""
    version: str
    reason: str
    """The last line of the traceback, or what the plugin did wrong."""


class PluginManager:
    """Plugins by kind and key.

    ``discover`` loads the entry points of the installed distributions, sorted by distribution and name.
    ``disabled`` names plugins to leave out, by distribution, entry point or ``distribution:entry point``; by default
    it is read from the environment variable ``SAEKIT_DISABLE_PLUGINS``, separated by commas.
    """

    def __init__(self, *, discover: bool = True, disabled: Iterable[str] | None = None) -> None:
        self._pluggy = pluggy.PluginManager("saekit")
        self._pluggy.add_hookspecs(hookspecs)
        self.registries = {kind: Registry(kind) for kind in KINDS}
        self.failures: list[Failure] = []
        self.blocked: list[str] = []
        if disabled is None:
            disabled = os.environ.get(DISABLE_VARIABLE, "").split(",")
        self._disabled = {name.strip() for name in disabled if name.strip()}
        # A distribution may be written in any spelling of its name, an entry point only in its own.
        self._disabled |= {":".join([_normalised(d), *rest]) for d, *rest in (n.split(":", 1) for n in self._disabled)}
        if discover:
            self._discover()

    # ---- loading

    def _discover(self) -> None:
        found = list(importlib.metadata.entry_points(group=_GROUP))
        # Reading a distribution's name parses its whole metadata, so once for each.
        owners = {id(dist): _owner(dist) for dist in {id(point.dist): point.dist for point in found}.values()}
        points = [(*owners[id(point.dist)], point) for point in found]
        for distribution, version, point in sorted(points, key=lambda p: (p[0], p[2].name, p[2].value)):
            plugin = f"{distribution}:{point.name}"
            if self._disabled & {distribution, point.name, plugin}:
                self.blocked.append(plugin)
                continue
            try:
                self.register(point.load(), name=point.name, distribution=distribution, version=version)
            except (Exception, SystemExit) as error:  # a stranger's module may raise anything; the rest must go on
                self._fail(plugin, version, _last_line(error))

    def register(self, plugin: object, *, name: str, distribution: str = "local", version: str = "") -> None:
        """Add one plugin (a module or any object with hook methods), all of it or, raising, nothing of it."""
        full_name = f"{distribution}:{name}"
        if self._pluggy.has_plugin(full_name) or self._pluggy.is_registered(plugin):
            raise PluginError(f"the plugin {full_name} is already registered")
        try:
            self._pluggy.register(plugin, name=full_name)
            _check_hook_names(plugin)
            entries = self._entries(plugin)
            evicted = [item for kind, entry in entries for item in self._evicted(kind, entry)]
        except BaseException as error:
            if self._pluggy.has_plugin(full_name):
                self._pluggy.unregister(name=full_name)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(str(error).replace("\n", " ")) from error
            raise
        for item in evicted:
            self._remove(item, f"{item.entry.config.__qualname__} is {_OWNED.format(full_name)}")
        for kind, entry in entries:
            self.registries[kind].items.append(Registered(entry, kind, distribution, version, full_name))

    def _entries(self, plugin: object) -> list[tuple[str, Entry]]:
        """What one plugin returns from all its hooks, checked."""
        found: list[tuple[str, Entry]] = []
        for kind in KINDS:
            hook = _PREFIX + kind
            for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    if implementation.wrapper or implementation.hookwrapper:
                        raise PluginError(f"{hook} is a hook wrapper, which saekit does not call")
                    entries = _checked(hook, implementation.function())
                    _check_own_classes(hook, entries)
                    found += [(kind, entry) for entry in entries]
        return found

    def _evicted(self, kind: str, entry: Entry) -> list[Registered]:
        """The entries that must give way because they use the options class that ``entry``'s plugin defines.

        A config object alone says which plugin it chooses, so a class has one owner: the plugin whose ``build`` stands
        in the class's own module.  Raises for an ``entry`` that is not the owner.
        """
        same_class = [item for item in self.registries[kind].items if item.entry.config is entry.config]
        others = [item for item in same_class if item.entry.build is not entry.build]
        for item in others:
            if not _defines(entry) or _defines(item.entry):
                raise PluginError(f"{entry.config.__qualname__} is {_OWNED.format(item.key)}")
        return others

    def _remove(self, item: Registered, reason: str) -> None:
        """Leave out the whole plugin of ``item``."""
        for registry in self.registries.values():
            registry.items = [other for other in registry.items if other.plugin != item.plugin]
        if self._pluggy.has_plugin(item.plugin):
            self._pluggy.unregister(name=item.plugin)
            self._fail(item.plugin, item.version, reason)

    def _fail(self, plugin: str, version: str, reason: str) -> None:
        self.failures.append(Failure(plugin, version, reason))
        warnings.warn(f"plugin {plugin} {version} was left out: {reason}", PluginWarning, stacklevel=4)

    # ---- looking up

    def get(self, kind: str, key: str) -> Registered:
        """The entry of ``kind`` with a bare or qualified ``key``; the errors say what there is instead."""
        if kind not in self.registries:
            raise UnknownKeyError(f"there is no kind of plugin {kind!r}; the kinds are {', '.join(KINDS)}")
        return self.registries[kind].get(key, self.troubles)

    def find(self, kind: str, choice: object) -> Registered:
        """The entry that ``choice`` selects: a key, or an instance of the entry's options class."""
        if isinstance(choice, str):
            return self.get(kind, choice)
        return self.registries[kind].of_config(choice)

    def build(self, kind: str, choice: object, **services: Any) -> Any:
        """Build what ``choice`` selects, passing it ``services`` (see the hook of its kind).

        ``choice`` is a key (then the options are the defaults) or an instance of an options class.
        """
        item = self.find(kind, choice)
        item.check_requirements()
        return item.entry.build(self.options(kind, choice), **services)

    def options(self, kind: str, choice: object) -> Any:
        """The options object that ``choice`` stands for: a key stands for the defaults of its entry."""
        return self.get(kind, choice).entry.config() if isinstance(choice, str) else choice

    def troubles(self) -> list[str]:
        """Lines about the plugins that were left out."""
        lines = [f"Plugin {failure.plugin} failed to load: {failure.reason}" for failure in self.failures]
        return lines + [f"Plugin {plugin} is disabled by {DISABLE_VARIABLE}." for plugin in self.blocked]


@functools.cache
def default_manager() -> PluginManager:
    """The manager of this process, with all installed plugins; made on first use."""
    return PluginManager()


def _owner(distribution: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """The distribution's name, normalised so that a key has one spelling, and its version."""
    metadata: Any = (distribution.metadata if distribution is not None else None) or {}  # a broken one has none
    return _normalised(metadata.get("Name") or "unknown"), metadata.get("Version") or ""


def _normalised(distribution: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _last_line(error: BaseException) -> str:
    try:
        text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    except Exception:  # an exception whose own __str__ fails
        text = ""
    return (text.strip() or type(error).__name__).splitlines()[-1]


def _defines(entry: Entry) -> bool:
    """Whether the entry's ``build`` stands in the module of its options class."""
    build = entry.build.func if isinstance(entry.build, functools.partial) else entry.build
    return getattr(build, "__module__", None) == entry.config.__module__


def _check_hook_names(plugin: object) -> None:
    """Refuse functions named or marked like hooks that are none: they would silently never be called."""
    known = {_PREFIX + kind for kind in KINDS}
    for name in dir(plugin):
        member = getattr(plugin, name, None)
        marked = isinstance(getattr(member, "saekit_impl", None), Mapping)
        if name in known and callable(member) and not marked:
            raise PluginError(f"{name} lacks the @saekit.hookimpl mark, so it would never be called")
        looks_like = marked or (name.startswith("saekit_") and callable(member))
        if looks_like and name not in known:
            raise PluginError(f"there is no hook {name}; the hooks are {', '.join(sorted(known))}")


def _checked(hook: str, entries: object) -> list[Entry]:
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Iterable):
        raise PluginError(f"{hook} returned {_short(entries)}, expected an iterable of saekit.Entry")
    checked = []
    for entry in entries:
        if not isinstance(entry, Entry):
            raise PluginError(f"{hook} returned {_short(entry)} among its entries, expected a saekit.Entry")
        where = f"{hook}: entry {entry.name!r}"
        if not isinstance(entry.name, str) or not re.fullmatch(r"[\w.+-]+", entry.name):
            raise PluginError(f"{where}: the name must be made of letters, digits, '_', '-', '.' and '+'")
        if not (isinstance(entry.config, type) and attrs.has(entry.config)):
            raise PluginError(f"{where}: config is {_short(entry.config)}, expected a frozen attrs class")
        if not _is_frozen(entry.config):
            raise PluginError(f"{where}: {entry.config.__qualname__} is not frozen; use @attrs.frozen(kw_only=True)")
        if "name" in {field.name for field in attrs.fields(entry.config)}:
            raise PluginError(f"{where}: an option cannot be called 'name', which is the plugin's own key in a file")
        if not callable(entry.build):
            raise PluginError(f"{where}: build is {_short(entry.build)}, expected a callable")
        if entry.precheck is not None and not callable(entry.precheck):
            raise PluginError(f"{where}: precheck is {_short(entry.precheck)}, expected a callable")
        if isinstance(entry.requires, str) or not all(isinstance(name, str) for name in _items(entry.requires)):
            raise PluginError(f"{where}: requires is {_short(entry.requires)}, expected a list of package names")
        checked.append(entry)
    return checked


def _items(value: object) -> list[object]:
    """The items of a list or tuple; of anything else, something that is no text."""
    return list(value) if isinstance(value, (list, tuple)) else [None]


def _is_frozen(cls: type) -> bool:
    return "_frozen" in getattr(cls.__setattr__, "__name__", "")


def _check_own_classes(hook: str, entries: list[Entry]) -> None:
    """A config object alone must say which entry it belongs to."""
    owners: dict[type, Entry] = {}
    for entry in entries:
        owner = owners.setdefault(entry.config, entry)
        if owner.build is not entry.build:
            raise PluginError(
                f"{hook}: entries {owner.name!r} and {entry.name!r} share the options class "
                f"{entry.config.__qualname__}; give each its own"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
