"""What a plugin offers, checked: hooks that exist, and entries that are what :class:`saekit.Entry` says."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Mapping

import attrs

from saekit.errors import PluginError
from saekit.kinds import KINDS, OPTIMIZERS, SAE_ARCHITECTURES
from saekit.plugins.options import option_faults
from saekit.plugins.registry import Entry
from saekit.plugins.text import printable, short

__all__ = ["check_hook_names", "checked_entries", "defines"]

_PREFIX = "saekit_register_"
_MOST = 1000  # entries of one hook: a generator that never ends is a fault


def check_hook_names(plugin: object) -> None:
    """Refuse functions named or marked like hooks that are none: they would silently never be called."""
    known = {kind.hook for kind in KINDS.values()}
    for name in dir(plugin):
        member = getattr(plugin, name, None)
        marked = isinstance(getattr(member, "saekit_impl", None), Mapping)
        if name in known and callable(member) and not marked:
            raise PluginError(f"{name} lacks the @saekit.hookimpl mark, so it would never be called")
        looks_like = marked or (name.startswith("saekit_") and callable(member))
        if looks_like and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f". Did you mean {near[0]}?" if near else f"; the hooks are {_PREFIX}..., of {', '.join(KINDS)}"
            raise PluginError(f"there is no hook {name}{meant}")


def checked_entries(hook: str, returned: object) -> list[Entry]:
    """What ``hook`` ``returned``, each entry checked; :class:`PluginError` names the entry and what is wrong."""
    if isinstance(returned, (str, bytes)) or not isinstance(returned, Iterable):
        raise PluginError(f"{hook} returned {short(returned)}, expected an iterable of saekit.Entry")
    entries = list(itertools.islice(returned, _MOST + 1))
    if len(entries) > _MOST:
        raise PluginError(f"{hook} returned more than {_MOST} entries")
    for entry in entries:
        if not isinstance(entry, Entry):
            raise PluginError(f"{hook} returned {short(entry)} among its entries, expected a saekit.Entry")
        if fault := _fault(entry) or _fault_of_base(entry.config, hook):
            raise PluginError(f"{hook}: entry {short(entry.name)}: {fault}")
    names = [entry.name for entry in entries]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise PluginError(f"{hook}: there are several entries {twice[0]!r}; give each a name of its own")
    _check_own_classes(hook, entries)
    return entries


def _fault(entry: Entry) -> str | None:
    """What is wrong with one entry."""
    config, required = entry.config, entry.requires
    if not isinstance(entry.name, str) or not re.fullmatch(r"[\w.+-]+", entry.name):
        return "the name must be made of letters, digits, '_', '-', '.' and '+'"
    if not (isinstance(config, type) and attrs.has(config)):
        return f"config is {short(config)}, expected a frozen attrs class"
    if not _is_frozen(config):
        return f"{_named(config)} is not frozen; use @attrs.frozen(kw_only=True)"
    if faults := option_faults(config, KINDS):
        of = _named(config)
        return "; ".join(f"option {name!r} of {of} {why}" if name else f"{of}: {why}" for name, why in faults)
    if not callable(entry.build) and not _is_import_path(entry.build):
        return f"build is {short(entry.build)}, expected a callable, or an import path, such as package.module:Class"
    if entry.precheck is not None and not callable(entry.precheck):
        return f"precheck is {short(entry.precheck)}, expected a callable"
    if entry.outline is not None and not callable(entry.outline) and not _is_import_path(entry.outline):
        return f"outline is {short(entry.outline)}, expected a callable, or an import path, such as package.module:name"
    if not isinstance(required, (list, tuple)) or not all(_is_module_name(name) for name in required):
        return f"requires is {short(required)}, expected a list of package names"
    if entry.extra is not None and not (isinstance(entry.extra, str) and re.fullmatch(r"[\w.-]+", entry.extra)):
        return f"extra is {short(entry.extra)}, expected the name of an extra, or None"
    if not isinstance(entry.summary, str):
        return f"summary is {short(entry.summary)}, expected a text"
    return None


def _fault_of_base(config: type, hook: str) -> str | None:
    """What is wrong with an options class that does not have the options that all of its kind have."""
    from saekit.config import OptimizerConfig, SAEConfig

    bases: dict[str, type] = {SAE_ARCHITECTURES.hook: SAEConfig, OPTIMIZERS.hook: OptimizerConfig}
    base = bases.get(hook)
    if base is None or issubclass(config, base):
        return None
    return f"{_named(config)} must derive from saekit.config.{base.__name__}, whose options all of its kind have"


def _named(config: type) -> str:
    return printable(config.__qualname__)


def _is_module_name(name: object) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _is_import_path(build: object) -> bool:
    module, colon, name = build.partition(":") if isinstance(build, str) else ("", "", "")
    return bool(colon) and _is_module_name(module) and _is_module_name(name)


def _is_frozen(cls: type) -> bool:
    return "_frozen" in getattr(cls.__setattr__, "__name__", "")


def _check_own_classes(hook: str, entries: list[Entry]) -> None:
    """A config object alone must say which entry it belongs to."""
    owners: dict[type, Entry] = {}
    for entry in entries:
        owner = owners.setdefault(entry.config, entry)
        if owner.build != entry.build:
            raise PluginError(
                f"{hook}: entries {owner.name!r} and {entry.name!r} share the options class "
                f"{_named(entry.config)}; give each its own"
            )


def defines(entry: Entry) -> bool:
    """Whether the entry's ``build`` stands in the module of its options class, or below it where that is a package.

    An options class in ``my_plugin/__init__.py`` and what ``my_plugin/module.py`` builds are one plugin's.
    """
    own = entry.config.__module__
    if isinstance(entry.build, str):
        return f"{entry.build.partition(':')[0]}.".startswith(f"{own}.")
    build = entry.build.func if isinstance(entry.build, functools.partial) else entry.build
    return getattr(build, "__module__", None) == own
