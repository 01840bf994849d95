"""Plain data as the types of options ask for: strict, with every fault reported at once under its dotted path.

It refuses what it would have to guess at (``"false"`` is not a bool, ``3.9`` not an int) and runs all validators before
giving up.  Of plugins it knows nothing: :class:`saekit.config.converter.ConfigConverter` adds them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import attrs

from saekit.config.annotations import (
    LISTS,
    PRIMITIVES,
    is_any,
    is_class,
    is_dict,
    is_enum,
    is_list,
    is_literal,
    is_primitive,
    is_union,
    made_of,
    unwrapped,
    words,
)
from saekit.config.fields import INSTEAD_OF, PLUGIN_KIND, replaced
from saekit.config.scalars import structure_enum, structure_key, structure_literal, structure_primitive
from saekit.config.values import plain, shown
from saekit.errors import ConfigError, SaekitError
from saekit.files.paths import as_path

__all__ = ["Problems", "ProblemsError", "Structurer", "UnknownOption", "fields_of"]

NONE = "none"
"""In the place of None, where the option takes no text of its own that reads so."""
Problems = list[tuple[str, str]]


class ProblemsError(Exception):
    """Faults with their paths, on their way up."""

    def __init__(self, items: Problems) -> None:
        super().__init__(items)
        self.items = items


class UnknownOption(str):
    """The message about an option that is not there, by what is known of its own table alone."""

    key: str
    close: bool
    chosen: str
    """The key of the plugin whose options those are; empty where they are no plugin's."""

    def __new__(cls, key: str, fields: Iterable[str]) -> UnknownOption:
        options = list(fields)
        longer = [option for option in options if option.startswith(f"{key}_")]
        close = difflib.get_close_matches(key, options, n=1) or longer
        hint = f"Did you mean {close[0]!r}?" if close else f"The options here are {', '.join(options) or 'none'}."
        made = super().__new__(cls, f"is not an option. {hint}")
        made.key, made.close, made.chosen = key, bool(close), ""
        return made


def fields_of(config: object) -> dict[str, Any]:
    """The values of an options object by name, as they are, without what another option takes the place of."""
    fields, left_out = attrs.fields(type(config)), replaced(config)  # type: ignore[arg-type]
    return {field.name: getattr(config, field.name) for field in fields if field.init and field.name not in left_out}


