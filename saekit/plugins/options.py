"""Whether the options class of a plugin can be written to a file and read back, found out when it is registered.

Options are numbers, texts, switches, choices of those and lists of them nearly always.  Those are recognized here, so
that finding plugins stays fast; about whatever else there is, the converter itself is asked.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from saekit.config.fields import PLUGIN_KIND
from saekit.reasons import last_line

__all__ = ["option_faults"]

_PLAIN = (bool, int, float, str)


def option_faults(cls: type, kinds: Collection[str]) -> list[tuple[str, str]]:
    """``(option, what is wrong with it)`` for everything in the attrs class ``cls`` that no file could hold.

    ``kinds`` are the kinds of plugin, which an option may choose from.
    """
    fields = attrs.fields(cls)
    if faults := [(field.name, fault) for field in fields if (fault := _name_fault(field, kinds))]:
        return faults
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception as error:
        unresolved = f"its annotations cannot be resolved: {last_line(error)}"
    else:
        unresolved = ""
        own = [field for field in fields if field.metadata.get(PLUGIN_KIND) is None]
        if all(_is_plain(field, hints.get(field.name)) for field in own):
            return []
    from saekit.config.supported import unsupported_options  # not before: it takes a tenth of a second to import

    return unsupported_options(cls) or ([("", unresolved)] if unresolved else [])


def _name_fault(field: attrs.Attribute[Any], kinds: Collection[str]) -> str | None:
    """What is wrong with a field whatever its type is."""
    chosen = field.metadata.get(PLUGIN_KIND)
    if field.name == "name":
        return "is refused: an option cannot be called 'name', which is the plugin's own key in a file"
    if chosen is not None and chosen not in kinds:
        return f"chooses a plugin of kind {chosen!r}, and the kinds are {', '.join(kinds)}"
    return None


def _is_plain(field: attrs.Attribute[Any], kind: Any) -> bool:
    """Whether a field of type ``kind`` is known to survive, its default included, without asking the converter."""
    if field.type is None or field.converter is not None or not _is_simple(kind):
        return False
    default, expected = field.default, _plain_types(kind)
    composed = not expected or default is attrs.NOTHING or type(default).__name__ == "Factory"
    return composed or default is None or type(default) in expected  # None is not written where it is the default


def _is_simple(kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return True
    if origin is Literal:
        return all(type(option) in _PLAIN for option in arguments)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        return all(member in _PLAIN for member in members) or (len(members) == 1 and _is_simple(members[0]))
    if origin is tuple:
        return len(arguments) == 2 and arguments[1] is ... and _is_simple(arguments[0])
    return origin is dict and arguments == (str, Any)


def _plain_types(kind: Any) -> list[type]:
    """The types that a plain value of ``kind`` can have, or none where it can be something else."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    found = [member for member in members if member is not type(None)]
    if not all(member in _PLAIN for member in found):
        return []
    return [*found, *([int] if float in found else [])]
