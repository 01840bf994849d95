"""Plain data to configuration and back: strict, with every fault reported at once under its dotted path.

It refuses what it would have to guess at (``"false"`` is not a bool, ``3.9`` not an int), runs all validators before
giving up, and turns plugin choices into the plugin's own options class.  What types an option may have is told by
:func:`unsupported_options`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import attrs

from saekit.config import PLUGIN_KIND
from saekit.config.elsewhere import UnknownOption
from saekit.config.kinds import (
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
from saekit.config.scalars import structure_enum, structure_key, structure_literal, structure_primitive
from saekit.config.supported import unsupported_options
from saekit.config.values import plain, shown, too_nested
from saekit.errors import ConfigError, SaekitError
from saekit.files.paths import as_path

if TYPE_CHECKING:
    from saekit.plugins.manager import PluginManager

__all__ = ["ConfigConverter", "unsupported_options"]

T = TypeVar("T")
NONE = "none"
"""In the place of None, where the option takes no text of its own that reads so."""
_LONGEST_KEY = 200
Problems = list[tuple[str, str]]


class _ProblemsError(Exception):
    def __init__(self, items: Problems) -> None:
        super().__init__(items)
        self.items = items


class ConfigConverter:
    """Reads and writes configuration classes; plugin choices are looked up in ``plugins``."""

    def __init__(self, plugins: PluginManager) -> None:
        self.plugins = plugins
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

    # ---- reading

    def choice(self, value: object, kind: str) -> object:
        """What selects a plugin of ``kind`` (a key, a table, an options object), checked, its key qualified."""
        what = f"the {kind.replace('_', ' ').removesuffix('s')}"
        if problem := too_nested(value):
            raise ConfigError([("", problem)], what)
        try:
            return self._choice(value, kind, attrs.NOTHING)
        except _ProblemsError as problems:
            raise ConfigError(problems.items, what) from None

    def structure(self, data: object, cls: type[T], source: str = "the configuration") -> T:
        """``data`` (nested dicts, lists and scalars) as a ``cls``; :class:`ConfigError` lists every fault."""
        if problem := too_nested(data):
            raise ConfigError([("", f"{source} {problem}")])
        try:
            made: T = self._class(data, cls)
        except _ProblemsError as problems:
            told = [
                (path, text.told(path, cls, self.plugins) if isinstance(text, UnknownOption) else text)
                for path, text in problems.items
            ]
            raise ConfigError(told, source) from None
        return made

    def _structure(self, value: object, kind: Any) -> object:
        kind = unwrapped(kind)
        for fits, structured in self._hooks:
            if fits(kind):
                return structured(value, kind)
        raise ValueError(f"is of the type {words(kind)}, which no configuration can hold")

    def _class(self, data: object, cls: type[Any]) -> Any:
        if type(data) is cls:  # made in code, where nothing looks at types
            data = self.unstructure(data, qualify=False)
        if not isinstance(data, Mapping):
            raise _ProblemsError([("", f"expected a table of options, found {shown(data)}")])
        try:
            attrs.resolve_types(cls)
        except Exception as error:  # refused when a plugin is registered; a class of one's own may come here
            problem = f"the annotations of {cls.__qualname__} cannot be resolved: {type(error).__name__}: {error}"
            raise _ProblemsError([("", problem)]) from None
        fields = {field.name: field for field in attrs.fields(cls) if field.init}
        problems: Problems = [(_said(key), UnknownOption(str(key), fields)) for key in data if key not in fields]
        values: dict[str, object] = {}
        for name, field in fields.items():
            if name not in data:
                if field.default is attrs.NOTHING:
                    problems.append((name, "is required"))
                continue
            try:
                values[field.alias] = self._checked(data[name], field)
            except Exception as error:  # attrs validators of plugins may raise anything
                problems += _flatten(error, name)
        if problems:
            raise _ProblemsError(problems)
        try:
            return cls(**values)
        except Exception as error:
            raise _ProblemsError(_flatten(error, "")) from error

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
            return self._structure(value, object if field.type is None else field.type)
        if value is None and field.default is None:
            return None
        if not isinstance(field.default, tuple):
            return self._choice(value, kind, field.default)
        if not isinstance(value, (list, tuple)):
            raise _ProblemsError([("", f"expected a list of {kind.replace('_', ' ')}, found {shown(value)}")])
        return tuple(self._each(value, lambda item: self._choice(item, kind, attrs.NOTHING)))

    def _choice(self, value: object, kind: str, default: object) -> object:
        """A key stays a (qualified) key; a table becomes the options class; an options object is checked."""
        value = plain(value)
        if isinstance(value, str) and len(value) > _LONGEST_KEY:
            raise _ProblemsError([("", f"expected a plugin's key, found {shown(value)}")])
        if isinstance(value, str):
            registered = self.plugins.get(kind, value)
            self._class({}, registered.entry.config)  # a required option makes the bare key not enough
            return registered.key
        if not isinstance(value, Mapping) and attrs.has(type(value)):
            value = self._options_table(value, kind, qualify=False)
        if not isinstance(value, Mapping):
            raise _ProblemsError(
                [("", f"expected a plugin's key, or a table with its name and options, found {shown(value)}")]
            )
        name = plain(value.get("name", default))
        if not isinstance(name, str):
            raise _ProblemsError([("name", "is required: the key of the plugin")])
        options = {key: option for key, option in value.items() if key != "name"}
        return self._class(options, self.plugins.get(kind, name).entry.config)

    def _union(self, value: object, union: Any) -> object:
        members = [unwrapped(member) for member in get_args(union)]
        inner = [member for member in members if member is not type(None)]
        if value is None and len(inner) < len(members):
            return None
        value = value if any(isinstance(value, m) for m in inner if isinstance(m, type)) else plain(value)
        failed = []
        for member in sorted(inner, key=lambda member: type(value) is not member):  # 5 of int | float is an int
            try:
                return self._structure(value, member)
            except Exception as error:
                failed.append(error)
        if value == NONE and len(inner) < len(members):
            return None
        tables = [failed[i] for i, member in enumerate(inner) if is_class(member) and isinstance(value, Mapping)]
        if len(failed) == 1 or len(tables) == 1:
            raise (tables or failed)[0]
        raise _ProblemsError([("", f"expected {words(union)}, found {shown(value)}")])

    def _list(self, value: object, kind: Any) -> object:
        value = plain(value)
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise _ProblemsError([("", f"expected a list, found {shown(value)}")])
        made, members = LISTS[made_of(kind)], get_args(kind)
        if made is not tuple or not members or members[-1] is ... or made_of(kind) is not tuple:
            member = members[0] if members else Any
            return made(self._each(value, lambda item: self._structure(item, member)))
        if len(value) != len(members):
            raise _ProblemsError([("", f"expected a list of {len(members)}, found {len(value)}: {shown(value)}")])
        kinds = iter(members)
        return tuple(self._each(value, lambda item: self._structure(item, next(kinds))))

    def _dict(self, value: object, kind: Any) -> object:
        if not isinstance(value, Mapping):
            raise _ProblemsError([("", f"expected a table, found {shown(value)}")])
        keys, items = get_args(kind) or (str, Any)
        problems: Problems = []
        made: dict[object, object] = {}
        for key, item in value.items():
            try:
                made[structure_key(key, unwrapped(keys))] = self._structure(item, items)
            except Exception as error:
                problems += _flatten(error, _said(key))
        if problems:
            raise _ProblemsError(problems)
        return made

    def _any(self, value: object) -> object:
        """Plain data of any shape."""
        value = plain(value)
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
            raise _ProblemsError(problems)
        return made

    def there_and_back(self, value: object, kind: Any) -> object:
        """The ``value`` of an option of type ``kind`` as it comes back from a file; raises where it cannot."""
        return self._structure(self._plain(value, True, False), kind)

    # ---- writing

    def unstructure(self, config: object, *, qualify: bool = True, spare: bool = False) -> dict[str, Any]:
        """Nested plain data with every plugin key qualified; ``structure`` gives the same configuration back.

        Without ``qualify``, keys and values stay as they were written, known or not.  ``spare`` leaves out the options
        that are None and are None by default: some formats have no null.
        """
        table: dict[str, Any] = {}
        for field in attrs.fields(type(config)):  # type: ignore[arg-type]
            value = getattr(config, field.name)
            if not field.init or (spare and value is None and field.default is None):
                continue
            kind = field.metadata.get(PLUGIN_KIND)
            if kind is None:
                table[field.name] = self._plain(value, qualify, spare)
            elif isinstance(value, (list, tuple)):
                table[field.name] = [self._options_table(choice, kind, qualify, spare) for choice in value]
            else:
                table[field.name] = self._options_table(value, kind, qualify, spare)
        return table

    def _plain(self, value: object, qualify: bool, spare: bool) -> Any:
        if is_class(type(value)):
            return self.unstructure(value, qualify=qualify, spare=spare)
        if isinstance(value, Mapping):
            return {_key(key): self._plain(item, qualify, spare) for key, item in value.items()}
        if not isinstance(value, (list, tuple, set, frozenset)):
            return plain(value) if qualify else value
        items = [self._plain(item, qualify, spare) for item in value]
        if isinstance(value, (set, frozenset)) and qualify:  # whose order is chance
            return sorted(items, key=lambda item: (type(item).__name__, item))
        return items

    def _options_table(self, choice: object, kind: str, qualify: bool, spare: bool = False) -> object:
        if isinstance(choice, str):
            return self.plugins.get(kind, choice).key if qualify else choice
        if isinstance(choice, Mapping):
            named = qualify and isinstance(choice.get("name"), str)
            return {**choice, "name": self.plugins.get(kind, choice["name"]).key} if named else dict(choice)
        if not attrs.has(type(choice)):
            return choice  # rubbish: the strict reading reports it under its path
        return {"name": self.plugins.find(kind, choice).key, **self.unstructure(choice, qualify=qualify, spare=spare)}


def _key(key: object) -> object:
    """A key as a text, as files have them."""
    key = plain(key)
    return str(key) if type(key) is int else key


def _said(key: object) -> str:
    """A key in a message, which must be printable."""
    return str(key).encode("utf-8", "backslashreplace").decode()[:200]


def _flatten(error: BaseException, prefix: str) -> Problems:
    """The problems inside ``error``, their paths below ``prefix``."""
    if isinstance(error, _ProblemsError):
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
