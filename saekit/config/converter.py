"""Plain data to configuration: strict, with every plugin that is chosen bound to its options.

Types are the work of :mod:`saekit.config.structuring`; the way back is :mod:`saekit.config.writing`.  What types an
option may have is told by :func:`unsupported_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import attrs

from saekit.config.annotations import is_class
from saekit.config.elsewhere import told
from saekit.config.fields import PLUGIN_KIND
from saekit.config.structuring import ProblemsError, Structurer, UnknownOption, fields_of
from saekit.config.supported import unsupported_options
from saekit.config.values import plain, shown, too_nested
from saekit.errors import ConfigError, SaekitError
from saekit.kinds import Kind, kind_of
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager

__all__ = ["ConfigConverter", "unsupported_options"]

T = TypeVar("T")
_LONGEST_KEY = 200


class ConfigConverter(Structurer):
    """Reads configuration classes; plugin choices are looked up in ``plugins``, once, and bound."""

    def __init__(self, plugins: PluginManager) -> None:
        super().__init__()
        self.plugins = plugins

    def choice(self, value: object, kind: Kind[T]) -> Choice[T]:
        """What selects a plugin of ``kind`` (a key, a table, an options object), checked and bound."""
        what = f"the {kind.name.replace('_', ' ').removesuffix('s')}"
        if problem := too_nested(value):
            raise ConfigError([("", problem)], what)
        try:
            return self._choice(value, kind.name, attrs.NOTHING)
        except ProblemsError as problems:
            raise ConfigError(problems.items, what) from None

    def structure(self, data: object, cls: type[T], source: str = "the configuration") -> T:
        """``data`` (nested dicts, lists and scalars, or a ``cls`` made in code) as a ``cls``, all checked.

        Plugins that it chooses are bound.  :class:`ConfigError` lists every fault.
        """
        if problem := too_nested(data):
            raise ConfigError([("", f"{source} {problem}")])
        try:
            made: T = self._class(data, cls)
        except ProblemsError as problems:
            items = [
                (path, told(text, path, cls, self.plugins) if isinstance(text, UnknownOption) else text)
                for path, text in problems.items
            ]
            raise ConfigError(items, source) from None
        return made

    def at_default(self, cls: type, table: Mapping[str, Any]) -> list[str]:
        """The options in ``table``, plain data or objects, that are what a ``cls`` has if nothing is said of them."""
        try:
            attrs.resolve_types(cls)
        except Exception:  # of a plugin's own; reading says so
            return []
        fields = attrs.fields_dict(cls)
        return [name for name, value in table.items() if name in fields and self._is_default(value, fields[name])]

    def _is_default(self, value: object, field: attrs.Attribute[Any]) -> bool:
        default: Any = field.default
        if type(default).__name__ == "Factory":
            if default.takes_self:
                return False
            default = default.factory()
        try:
            given, own = (self._checked(one, field) for one in (value, default))
            if isinstance(given, Choice) and isinstance(own, Choice):  # by its key alone, or with all it has
                return bool(given.key == own.key and given.options == own.options)
            return bool(given == own)
        except Exception:  # whatever is wrong with it; reading says so
            return False

    def _default(self, field: attrs.Attribute[Any]) -> dict[str, object]:
        """The plugins that a default chooses are bound, too; one that is not there is told when it is used."""
        default: Any = field.default
        if type(default).__name__ == "Factory" and not default.takes_self:
            default = default.factory()
        if not (field.metadata.get(PLUGIN_KIND) or is_class(type(default))):
            return {}
        try:
            return {field.alias or field.name: self._checked(default, field)}
        except (ProblemsError, SaekitError):
            return {}

    def _choice(self, value: object, kind: str, default: object) -> Choice[Any]:
        """A key, a table with a name and options, an options object, or what was bound before, bound anew."""
        if isinstance(value, Choice):
            given: Any = {"name": value.key, **fields_of(value.options)} if value.spelled else value.key
        else:
            given = plain(value)
        if isinstance(given, str):
            if len(given) > _LONGEST_KEY:
                raise ProblemsError([("", f"expected a plugin's key, found {shown(given)}")])
            item, options = self.plugins.get(kind, given), {}  # a required option makes the bare key not enough
        elif not isinstance(given, Mapping) and attrs.has(type(given)):
            item, options = self.plugins.find(kind, given), fields_of(given)
        elif isinstance(given, Mapping):
            name = plain(given.get("name", default))
            if not isinstance(name, str):
                raise ProblemsError([("name", "is required: the key of the plugin")])
            item, options = self.plugins.get(kind, name), {key: one for key, one in given.items() if key != "name"}
        else:
            raise ProblemsError(
                [("", f"expected a plugin's key, or a table with its name and options, found {shown(given)}")]
            )
        spelled = not isinstance(given, str)
        try:
            made = self._class(options, item.entry.config)
        except ProblemsError as problems:
            for _, text in problems.items:
                if isinstance(text, UnknownOption) and not text.chosen:
                    text.chosen = item.key
            raise
        return Choice(kind_of(kind), item, made, spelled)
