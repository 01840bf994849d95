"""Which types an option may have: those that a configuration file can hold and give back as they were."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import attrs

from saekit.config.annotations import (
    LISTS,
    is_any,
    is_class,
    is_dict,
    is_enum,
    is_list,
    is_literal,
    is_primitive,
    is_union,
    made_of,
    unwrapped,
    words,
)
from saekit.config.fields import PLUGIN_KIND
from saekit.config.structuring import Structurer
from saekit.config.values import enum_value, shown
from saekit.config.writing import plain_value

__all__ = ["unsupported_options"]

_ALLOWED = (
    "bool, int, float, str, pathlib.Path, an Enum, a Literal, an attrs class, None, or lists, tuples, sets and dicts "
    "of them"
)
Problems = list[tuple[str, str]]


def unsupported_options(cls: type) -> list[tuple[str, str]]:
    """The options of a configuration class that a file could not hold or give back, each with the reason.

    Names of nested classes' options are dotted.  It never raises, whatever ``cls`` is.
    """
    try:
        return _of_class(cls, ())
    except Exception as error:
        return [("", f"the options cannot be looked at: {type(error).__name__}: {error}")]


def _of_class(cls: type[Any], above: tuple[type, ...]) -> Problems:
    with suppress(Exception):  # what cannot be resolved is looked at one by one below
        attrs.resolve_types(cls)
    found: Problems = []
    for field in attrs.fields(cls):
        if not field.init:
            continue
        kind, reason = _annotation(cls, field)
        if not reason and not field.metadata.get(PLUGIN_KIND):
            nested = _nested(kind)
            reason = _reason(kind)
            for inner in nested if reason is None else ():
                if inner not in (*above, cls):
                    found += [(f"{field.name}.{name}", why) for name, why in _of_class(inner, (*above, cls))]
            reason = reason or _default(field, kind)
        if reason:
            found.append((field.name, reason))
    return found


def _annotation(cls: type, field: attrs.Attribute[Any]) -> tuple[Any, str | None]:
    """The type of ``field``, or why there is none."""
    if field.type is None:
        return None, f"has no type; annotate it with {_ALLOWED}"
    if not isinstance(field.type, str):
        return field.type, None
    owner = next((base for base in cls.__mro__ if field.name in inspect.get_annotations(base)), cls)
    try:
        names = vars(sys.modules[owner.__module__])
        return eval(field.type, dict(names), dict(vars(owner))), None  # the plugin's own text, which attrs runs, too
    except Exception as error:
        return None, (
            f"has the annotation {field.type!r}, which cannot be resolved: {type(error).__name__}: {error}. What it "
            "names must be imported at the top of the module, not under TYPE_CHECKING"
        )


def _reason(kind: Any) -> str | None:
    """Why no file can hold a value of type ``kind``, or None."""
    kind = unwrapped(kind)
    if is_any(kind) or kind is None or kind is type(None) or kind is Path or is_class(kind) or is_primitive(kind):
        return None
    if is_literal(kind):
        wrong = [option for option in get_args(kind) if type(option) not in (str, int, bool, type(None))]
        return f"has a Literal of {wrong[0]!r}; use texts and whole numbers" if wrong else None
    if is_enum(kind):
        return None if len(kind) else f"is of the enum {kind.__name__}, which has no members"
    if is_union(kind):
        return _first(map(_reason, get_args(kind))) or _ambiguous(kind)
    if is_list(kind):
        return _first(_reason(member) for member in get_args(kind) if member is not ...) or _unsorted(kind)
    if is_dict(kind):
        keys, values = get_args(kind) or (str, Any)
        return _key_reason(unwrapped(keys)) or _reason(values)
    return f"is of the type {words(kind)}, which no configuration file can hold; use {_ALLOWED}"


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _key_reason(kind: Any) -> str | None:
    if kind in (str, int) or is_any(kind) or is_enum(kind) or is_literal(kind):
        return _reason(kind)
    return f"has keys of the type {words(kind)}; keys of a table in a file are texts: use str or int"


def _unsorted(kind: Any) -> str | None:
    members = get_args(kind)
    if LISTS[made_of(kind)] in (set, frozenset) and members and _forms(unwrapped(members[0])) & {"table", "list"}:
        return "is a set of lists or tables; use a list of them"
    return None


def _ambiguous(union: Any) -> str | None:
    """Whether what stands for one member in a file could as well be another."""
    members = [unwrapped(member) for member in get_args(union)]
    for index, member in enumerate(members):
        for other in members[index + 1 :]:
            plain = all(is_literal(one) or is_primitive(one) for one in (member, other))
            if not plain and (both := _forms(member) & _forms(other)):
                return (
                    f"may be {words(member)} or {words(other)}, which a file cannot tell apart: both are written as a "
                    f"{min(both)}"
                )
    return None


def _forms(kind: Any) -> set[str]:
    """What values of ``kind`` look like in a file."""
    if is_any(kind):
        return {"text", "number", "list", "table", "bool"}
    if is_union(kind):
        return set().union(*(_forms(unwrapped(member)) for member in get_args(kind)))
    if is_class(kind) or is_dict(kind):
        return {"table"}
    if is_list(kind):
        return {"list"}
    if is_literal(kind) or is_enum(kind):
        values = list(map(enum_value, kind)) if is_enum(kind) else get_args(kind)
        return {_forms_of.get(type(value), "text") for value in values}
    return {_forms_of.get(kind, "text")}


_forms_of: dict[Any, str] = {
    bool: "bool",
    int: "number",
    float: "number",
    str: "text",
    type(None): "null",
    None: "null",
}


def _nested(kind: Any) -> list[type]:
    """The options classes inside ``kind``."""
    kind = unwrapped(kind)
    if is_class(kind):
        return [kind]
    return [found for member in get_args(kind) if not is_literal(kind) for found in _nested(member)]


def _default(field: attrs.Attribute[Any], kind: Any) -> str | None:
    """Why the default would not come back from a file, or None."""
    default: Any = field.default
    if default is attrs.NOTHING:
        return None
    if type(default).__name__ == "Factory":
        if default.takes_self:
            return None
        try:
            default = default.factory()
        except Exception as error:
            return f"has a default that cannot be made: {type(error).__name__}: {error}"
    if is_class(type(default)):
        return None  # with the options in it
    try:
        back = Structurer().structured(plain_value(default), kind)
        same = bool(back == default) or default != default
    except Exception as error:
        return f"has the default {shown(default)}, which is not of its type {words(kind)}: {error}"
    return None if same else f"has the default {shown(default)}, which comes back from a file as {shown(back)}"
