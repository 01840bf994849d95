"""Configuration as plain data, for files and comparisons: every plugin by its qualified key.

:meth:`saekit.config.converter.ConfigConverter.structure` gives the same configuration back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import attrs

from saekit.config.annotations import is_class
from saekit.config.fields import PLUGIN_KIND, replaced
from saekit.config.values import plain
from saekit.plugins.choice import Choice

__all__ = ["KeyOf", "plain_table", "plain_value"]

KeyOf: TypeAlias = Callable[[str, object], str]
"""The qualified key of what a kind's name and a choice that is not bound select."""


def _unknown(kind: str, choice: object) -> str:
    raise TypeError(f"a choice of {kind} that is not bound: {choice!r}")


def plain_table(config: object, key_of: KeyOf = _unknown, *, spare: bool = False, full: bool = False) -> dict[str, Any]:
    """An options object as nested plain data, without what another option takes the place of.

    ``spare`` leaves out the options that are None and are None by default: some formats have no null.  ``full`` writes
    the options of a bound choice where none were given, too.
    """
    table: dict[str, Any] = {}
    left_out = replaced(config)
    for field in attrs.fields(type(config)):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if not field.init or field.name in left_out or (spare and value is None and field.default is None):
            continue
        kind = field.metadata.get(PLUGIN_KIND)
        if kind is None:
            table[field.name] = plain_value(value, key_of, spare=spare, full=full)
        elif isinstance(value, (list, tuple)):
            table[field.name] = [_choice(choice, kind, key_of, spare, full) for choice in value]
        else:
            table[field.name] = _choice(value, kind, key_of, spare, full)
    return table


def plain_value(value: object, key_of: KeyOf = _unknown, *, spare: bool = False, full: bool = False) -> Any:
    """The value of an option as plain data."""
    if is_class(type(value)):
        return plain_table(value, key_of, spare=spare, full=full)
    if isinstance(value, Mapping):
        return {_key(key): plain_value(item, key_of, spare=spare, full=full) for key, item in value.items()}
    if not isinstance(value, (list, tuple, set, frozenset)):
        return plain(value)
    items = [plain_value(item, key_of, spare=spare, full=full) for item in value]
    if isinstance(value, (set, frozenset)):  # whose order is chance
        return sorted(items, key=lambda item: (type(item).__name__, item))
    return items


def _choice(choice: object, kind: str, key_of: KeyOf, spare: bool, full: bool) -> object:
    if isinstance(choice, Choice):
        if not choice.spelled and not (full and attrs.fields(type(choice.options))):
            return choice.key
        return {"name": choice.key, **plain_table(choice.options, key_of, spare=spare, full=full)}
    if isinstance(choice, str):
        return key_of(kind, choice)
    if isinstance(choice, Mapping):
        return {**choice, "name": key_of(kind, choice["name"])} if isinstance(choice.get("name"), str) else dict(choice)
    if not attrs.has(type(choice)):
        return choice  # rubbish: the strict reading reports it under its path
    return {"name": key_of(kind, choice), **plain_table(choice, key_of, spare=spare, full=full)}


def _key(key: object) -> object:
    """A key as a text, as files have them."""
    key = plain(key)
    return str(key) if type(key) is int else key
