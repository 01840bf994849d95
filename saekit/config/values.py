"""Single values as Python hands them over: NumPy's and torch's numbers, paths and types as plain data, and limits.

Nothing here imports NumPy or torch: what is theirs is told by the name of its class's module.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import attrs

__all__ = ["enum_value", "half_a_pair", "plain", "shown", "too_nested"]

_LONGEST = 10_000
"""Items of an array that may stand for a list of options."""
_DEEPEST, _MOST = 50, 1_000_000
_SINGLE = frozenset({str, int, float, bool, type(None)})
"""Types of values that hold no others."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = 10
_REPR.maxlong = 60


def shown(value: object) -> str:
    """``repr``, cut where it is long, whatever ``value`` is."""
    try:
        return _REPR.repr(value)
    except Exception:
        return f"a {type(value).__qualname__}"


def plain(value: Any) -> Any:
    """A number, text or list of Python's for what stands for one; anything else as it is.

    NumPy's and torch's numbers and small arrays, ``torch.float32`` (``"float32"``), ``torch.device("cpu")``
    (``"cpu"``), paths, and the members of an enum.
    """
    kind = type(value)
    if isinstance(value, Enum):
        return enum_value(value)
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
        return path if isinstance(path, str) else value
    owner = kind.__module__.partition(".")[0]
    if owner not in ("numpy", "torch"):
        return value
    if owner == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    try:
        return value.tolist() if _n_items(value) <= _LONGEST else value
    except Exception:  # not an array, or one without numbers
        return value


def _n_items(array: Any) -> int:
    n = 1
    for length in array.shape:
        n *= length
    return n


def enum_value(member: Enum) -> str | int:
    """What stands for ``member`` in files: its value where those of its class are texts or whole numbers."""
    values = {type(other.value) for other in type(member)}
    value: Any = member.value
    return value if values in ({str}, {int}) else member.name


def half_a_pair(text: str) -> bool:
    """Whether ``text`` holds half of a surrogate pair, which no file can hold."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def too_nested(table: object) -> str | None:
    """Why ``table`` cannot be gone through: it is deeper or larger than any configuration, or holds itself."""
    left = [(table, 0)]
    seen = 0
    while left:
        value, depth = left.pop()
        seen += 1
        if depth > _DEEPEST:
            return f"is nested more than {_DEEPEST} levels deep, which no configuration is"
        if seen > _MOST:
            return f"holds more than {_MOST:,} values, which no configuration does"
        if type(value) in _SINGLE:
            continue
        if isinstance(value, Mapping):
            left += [(item, depth + 1) for item in value.values()]
        elif attrs.has(type(value)):
            fields: Any = attrs.fields(type(value))  # type: ignore[arg-type]
            left += [(getattr(value, field.name), depth + 1) for field in fields]
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += [(item, depth + 1) for item in value]
    return None
