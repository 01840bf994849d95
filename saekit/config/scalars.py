"""Single values as the type of their option asks for them; ValueError says what was found instead."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from saekit.config.annotations import PRIMITIVES, is_enum, is_literal, words
from saekit.config.values import enum_value, half_a_pair, plain, shown

__all__ = ["structure_enum", "structure_key", "structure_literal", "structure_primitive"]

_INTEGERS = range(-(2**63), 2**64)
_WHOLE = 2.0**53
"""Up to here a float that has no fraction means one whole number."""


def structure_primitive(value: object, kind: Any) -> object:
    value = plain(value)
    if kind is float and type(value) is int:
        value = _float(value)
    elif kind is int and type(value) is float and value.is_integer() and abs(value) <= _WHOLE:
        value = int(value)  # 1e6
    if type(value) is not kind:
        raise ValueError(f"expected {PRIMITIVES[kind]}, found {shown(value)}")
    if type(value) is int and value not in _INTEGERS:
        raise ValueError(f"expected a whole number of 64 bits, found {shown(value)}")
    if isinstance(value, str) and half_a_pair(value):
        raise ValueError(f"expected {PRIMITIVES[kind]}, found half of a surrogate pair in {shown(value)}")
    return value


def _float(value: int) -> object:
    try:
        return float(value)
    except OverflowError:
        return value


def structure_literal(value: object, kind: Any) -> object:
    allowed = get_args(kind)
    value = plain(value)
    if type(value) is float and value.is_integer():
        value = int(value)
    for option in allowed:
        if type(option) is type(value) and option == value:
            return value
    if value == "none" and None in allowed:
        return None
    raise ValueError(_not_one_of(value, allowed))


def structure_enum(value: Any, kind: Any) -> object:
    """A member, by what stands for it in files."""
    if isinstance(value, kind):
        return value
    value = plain(value)
    by_text = {enum_value(member): member for member in kind}
    for text, member in by_text.items():
        if type(text) is type(value) and text == value:
            return member
    try:
        return kind(value) if type(value) is int else _refuse(value, by_text)  # several flags together
    except ValueError:
        raise ValueError(_not_one_of(value, tuple(by_text))) from None


def _refuse(value: object, allowed: Any) -> object:
    raise ValueError(_not_one_of(value, tuple(allowed)))


def _not_one_of(value: object, allowed: tuple[Any, ...]) -> str:
    close = difflib.get_close_matches(str(value)[:100], [str(option) for option in allowed], n=1)
    message = f"expected one of {', '.join(map(repr, allowed))}, found {shown(value)}"
    return message + (f". Did you mean {close[0]!r}?" if close else "")


def structure_key(key: object, kind: Any) -> object:
    """A key of a table whose type says that its keys are of ``kind``; in files they are texts."""
    key = plain(key)
    if kind is int and isinstance(key, str) and key.removeprefix("-").isdecimal():
        key = int(key)
    if is_literal(kind):
        return structure_literal(key, kind)
    if is_enum(kind):
        return structure_enum(key, kind)
    if kind not in (str, int):
        kind = str
    if type(key) is not kind:
        raise ValueError(f"expected keys that are {words(kind)}, found {shown(key)}")
    return structure_primitive(key, kind)
