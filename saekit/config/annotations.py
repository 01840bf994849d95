"""What the type of an option says, without its wrappings, and in words."""

from __future__ import annotations

import collections.abc as abc
import types
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import attrs

from saekit.config.values import enum_value

__all__ = [
    "DICTS",
    "LISTS",
    "PRIMITIVES",
    "few_values",
    "inner_class",
    "is_any",
    "is_class",
    "is_dict",
    "is_enum",
    "is_list",
    "is_literal",
    "is_primitive",
    "is_union",
    "made_of",
    "unwrapped",
    "words",
]

PRIMITIVES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
LISTS: dict[Any, type] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    abc.Sequence: tuple,
    abc.Collection: tuple,
    abc.Iterable: tuple,
    abc.MutableSequence: list,
    abc.Set: frozenset,
    abc.MutableSet: set,
}
"""What a list in a file becomes, by the class that an option names."""
DICTS = (dict, abc.Mapping, abc.MutableMapping)


def unwrapped(kind: Any) -> Any:
    """``kind`` without ``Annotated`` and ``NewType`` around it."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif hasattr(kind, "__supertype__"):
            kind = kind.__supertype__
        else:
            return kind


def made_of(kind: Any) -> Any:
    """The class of a generic (``tuple`` of ``tuple[int, ...]``), or ``kind`` itself."""
    return get_origin(kind) or kind


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def is_literal(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def is_any(kind: Any) -> bool:
    return kind is Any or kind is object


def is_class(kind: Any) -> bool:
    return isinstance(kind, type) and attrs.has(kind)


def is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def is_primitive(kind: Any) -> bool:
    return _in(kind, PRIMITIVES)


def is_list(kind: Any) -> bool:
    return _in(made_of(kind), LISTS)


def is_dict(kind: Any) -> bool:
    return _in(made_of(kind), DICTS)


def _in(kind: Any, known: Any) -> bool:
    try:
        return kind in known
    except TypeError:  # it has no hash
        return False


def inner_class(kind: Any) -> type | None:
    """The options class that ``kind`` is, or is if it is not None."""
    kind = unwrapped(kind)
    if is_class(kind):
        found: type = kind
        return found
    classes = [member for member in map(unwrapped, get_args(kind)) if is_class(member)] if is_union(kind) else []
    return classes[0] if len(classes) == 1 else None


def few_values(kind: Any) -> list[str]:
    """Every value that an option of this type takes, as it is written in a file, where they are few; else none."""
    kind = unwrapped(kind)
    if kind is bool:
        return ["true", "false"]
    if is_union(kind):
        members = [few_values(member) for member in get_args(kind) if member is not type(None)]
        return [value for values in members for value in values] + ["none"] if all(members) else []
    values = map(enum_value, kind) if is_enum(kind) else get_args(kind) if is_literal(kind) else ()
    return [str(value) for value in values]


def words(kind: Any) -> str:
    """What an option of this type takes, for messages."""
    kind = unwrapped(kind)
    if is_primitive(kind):
        return PRIMITIVES[kind]
    if is_union(kind):
        return " or ".join(dict.fromkeys(words(member) for member in get_args(kind) if member is not type(None)))
    if is_literal(kind):
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if is_enum(kind):
        return "one of " + ", ".join(repr(enum_value(member)) for member in kind)
    if kind is Path:
        return "a path"
    if is_list(kind):
        return "a list"
    if is_dict(kind) or is_class(kind):
        return "a table"
    return str(getattr(kind, "__name__", kind))
