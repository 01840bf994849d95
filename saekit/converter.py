"""Plain data to configuration and back: strict, with every fault reported at once under its dotted path.

cattrs does the structuring; the hooks here make it refuse what it would coerce (``"false"`` is not a bool, ``3.9`` not
an int), run all validators before giving up, and turn plugin choices into the plugin's own options class.
"""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import IterableValidationError, IterableValidationNote

from saekit.config import PLUGIN_KIND
from saekit.errors import ConfigError, SaekitError
from saekit.manager import PluginManager

__all__ = ["ConfigConverter", "unsupported_options"]

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class _ProblemsError(Exception):
    def __init__(self, items: list[tuple[str, str]]) -> None:
        super().__init__(items)
        self.items = items


class ConfigConverter:
    """Reads and writes configuration classes; plugin choices are looked up in ``plugins``."""

    def __init__(self, plugins: PluginManager) -> None:
        self.plugins = plugins
        self._cattrs = cattrs.Converter(detailed_validation=True)
        for primitive in _NAMES:
            self._cattrs.register_structure_hook(primitive, _structure_primitive)
        self._cattrs.register_structure_hook_func(_is_union, self._structure_union)
        self._cattrs.register_structure_hook_func(_is_literal, _structure_literal)
        self._cattrs.register_structure_hook_func(_is_tuple, self._structure_tuple)
        self._cattrs.register_structure_hook_func(attrs.has, self._structure_class)

    # ---- reading

    def choice(self, value: object, kind: str) -> object:
        """What selects a plugin of ``kind`` (a key, a table, an options object), checked, its key qualified."""
        try:
            return self._structure_choice(value, kind, attrs.NOTHING)
        except _ProblemsError as problems:
            raise ConfigError(problems.items, f"the {kind.replace('_', ' ').removesuffix('s')}") from None

    def structure(self, data: object, cls: type[T], source: str = "the configuration") -> T:
        """``data`` (nested dicts, lists and scalars) as a ``cls``; :class:`ConfigError` lists every fault."""
        try:
            return self._cattrs.structure(data, cls)
        except _ProblemsError as problems:
            raise ConfigError(problems.items, source) from None

    def _structure_class(self, data: object, cls: type) -> object:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise _ProblemsError([("", f"expected a table of options, found {data!r}")])
        attrs.resolve_types(cls)
        fields = {field.name: field for field in attrs.fields(cls)}
        problems = [(str(key), _unknown_option(key, fields)) for key in data if key not in fields]
        values: dict[str, object] = {}
        for name, field in fields.items():
            if name not in data:
                if field.default is attrs.NOTHING:
                    problems.append((name, "is required"))
                continue
            try:
                values[name] = self._structure_field(data[name], field)
                if field.validator is not None:
                    field.validator(None, field, values[name])
            except Exception as error:  # attrs validators of plugins may raise anything
                problems += _flatten(error, name)
        if problems:
            raise _ProblemsError(problems)
        try:
            made: object = cls(**values)
        except Exception as error:
            raise _ProblemsError(_flatten(error, "")) from error
        return made

    def _structure_field(self, value: object, field: attrs.Attribute[Any]) -> object:
        kind = field.metadata.get(PLUGIN_KIND)
        if kind is None:
            return self._cattrs.structure(value, field.type or object)
        if not isinstance(field.default, tuple):
            return self._structure_choice(value, kind, field.default)
        if not isinstance(value, (list, tuple)):
            raise _ProblemsError([("", f"expected a list of {kind.replace('_', ' ')}, found {value!r}")])
        problems: list[tuple[str, str]] = []
        chosen = []
        for index, item in enumerate(value):
            try:
                chosen.append(self._structure_choice(item, kind, attrs.NOTHING))
            except Exception as error:
                problems += _flatten(error, f"[{index}]")
        if problems:
            raise _ProblemsError(problems)
        return tuple(chosen)

    def _structure_choice(self, value: object, kind: str, default: object) -> object:
        """A key stays a (qualified) key; a table becomes the options class; an options object is checked."""
        if isinstance(value, str):
            registered = self.plugins.get(kind, value)
            self._cattrs.structure({}, registered.entry.config)  # a required option makes the bare key not enough
            return registered.key
        if not isinstance(value, Mapping) and attrs.has(type(value)):
            value = self._options_table(value, kind, qualify=False)
        if not isinstance(value, Mapping):
            raise _ProblemsError(
                [("", f"expected a plugin's key, or a table with its name and options, found {value!r}")]
            )
        name = value.get("name", default)
        if not isinstance(name, str):
            raise _ProblemsError([("name", "is required: the key of the plugin")])
        options = {key: option for key, option in value.items() if key != "name"}
        return self._cattrs.structure(options, self.plugins.get(kind, name).entry.config)

    def _structure_union(self, value: object, union: Any) -> object:
        members = get_args(union)
        if type(None) in members and (value is None or (value == "none" and str not in members)):
            return None
        for member in members:
            if member in _NAMES and type(value) is member:
                return value
        inner = [member for member in members if member is not type(None)]
        if len(inner) == 1:
            return self._cattrs.structure(value, inner[0])
        raise _ProblemsError([("", f"expected {' or '.join(_NAMES.get(m, str(m)) for m in inner)}, found {value!r}")])

    def _structure_tuple(self, value: object, kind: Any) -> object:
        if not isinstance(value, (list, tuple)):
            raise _ProblemsError([("", f"expected a list, found {value!r}")])
        members = get_args(kind)
        problems: list[tuple[str, str]] = []
        items = []
        for index, item in enumerate(value):
            try:
                items.append(self._cattrs.structure(item, members[0]))
            except Exception as error:
                problems += _flatten(error, f"[{index}]")
        if problems:
            raise _ProblemsError(problems)
        return tuple(items)

    # ---- writing

    def unstructure(self, config: object, *, qualify: bool = True) -> dict[str, Any]:
        """Nested plain data with every plugin key qualified; ``structure`` gives the same configuration back.

        Without ``qualify``, keys stay as they were written, known or not.
        """
        table: dict[str, Any] = {}
        for field in attrs.fields(type(config)):  # type: ignore[arg-type]
            value = getattr(config, field.name)
            kind = field.metadata.get(PLUGIN_KIND)
            if value is None and qualify and field.default is not None:
                table[field.name] = "none"  # to be told from an option that is left out, in files without a null
            elif kind is None:
                table[field.name] = self._plain(value, qualify)
            elif isinstance(value, (list, tuple)):
                table[field.name] = [self._options_table(choice, kind, qualify) for choice in value]
            else:
                table[field.name] = self._options_table(value, kind, qualify)
        return table

    def _plain(self, value: object, qualify: bool) -> object:
        if attrs.has(type(value)):
            return self.unstructure(value, qualify=qualify)
        if isinstance(value, (list, tuple)):
            return [self._plain(item, qualify) for item in value]
        if isinstance(value, Mapping):
            return {key: self._plain(item, qualify) for key, item in value.items()}
        return value

    def _options_table(self, choice: object, kind: str, qualify: bool) -> object:
        if isinstance(choice, str):
            return self.plugins.get(kind, choice).key if qualify else choice
        if isinstance(choice, Mapping):
            named = qualify and isinstance(choice.get("name"), str)
            return {**choice, "name": self.plugins.get(kind, choice["name"]).key} if named else dict(choice)
        if not attrs.has(type(choice)):
            return choice  # rubbish: the strict reading reports it under its path
        return {"name": self.plugins.find(kind, choice).key, **self.unstructure(choice, qualify=qualify)}


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_literal(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def _is_tuple(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is tuple


def _structure_primitive(value: object, kind: type) -> object:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise _ProblemsError([("", f"expected {_NAMES[kind]}, found {value!r}")])


def _structure_literal(value: object, kind: Any) -> object:
    allowed = get_args(kind)
    if value in allowed and type(value) in {type(option) for option in allowed}:
        return value
    message = f"expected one of {', '.join(map(repr, allowed))}, found {value!r}"
    close = difflib.get_close_matches(str(value), [str(option) for option in allowed], n=1)
    raise _ProblemsError([("", message + (f". Did you mean {close[0]!r}?" if close else ""))])


def _unknown_option(key: object, fields: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(str(key), fields, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"The options here are {', '.join(fields) or 'none'}."
    return f"is not an option. {hint}"


def _flatten(error: BaseException, prefix: str) -> list[tuple[str, str]]:
    """The problems inside ``error``, their paths below ``prefix``."""
    if isinstance(error, IterableValidationError):
        found = []
        for inner in error.exceptions:
            notes = [note for note in getattr(inner, "__notes__", []) if isinstance(note, IterableValidationNote)]
            found += _flatten(inner, f"[{notes[0].index!r}]" if notes else "")
        items = found
    elif isinstance(error, _ProblemsError):
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


def unsupported_options(cls: type) -> list[tuple[str, str]]:
    """``(option, why)`` for the options of the attrs class ``cls`` that would not survive being written and read."""
    found = [(field.name, "has no type") for field in attrs.fields(cls) if field.type is None]
    for owner in cls.__mro__:
        names = {**vars(sys.modules[owner.__module__]), **vars(owner)}
        for name, annotation in vars(owner).get("__annotations__", {}).items():
            try:
                if isinstance(annotation, str):
                    eval(annotation, names)
            except Exception as error:
                why = f"has the annotation {annotation!r}, which cannot be resolved: {type(error).__name__}: {error}"
                found.append((name, why))
    return found
