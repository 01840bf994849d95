"""How what holds tensors is shown: by their names, types and shapes, without their numbers.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from saekit.plugins.text import printable, short

__all__ = ["by_shapes"]

_MOST = 8


def by_shapes(self: object) -> str:
    """The ``repr`` of a class of attrs or a named tuple: ``Forward(held={'hook_embed': float32[2, 7, 16]})``.

    What is None or empty is left out, and of long mappings most entries are.
    """
    cls = type(self)
    if attrs.has(cls):
        fields = {one.alias: getattr(self, one.name) for one in attrs.fields(cls) if one.repr}
    else:
        fields = self._asdict()  # type: ignore[attr-defined]
    shown = [f"{name}={_shown(value)}" for name, value in fields.items() if not _is_nothing(value)]
    return f"{cls.__name__}({', '.join(shown)})"


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, Mapping | tuple) and not value)


def _shown(value: object) -> str:
    if type(value).__repr__ is by_shapes:
        return repr(value)
    if (shape := getattr(value, "shape", None)) is not None and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(shape)}"
    if isinstance(value, Mapping):
        names = {getattr(key, "name", key): one for key, one in value.items()}  # sites have one
        some = [f"{printable(repr(name))}: {_shown(one)}" for name, one in list(names.items())[:_MOST]]
        more = [f"and {len(value) - _MOST:,} others"] * (len(value) > _MOST)
        return "{" + ", ".join([*some, *more]) + "}"
    return short(value)
