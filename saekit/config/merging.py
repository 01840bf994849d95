"""Tables on top of tables: options that are set by their dotted path, and sections that are given in part."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from saekit.config.annotations import inner_class, is_class
from saekit.config.converter import ConfigConverter
from saekit.config.fields import INSTEAD_OF, PLUGIN_KIND
from saekit.config.structuring import fields_of
from saekit.errors import ConfigError, SaekitError
from saekit.kinds import KINDS
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager

__all__ = ["MOST_KEYS", "Place", "in_order", "set_option", "tables", "undotted"]

MOST_KEYS = 20
"""No option lies so many levels deep."""


@attrs.frozen
class Place:
    """A table of a configuration, as far as it is known what belongs there."""

    cls: type | None
    """The class of its options.  None: not known, or the value of an option."""
    plugins: PluginManager | None = None
    kind: str | None = None
    """The kind of the plugin that its ``name`` chooses.  None: it chooses none."""

    @property
    def chooses(self) -> bool:
        """Whether its ``name`` chooses a plugin."""
        return self.kind is not None

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
            return Place(self._options(kind, table.get(key), field.default), self.plugins, kind)
        try:
            attrs.resolve_types(self.cls)
        except Exception:  # of a plugin's own; reading says so
            return Place(None)
        return Place(inner_class(attrs.fields_dict(self.cls)[key].type), self.plugins)

    def _options(self, kind: str, chosen: object, default: object) -> type | None:
        return self._class_of(kind, chosen.get("name", default) if isinstance(chosen, Mapping) else chosen or default)

    def _class_of(self, kind: str, name: object) -> type | None:
        if self.plugins is None or not isinstance(name, str):
            return None
        try:
            return self.plugins.get(kind, name).entry.config
        except SaekitError:  # reading says so
            return None

    def make_room(self, table: dict[str, Any], option: str, value: object) -> None:
        """Drop from ``table`` what nobody chose and what ``option``, which is to be ``value``, makes senseless.

        Where ``option`` is the name of another plugin, those are the defaults of the one before: it has its own.  What
        was chosen stays; if the new plugin has no such option, reading says so.
        """
        if self.cls is None or self.plugins is None:
            return
        drop: Iterable[str] = ()
        if option == "name" and self.kind is not None:
            if self._class_of(self.kind, value) is not self.cls:
                drop = table.keys() - {"name"}
        elif value and (field := attrs.fields_dict(self.cls).get(option)) is not None:
            drop = [field.metadata[INSTEAD_OF]] if INSTEAD_OF in field.metadata else []
        there = {name: table[name] for name in drop if name in table}
        for name in ConfigConverter(self.plugins).at_default(self.cls, there):
            del table[name]


NOWHERE = Place(None)


def set_option(
    table: dict[str, Any], path: str, value: Any, place: Place = NOWHERE, *, makes_room: bool = True
) -> None:
    """Set the option at a dotted ``path`` of ``table``, in place.  A table for a section leaves the rest of it.

    With ``makes_room``, defaults that the value makes senseless go (:meth:`Place.make_room`): for a ``table`` that may
    be a whole configuration, in which nobody chose most options.
    """
    *keys, last = path.split(".")
    for key in keys:
        inner, there = table.get(key, {}), place.at(key, table)
        if isinstance(inner, str) and (there.chooses or place.cls is None):  # its options go beside the name
            inner = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError([(path, f"{key} is {inner!r}, which has no options to set")])
        table[key] = inner
        table, place = inner, there
    if makes_room:
        place.make_room(table, last, value)
    table[last] = merged(table.get(last), value, place.at(last, table))


def undotted(table: Any, place: Place = NOWHERE) -> Any:
    """``table`` with what it has at dotted keys (``{"training.lr": 1e-4}``) in its sections, on top of what is there.

    :class:`ConfigError` names an option that is given in both ways.
    """
    if not isinstance(table, Mapping):
        return table
    dotted = {key: value for key, value in table.items() if isinstance(key, str) and _is_dotted(key)}
    if not dotted:
        return table
    assert place.plugins is not None
    result: dict[str, Any] = tables({key: one for key, one in table.items() if key not in dotted}, place.plugins)
    for path, value in in_order(dotted.items()):
        if _has(result, path, place):
            raise ConfigError([(path, "is given twice, by its dotted name and in its section; leave out one of them")])
        # What lies beside it was written by the same hand: it was chosen, also where it equals some default.
        set_option(result, path, tables(value, place.plugins), place, makes_room=False)
    return result


def _is_dotted(key: str) -> bool:
    return 0 < key.count(".") < MOST_KEYS and all(key.split("."))


def _has(table: Any, path: str, place: Place) -> bool:
    for key in path.split("."):
        if isinstance(table, str) and place.chooses:  # a plugin, of which only the name is given
            table = {"name": table}
        if not isinstance(table, Mapping) or key not in table:
            return False
        table, place = table[key], place.at(key, table)
    return True


def in_order(changes: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Options and their values in the order in which they are set: a plugin before its options, however it is named.

    Else they stay in the order in which they were given.
    """

    def depth(change: tuple[str, Any]) -> tuple[int, bool]:
        path, value = change
        in_part = isinstance(value, Mapping) and "name" not in value  # as good as each of its options by itself
        return path.count(".") + in_part, not path.endswith(".name")

    return sorted(changes, key=depth)


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
