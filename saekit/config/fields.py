"""What the options of every configuration class are made of: plugin choices and validators."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import attrs

from saekit.errors import ConfigError
from saekit.files.names import is_free_in_run
from saekit.files.paths import expanded
from saekit.kinds import Kind

__all__ = [
    "CHOOSES_START",
    "INSTEAD_OF",
    "LATER",
    "NEEDED_TO_LOAD",
    "PLUGIN_KIND",
    "SAME_AT_START",
    "CompileMode",
    "Dtype",
    "PluginChoice",
    "Token",
    "a_seed",
    "a_size",
    "at_least_0",
    "at_least_1",
    "below_1",
    "check",
    "is_free_in_run",
    "not_empty",
    "path_field",
    "plugin_field",
    "positive",
    "replaced",
]

PluginChoice: TypeAlias = Any
"""A plugin's key, or an instance of its options class; in files also a table with ``name`` and the options.

In a configuration that was loaded, a :class:`saekit.plugins.choice.Choice`, which has the ``key`` and the ``options``.
"""
Token: TypeAlias = str | int
"""``bos``, ``eos``, ``sep``, ``none`` or a token id."""
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "float64"]

PLUGIN_KIND = "saekit_plugin_kind"
SAME_AT_START = "saekit_same_at_start"
"""Metadata of an SAE's option that decides what its weights mean: training goes on from saved ones with the same."""
NEEDED_TO_LOAD = "saekit_needed_to_load"
"""Metadata of an SAE's option without which saved weights cannot be understood: a folder that lacks it is refused, and
no default takes its place.  Options with :data:`SAME_AT_START` are needed, too."""
LATER = "saekit_later"
"""Metadata of a model backend's option that was added when caches and checkpoints had been written without it: where it
is what it is by default, they fit."""
CHOOSES_START = "saekit_chooses_start"
"""Metadata of an SAE's option beside those of :class:`saekit.SAEConfig` that chooses starting weights and nothing else:
training from saved weights refuses it."""
INSTEAD_OF = "saekit_instead_of"
"""Metadata of an option that takes the place of another, by the other's name: where it is given, the other must be left
out, and is not written."""


def plugin_field(kind: Kind[Any] | str, default: Any, *, metadata: Mapping[str, Any] | None = None) -> Any:
    """A field that chooses a plugin of ``kind``; a tuple as ``default`` makes it choose several.

    With None as ``default`` it may choose none, which is also called ``none``.
    """
    converter = _none_as_text if default is None else None
    return attrs.field(default=default, metadata={PLUGIN_KIND: str(kind), **(metadata or {})}, converter=converter)


def _none_as_text(value: Any) -> Any:
    return None if isinstance(value, str) and value == "none" else value


def replaced(config: object) -> set[str]:
    """The options of ``config`` that others take the place of."""
    fields = attrs.fields(type(config))  # type: ignore[arg-type]
    return {
        field.metadata[INSTEAD_OF] for field in fields if INSTEAD_OF in field.metadata and getattr(config, field.name)
    }


def path_field(default: Any = attrs.NOTHING, *, validator: Callable[[object, Any, Any], None] | None = None) -> Any:
    """A field that holds a path, or a name that may be one: ``~`` at its beginning is expanded.

    The option stays a text, or a tuple of texts.
    """
    return attrs.field(
        default=default, converter=_expanded, validator=_is_path if validator is None else [_is_path, validator]
    )


def _expanded(value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)):
        return expanded(value)
    return tuple(map(_expanded, value)) if isinstance(value, (list, tuple)) else value


def _is_path(_: object, attribute: Any, value: Any) -> None:
    if any("\0" in path for path in ([value] if isinstance(value, str) else value or ()) if isinstance(path, str)):
        raise ConfigError([(attribute.name, f"must be a path, which holds no null characters, found {value!r}")])


def check(
    test: Callable[[Any], bool], expected: str, *, most: float | None = None, finite: bool = True
) -> Callable[[object, Any, Any], None]:
    """A validator whose error says what was expected and what was found.  None passes, nan does not.

    Nor does inf, if ``finite``.  ``most`` is the largest value that makes sense.
    """

    def validate(_: object, attribute: Any, value: Any) -> None:
        if isinstance(value, float) and (math.isnan(value) or (finite and math.isinf(value))):
            raise ConfigError([(attribute.name, f"must be a finite number, {expected}, found {value!r}")])
        try:
            fine = value is None or bool(test(value))
            large = fine and most is not None and value is not None and value > most
        except TypeError:
            fine = large = False
        if not fine:
            raise ConfigError([(attribute.name, f"must be {expected}, found {value!r}")])
        if large:
            raise ConfigError([(attribute.name, f"must be at most {most:,}, found {value!r}")])

    return validate


_COUNT = 10**15
_SIZE = 2**30
positive = check(lambda v: v > 0, "above 0")
at_least_0 = check(lambda v: v >= 0, "0 or more", most=_COUNT)
at_least_1 = check(lambda v: v >= 1, "1 or more", most=_COUNT)
a_size = check(lambda v: v >= 1, "1 or more", most=_SIZE)
"""A number of things that are held in memory together."""
a_seed = check(lambda v: 0 <= v < 2**64, "0 or more, and below 2^64")
below_1 = check(lambda v: 0 <= v < 1, "at least 0 and below 1")
not_empty = check(lambda v: bool(v.strip()), "a name, not an empty text")
