"""Tables on top of tables: options that are set by their dotted path, and sections that are given in part."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import attrs

from saekit.config.annotations import inner_class, is_class
from saekit.config.fields import PLUGIN_KIND
from saekit.config.structuring import fields_of
from saekit.errors import ConfigError, SaekitError
from saekit.kinds import KINDS
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager

__all__ = ["Place", "set_option", "tables"]


@attrs.frozen
class Place:
    """A table of a configuration, as far as it is known what belongs there."""

    cls: type | None
    """The class of its options.  None: not known, or the value of an option."""
    plugins: PluginManager | None = None
    chooses: bool = False
    """Its ``name`` chooses a plugin."""

    @property
    def is_section(self) -> bool:
        """Whether a table that is given for it says only what differs."""
        return self.cls is not None or self.chooses

    def at(self, key: str, table: Mapping[str, Any]) -> Place:
        """The place at ``key`` in ``table``, which is what is here."""
        field = None if self.cls is None else attrs.fields_dict(self.cls).get(key)
        if field is None or self.cls is None:
            return Place(None)
        if (kind := field.metadata.get(PLUGIN_KIND)) and not isinstance(field.default, tuple):
            return Place(self._options(kind, table.get(key), field.default), self.plugins, chooses=True)
        try:
            attrs.resolve_types(self.cls)
        except Exception:  # of a plugin's own; reading says so
            return Place(None)
        return Place(inner_class(attrs.fields_dict(self.cls)[key].type), self.plugins)

    def _options(self, kind: str, chosen: object, default: object) -> type | None:
        name = chosen.get("name", default) if isinstance(chosen, Mapping) else chosen or default
        if self.plugins is None or not isinstance(name, str):
            return None
        try:
            return self.plugins.get(kind, name).entry.config
        except SaekitError:  # reading says so
            return None


NOWHERE = Place(None)


def set_option(table: dict[str, Any], path: str, value: Any, place: Place = NOWHERE) -> None:
    """Set the option at a dotted ``path`` of ``table``, in place.  A table for a section leaves the rest of it."""
    *keys, last = path.split(".")
    for key in keys:
        inner, there = table.get(key, {}), place.at(key, table)
        if isinstance(inner, str) and (there.chooses or place.cls is None):  # its options go beside the name
            inner = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError([(path, f"{key} is {inner!r}, which has no options to set")])
        table[key] = inner
        table, place = inner, there
    table[last] = merged(table.get(last), value, place.at(last, table))


def merged(old: Any, new: Any, place: Place) -> Any:
    """``new`` on top of ``old``.

    Sections are merged, option by option.  A table with a ``name`` that chooses a plugin replaces the choice and its
    options, and so does every other value.
    """
    if place.chooses and isinstance(old, str):
        old = {"name": old}
    replaces = not isinstance(new, Mapping) or not place.is_section or (place.chooses and "name" in new)
    if replaces or not isinstance(old, Mapping):
        return copy.copy(new)
    result = dict(old)
    for key, item in new.items():
        result[key] = merged(result.get(key), item, place.at(key, result))
    return result


def tables(value: Any, plugins: PluginManager) -> Any:
    """A copy of tables, in which options objects of plugins are tables too, so that options can be set in them."""
    if isinstance(value, Mapping):
        return {key: tables(item, plugins) for key, item in value.items()}
    if isinstance(value, Choice):
        return {"name": value.key, **tables(fields_of(value.options), plugins)} if value.spelled else value.key
    if not is_class(type(value)):
        return value
    table = tables(fields_of(value), plugins)
    for kind in KINDS.values():
        try:
            return {"name": plugins.find(kind, value).key, **table}
        except SaekitError:  # it is not of this kind
            continue
    return table
