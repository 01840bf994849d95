"""What users put at a hook, as the function that a forward calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from saekit.errors import ModelError
from saekit.plugins.text import short
from saekit.values import Replacement

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HookPlace", "Replacing", "replacement_of", "replacements_of"]

Replacing: TypeAlias = "Replacement | Tensor | Callable[..., Tensor]"
"""A function of what a hook holds, a tensor of its shape, or a function ``(value, hook)`` as transformer_lens has."""


@attrs.frozen
class HookPlace:
    """What a function ``(value, hook)`` is told of the hook that it was put at."""

    name: str


def replacements_of(given: Mapping[str, Replacing] | None) -> dict[str, Replacement]:
    """:func:`replacement_of` for each, by its hook."""
    if given is not None and not isinstance(given, Mapping):
        raise ModelError(f"replace is a mapping of functions by the names of hooks, found {short(given)}")
    return {name: replacement_of(name, one) for name, one in (given or {}).items()}


def replacement_of(name: str, given: Any) -> Replacement:
    """``given``, which is put at the hook ``name``, as a function of what the hook holds alone.

    A tensor stands for itself.  A function that asks for a ``hook`` was written for transformer_lens: it is called as
    there, with a :class:`HookPlace`.  :class:`saekit.errors.ModelError` for anything else.
    """
    if hasattr(given, "ndim") and not callable(given):
        return lambda _: given
    if not callable(given):
        raise ModelError(
            f"what replaces {name!r} must be a function of what the hook holds, such as lambda held: 2 * held, or a "
            f"tensor of its shape, found {short(given)}"
        )
    try:
        takes = inspect.signature(given)
    except (TypeError, ValueError):  # of functions that are written in C nothing is known
        return given  # type: ignore[no-any-return]
    if _binds(takes):
        return given  # type: ignore[no-any-return]
    place = HookPlace(name)
    if _binds(takes, hook=place):
        return lambda held: given(held, hook=place)
    raise ModelError(
        f"the function at {name!r} takes {takes}, and is called with what the hook holds alone, (held), or as "
        "transformer_lens calls functions, (held, hook)"
    )


def _binds(takes: inspect.Signature, **others: object) -> bool:
    try:
        takes.bind(None, **others)
    except TypeError:
        return False
    return True