class Structurer:
    """Makes values of the types of options."""

    def __init__(self) -> None:
        self._hooks: list[tuple[Callable[[Any], bool], Callable[[Any, Any], object]]] = [
            (is_any, lambda value, kind: self._any(value)),
            (is_class, self._class),
            (is_union, self._union),
            (is_literal, structure_literal),
            (is_enum, structure_enum),
            (lambda kind: kind is Path, self._path),
            (is_list, self._list),
            (is_dict, self._dict),
            (lambda kind: kind is None or kind is type(None), self._none),
            (is_primitive, structure_primitive),
        ]

    def structured(self, value: object, kind: Any) -> object:
        kind = unwrapped(kind)
        for fits, structured in self._hooks:
            if fits(kind):
                return structured(value, kind)
        raise ValueError(f"is of the type {words(kind)}, which no configuration can hold")

    def _class(self, data: object, cls: type[Any]) -> Any:
        if type(data) is cls:  # made in code, where nothing looks at types
            data = fields_of(data)
        if not isinstance(data, Mapping):
            raise ProblemsError([("", f"expected a table of options{_such_as(data, cls)}, found {shown(data)}")])
        try:
            attrs.resolve_types(cls)
        except Exception as error:  # refused when a plugin is registered; a class of one's own may come here
            problem = f"the annotations of {cls.__qualname__} cannot be resolved: {type(error).__name__}: {error}"
            raise ProblemsError([("", problem)]) from None
        fields = {field.name: field for field in attrs.fields(cls) if field.init}
        problems: Problems = [(_said(key), UnknownOption(str(key), fields)) for key in data if key not in fields]
        values: dict[str, object] = {}
        for name, field in fields.items():
            if name not in data:
                if field.default is attrs.NOTHING:
                    problems.append((name, "is required"))
                else:
                    values.update(self._default(field))
                continue
            try:
                values[field.alias] = self._checked(data[name], field)
            except Exception as error:  # attrs validators of plugins may raise anything
                problems += _flatten(error, name)
        if problems:
            raise ProblemsError(problems)
        try:
            made = cls(**values)
        except Exception as error:
            raise ProblemsError(_flatten(error, "")) from error
        if both := list(_beside(data, fields.values())):
            raise ProblemsError(both)
        return made

    def _default(self, field: attrs.Attribute[Any]) -> dict[str, object]:
        """What an option that is not given is made with: nothing, so that attrs takes the default."""
        return {}

    def _checked(self, data: object, field: attrs.Attribute[Any]) -> object:
        value = self._field(data, field)
        if callable(field.converter) and not isinstance(field.converter, attrs.Converter):
            value = field.converter(value)
        if field.validator is not None:
            field.validator(None, field, value)
        return value

    def _field(self, value: object, field: attrs.Attribute[Any]) -> object:
        kind = field.metadata.get(PLUGIN_KIND)
        if kind is None:
            return self.structured(value, object if field.type is None else field.type)
        if field.default is None and (value is None or plain(value) == NONE):
            return None
        if not isinstance(field.default, tuple):
            return self._choice(value, kind, field.default)
        if not isinstance(value, (list, tuple)):
            raise ProblemsError([("", f"expected a list of {kind.replace('_', ' ')}, found {shown(value)}")])
        return tuple(self._each(value, lambda item: self._choice(item, kind, attrs.NOTHING)))

    def _choice(self, value: object, kind: str, default: object) -> object:
        """What chooses a plugin, which is left as it is."""
        return value

    def _union(self, value: object, union: Any) -> object:
        members = [unwrapped(member) for member in get_args(union)]
        inner = [member for member in members if member is not type(None)]
        if value is None and len(inner) < len(members):
            return None
        value = value if any(isinstance(value, m) for m in inner if isinstance(m, type)) else plain(value)
        failed = []
        for member in sorted(inner, key=lambda member: type(value) is not member):  # 5 of int | float is an int
            try:
                return self.structured(value, member)
            except Exception as error:
                failed.append(error)
        if value == NONE and len(inner) < len(members):
            return None
        tables = [failed[i] for i, member in enumerate(inner) if is_class(member) and isinstance(value, Mapping)]
        if len(failed) == 1 or len(tables) == 1:
            raise (tables or failed)[0]
        raise ProblemsError([("", f"expected {words(union)}, found {shown(value)}")])

    def _list(self, value: object, kind: Any) -> object:
        value = plain(value)
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise ProblemsError([("", f"expected a list, found {shown(value)}")])
        made, members = LISTS[made_of(kind)], get_args(kind)
        if made is not tuple or not members or members[-1] is ... or made_of(kind) is not tuple:
            member = members[0] if members else Any
            return made(self._each(value, lambda item: self.structured(item, member)))
        if len(value) != len(members):
            raise ProblemsError([("", f"expected a list of {len(members)}, found {len(value)}: {shown(value)}")])
        kinds = iter(members)
        return tuple(self._each(value, lambda item: self.structured(item, next(kinds))))

    def _dict(self, value: object, kind: Any) -> object:
        if not isinstance(value, Mapping):
            raise ProblemsError([("", f"expected a table, found {shown(value)}")])
        keys, items = get_args(kind) or (str, Any)
        problems: Problems = []
        made: dict[object, object] = {}
        for key, item in value.items():
            try:
                made[structure_key(key, unwrapped(keys))] = self.structured(item, items)
            except Exception as error:
                problems += _flatten(error, _said(key))
        if problems:
            raise ProblemsError(problems)
        return made

    def _any(self, value: object) -> object:
        """Plain data of any shape."""
        value = fields_of(value) if is_class(type(value)) else plain(value)
        if isinstance(value, Mapping):
            return self._dict(value, dict[str, Any])
        if isinstance(value, (list, tuple)):
            return self._each(value, self._any)
        if value is None or type(value) in PRIMITIVES:
            return value if type(value) is float or value is None else structure_primitive(value, type(value))
        raise ValueError(f"expected plain data (numbers, texts, lists, tables), found {shown(value)}")

    def _path(self, value: object, kind: Any) -> object:
        text = structure_primitive(value, str)
        return as_path(str(text))

    def _none(self, value: object, kind: Any) -> object:
        if value is None or value == NONE:
            return None
        raise ValueError(f"expected none, found {shown(value)}")

    def _each(self, items: Iterable[object], structured: Callable[[object], object]) -> list[object]:
        """Every item structured; the faults of all of them together."""
        problems: Problems = []
        made = []
        for index, item in enumerate(items):
            try:
                made.append(structured(item))
            except Exception as error:
                problems += _flatten(error, f"[{index}]")
        if problems:
            raise ProblemsError(problems)
        return made


def _such_as(data: object, cls: type[Any]) -> str:
    """A table of the text that somebody gave in its place, where the first option is a text."""
    first = next((field for field in attrs.fields(cls) if field.init), None)
    if not isinstance(data, str) or first is None or first.type not in (str, "str", str | None, "str | None"):
        return ""
    return f" such as {{{first.name} = {json.dumps(data)}}}"


def _beside(data: Mapping[Any, Any], fields: Iterable[attrs.Attribute[Any]]) -> Iterator[tuple[str, str]]:
    """Options in ``data`` that another one there takes the place of, which its value does not show."""
    for field in fields:
        other: str | None = field.metadata.get(INSTEAD_OF)
        if other is not None and other in data and data.get(field.name):
            yield other, f"is given beside {field.name}, which takes its place; leave out one of the two"


def _said(key: object) -> str:
    """A key in a message, which must be printable."""
    return str(key).encode("utf-8", "backslashreplace").decode()[:200]


def _flatten(error: BaseException, prefix: str) -> Problems:
    """The problems inside ``error``, their paths below ``prefix``."""
    if isinstance(error, ProblemsError):
        items = error.items
    elif isinstance(error, ConfigError):
        items = [("" if path == prefix else path, message) for path, message in error.problems]
    else:
        items = [
            ("", str(error) if isinstance(error, (SaekitError, ValueError)) else f"{type(error).__name__}: {error}")
        ]
    return [(_joined(prefix, path), message) for path, message in items]


def _joined(prefix: str, path: str) -> str:
    if not prefix or not path:
        return prefix or path
    return prefix + path if path.startswith("[") else f"{prefix}.{path}"
