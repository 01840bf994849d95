"""What the options of every configuration class are made of: plugin choices and validators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs

from saekit.errors import ConfigError
from saekit.names import is_free_in_run

__all__ = [
    "ALWAYS_TRACKED",
    "PLUGIN_KIND",
    "SAME_AT_START",
    "CompileMode",
    "Dtype",
    "PluginChoice",
    "Token",
    "at_least_0",
    "at_least_1",
    "below_1",
    "check",
    "is_free_in_run",
    "not_empty",
    "plugin_field",
    "positive",
]

PluginChoice: TypeAlias = Any
"""A plugin's key, or an instance of its options class; in files also a table with ``name`` and the options."""
Token: TypeAlias = str | int
"""``bos``, ``eos``, ``sep``, ``none`` or a token id."""
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "float64"]

PLUGIN_KIND = "saekit_plugin_kind"
SAME_AT_START = "saekit_same_at_start"
"""Metadata of an SAE's option that decides what its weights mean: training goes on from saved ones with the same."""
ALWAYS_TRACKED = "saekit:jsonl"


def plugin_field(kind: str, default: Any) -> Any:
    """A field that chooses a plugin of ``kind``; a tuple as ``default`` makes it choose several."""
    return attrs.field(default=default, metadata={PLUGIN_KIND: kind})


def check(test: Callable[[Any], bool], expected: str) -> Callable[[object, Any, Any], None]:
    """A validator whose error says what was expected and what was found.  None passes."""

    def validate(_: object, attribute: Any, value: Any) -> None:
        try:
            fine = value is None or bool(test(value))
        except TypeError:
            fine = False
        if not fine:
            raise ConfigError([(attribute.name, f"must be {expected}, found {value!r}")])

    return validate


positive = check(lambda v: v > 0, "above 0")
at_least_0 = check(lambda v: v >= 0, "0 or more")
at_least_1 = check(lambda v: v >= 1, "1 or more")
below_1 = check(lambda v: 0 <= v < 1, "at least 0 and below 1")
not_empty = check(lambda v: bool(v.strip()), "a name, not an empty text")
