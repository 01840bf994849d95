"""Configurations as people see them in a prompt: what differs from the defaults."""

from __future__ import annotations

from typing import Any

import attrs

from saekit.plugins.choice import Choice

__all__ = ["changed_repr"]


def changed_repr(config: object) -> str:
    """``Class(option=value, ...)`` with the options that are not their defaults: code that makes the same again."""
    changed = [
        f"{field.name}={_shown(getattr(config, field.name))}"
        for field in attrs.fields(type(config))  # type: ignore[arg-type]
        if field.init and not _is_default(field, getattr(config, field.name))
    ]
    return f"{type(config).__name__}({', '.join(changed)})"


def _is_default(field: attrs.Attribute[Any], value: object) -> bool:
    default: Any = field.default  # attrs declares Factory as a function to type checkers
    if type(default).__name__ == "Factory":
        if default.takes_self:
            return False
        default = default.factory()
    value = value.given if isinstance(value, Choice) else value
    return type(value) is type(default) and value == default


def _shown(value: object) -> str:
    if isinstance(value, Choice):
        return _shown(value.given)
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    return changed_repr(value) if attrs.has(type(value)) else repr(value)
