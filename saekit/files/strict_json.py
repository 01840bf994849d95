"""JSON of strangers: one object, without anything that only fails later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saekit.errors import SAEFormatError
from saekit.files.storage import parse_json

__all__ = ["check_value", "parse_object", "read_object"]

_LARGEST = 1 << 24  # bytes
_DEEPEST = 64


def read_object(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file; :class:`SAEFormatError` names ``where`` and the field."""
    try:
        _check_size(path.stat().st_size, where)
        data = path.read_bytes()
    except OSError as error:
        raise SAEFormatError(f"{where} cannot be read: {error.strerror or error}") from error
    return parse_object(data, where)


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in the bytes of a JSON file, as :func:`read_object` has it."""
    _check_size(len(data), where)
    try:
        value = parse_json(data.decode(), _without_duplicates)
    except ValueError as error:
        if isinstance(error.__cause__, RecursionError):
            raise SAEFormatError(f"{where} is nested too deeply, expected at most {_DEEPEST} levels") from error
        raise SAEFormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SAEFormatError(f"{where} holds {type(value).__name__}, expected an object")
    check_value(value, where)
    return value


def _check_size(size: int, where: str) -> None:
    if size > _LARGEST:
        raise SAEFormatError(f"{where} has {size:,} bytes, expected at most {_LARGEST:,}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(name for name in names if names.count(name) > 1)!r} twice")
    return table


def check_value(value: object, where: str) -> None:
    """Refuse what is too deep, and texts that are no text: half a surrogate pair cannot be printed or saved."""
    left: list[tuple[str, object, int]] = [("", value, 0)]
    while left:
        path, item, depth = left.pop()
        if depth > _DEEPEST:
            raise SAEFormatError(f"{where} is nested too deeply, expected at most {_DEEPEST} levels")
        if isinstance(item, str) and not _is_text(item):
            raise SAEFormatError(f"{path or 'the text'} in {where} is {item!a}, which is not a text in Unicode")
        if isinstance(item, dict):
            for name, inner in item.items():
                if isinstance(name, str) and not _is_text(name):
                    raise SAEFormatError(f"{where} has a field {name!a}, which is not a text in Unicode")
                left.append((f"{path}.{name}".lstrip("."), inner, depth + 1))
        elif isinstance(item, list | tuple):
            left += [(f"{path}[{index}]", inner, depth + 1) for index, inner in enumerate(item)]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
