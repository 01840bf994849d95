"""YAML of strangers: one table of plain values, without anything that grows or runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saekit.errors import SAEFormatError
from saekit.files.strict_json import check_value
from saekit.reasons import reason

__all__ = ["read_table"]

_LARGEST = 1 << 20  # bytes
_DEEPEST = 64
_MOST_VALUES = 100_000


def read_table(path: Path, where: str) -> dict[str, Any]:
    """The table in a YAML file; :class:`SAEFormatError` names ``where``.  Tags of Python are refused, not followed."""
    import yaml

    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise SAEFormatError(f"{where} has {size:,} bytes, expected at most {_LARGEST:,}")
        text = path.read_text(encoding="utf-8")
        _check_depth(text, where)
        value = yaml.safe_load(text)
    except OSError as error:
        raise SAEFormatError(f"{where} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SAEFormatError(f"{where} is not valid YAML: {reason(error)}") from error
    if not isinstance(value, dict):
        raise SAEFormatError(f"{where} holds {type(value).__name__}, expected a table")
    _check_size(value, where)
    check_value(value, where)
    return value


def _check_depth(text: str, where: str) -> None:
    """Before anything is built, which is done by recursion."""
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise SAEFormatError(f"{where} is nested too deeply, expected at most {_DEEPEST} levels")


def _check_size(value: object, where: str) -> None:
    """What names a value again and again (``*name``) is small as a text and without end as a table."""
    left, seen = [value], 0
    while left:
        item = left.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise SAEFormatError(f"{where} holds more than {_MOST_VALUES:,} values, repetitions counted")
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list | tuple | set):
            left += item
