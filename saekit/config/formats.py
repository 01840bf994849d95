"""TOML, YAML and JSON as texts: strict readers, and writers whose texts read as the same data.

TOML has no null; :data:`NULL` stands for it, where leaving an option out would mean something else.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

__all__ = ["NULL", "READERS", "read_toml", "toml_value", "write"]

NULL: Mapping[str, bool] = {"none": True}
"""None in TOML: ``{none = true}``."""


class _Twice(dict[str, Any]):
    """An object that had some of its keys twice."""

    twice: list[str]


def read_toml(text: str) -> Any:
    return _with_null(tomllib.loads(text))


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        inner = {_unescaped(key) if len(value) == 1 else key: _with_null(item) for key, item in value.items()}
        return None if value == NULL and value["none"] is True else inner
    return [_with_null(item) for item in value] if isinstance(value, list) else value


def _without_null(value: Any) -> Any:
    if value is None:
        return dict(NULL)
    if isinstance(value, Mapping):
        escape = len(value) == 1 and re.fullmatch("none_*", str(next(iter(value))))
        return {f"{key}_" if escape else key: _without_null(item) for key, item in value.items()}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _unescaped(key: str) -> str:
    """A table whose one key is ``none`` has an underscore more, so as not to be null."""
    return key[:-1] if re.fullmatch("none_+", key) else key


def toml_value(value: Any) -> str:
    """``value`` as TOML on one line."""
    import tomli_w

    value = _without_null(value)

    def inline(value: Any) -> str:
        if isinstance(value, Mapping):
            items = ((tomli_w.dumps({key: 0}).rpartition(" = ")[0], inline(item)) for key, item in value.items())
            return "{" + ", ".join(f"{key} = {text}" for key, text in items) + "}"
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(map(inline, value)) + "]"
        return tomli_w.dumps({"v": value})[4:].strip()

    return inline(value)


def _read_json(text: str) -> Any:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        keys = [key for key, _ in pairs]
        marked = _Twice(made)
        marked.twice = [key for key in made if keys.count(key) > 1]
        return marked

    read = json.loads(text, object_pairs_hook=table)
    if found := sorted(_twice(read, "")):
        raise ValueError(f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} there twice")
    return read


def _twice(value: Any, path: str) -> list[str]:
    """The dotted paths of the keys that were there twice."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [f"{path}{key}" for key in value.twice] if isinstance(value, _Twice) else []
    return found + [place for key, item in items for place in _twice(item, f"{path}{key}.")]


def _yaml_resolvers() -> list[tuple[str, re.Pattern[str], list[str]]]:
    """The core schema of YAML 1.2: ``1e-4`` and ``0o17`` are numbers, and ``on``, ``yes`` and dates are texts."""
    digits = list("0123456789")
    return [
        ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
        ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
        ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), [*"-+", *digits]),
        (
            "float",
            re.compile(
                r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
                r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
            ),
            [*"-+.", *digits],
        ),
        ("merge", re.compile("^(?:<<)$"), ["<"]),
    ]


_MOST_MERGED = 10_000  # entries of a table


def _yaml_loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers and words, and no key twice."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
            return node

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            if len(node.value) > _MOST_MERGED:  # tables merged into tables grow by leaps
                raise yaml.composer.ComposerError(None, None, "merges (<<) make a table too large", node.start_mark)

        def integer(self, node: Any) -> int:
            text = self.construct_scalar(node)
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return int(text, base)

        def number(self, node: Any) -> float:
            text = self.construct_scalar(node).lower()
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1
    for tag, pattern, first in _yaml_resolvers():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.integer)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.number)
    return Loader


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _yaml_loader())  # which is a SafeLoader
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as error:  # explicit tags that do not fit
        raise ValueError(str(error)) from error


def _write_yaml(table: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what either version of YAML would take for something else."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    for tag, pattern, first in _yaml_resolvers():
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)
    return str(yaml.dump(table, Dumper=Dumper, sort_keys=False))


def write(table: Mapping[str, Any], form: str) -> str:
    """``table`` as a text in a form, ``toml``, ``yaml`` or ``json``."""
    if form == "json":
        return json.dumps(table, indent=2) + "\n"
    if form == "yaml":
        return _write_yaml(table)
    import tomli_w

    return tomli_w.dumps(_without_null(table))


READERS: dict[str, Callable[[str], Any]] = {
    ".toml": read_toml,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
}
"""By the ending of a file's name.  What is not of the form is a ValueError."""
