"""Configuration files: TOML, YAML and JSON in, dotted overrides on top, commented TOML out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import attrs

from saekit.config import PLUGIN_KIND, PretokenizeConfig, TrainConfig
from saekit.converter import ConfigConverter
from saekit.describe import field_docs
from saekit.errors import ConfigError
from saekit.manager import PluginManager, default_manager

__all__ = [
    "apply_overrides",
    "commented_toml",
    "dump_config",
    "load_config",
    "parse_grid",
    "read_table",
    "set_option",
]

C = TypeVar("C")


@overload
def load_config(
    source: str | Path | Mapping[str, Any] | TrainConfig,
    overrides: Iterable[str] = ...,
    *,
    plugins: PluginManager | None = ...,
) -> TrainConfig: ...


@overload
def load_config(
    source: str | Path | Mapping[str, Any] | C,
    overrides: Iterable[str] = ...,
    *,
    plugins: PluginManager | None = ...,
    kind: type[C],
) -> C: ...


def load_config(
    source: Any, overrides: Iterable[str] = (), *, plugins: PluginManager | None = None, kind: type[Any] = TrainConfig
) -> Any:
    """A checked configuration from a file, a dict or a config object, with ``a.b=value`` overrides on top.

    ``kind`` is its class, by default :class:`TrainConfig`.  Raises :class:`ConfigError` listing every fault with its
    dotted path.
    """
    name = "the configuration"
    if isinstance(source, kind):
        table: Mapping[str, Any] = ConfigConverter(plugins or default_manager()).unstructure(source, qualify=False)
    elif isinstance(source, Mapping):
        table = source
    elif isinstance(source, (str, Path)):
        table, name = read_table(Path(source)), str(source)
    else:
        raise ConfigError(
            f"expected a {kind.__name__}, a dict or the path of a configuration file, found {type(source).__qualname__}"
        )
    table = apply_overrides(table, overrides)
    return ConfigConverter(plugins or default_manager()).structure(table, kind, name)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file."""
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in _READERS) if path.parent.is_dir() else []
        hint = f"; in that folder there are {', '.join(beside)}" if beside else ""
        raise ConfigError(f"there is no configuration file {path}{hint}. `saekit config > run.toml` writes one")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path} is not a configuration file: the name must end in {', '.join(_READERS)}")
    try:
        table = reader(path.read_text(encoding="utf-8"))
    except (ValueError, _yaml_error()) as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ConfigError(f"{path} must hold a table of sections, found {type(table).__name__}")
    return table


def _read_yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _yaml_error() -> type[Exception]:
    import yaml

    return yaml.YAMLError


_READERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": json.loads,
}


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``table`` with ``section.option=value`` set.  Values are TOML; what is not TOML is a text."""
    result = _copied(table)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{override!r} is not an override; write section.option=value, as in training.lr=1e-4")
        set_option(result, path.strip(), _parsed(text.strip()))
    return result


def set_option(table: dict[str, Any], path: str, value: Any) -> None:
    """Set the option at a dotted ``path`` of ``table``, in place."""
    *keys, last = path.split(".")
    for key in keys:
        inner = table.get(key, {})
        if isinstance(inner, str):  # a plugin chosen by key: its options go beside the name
            inner = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: {key} is {inner!r}, which has no options to set")
        table[key] = inner
        table = inner
    table[last] = value


def parse_grid(axes: Iterable[str]) -> dict[str, list[Any]]:
    """``section.option=value,value,...`` for each axis; ``[a, b]`` gives the values as a TOML list.

    A comma in brackets or quotes is part of a value.
    """
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        path, equals, text = axis.partition("=")
        if not equals or not all(path.strip().split(".")) or not text.strip():
            raise ConfigError(f"{axis!r} is not an axis of a grid; write section.option=value,value, as in "
                              "sae.l1_coefficient=1,5")  # fmt: skip
        if path.strip() in grid:
            raise ConfigError([(path.strip(), "is an axis of the grid twice; give all its values in one")])
        whole = _parsed(text.strip())
        grid[path.strip()] = whole if isinstance(whole, list) else [_parsed(part.strip()) for part in _parts(text)]
    return grid


def _parts(text: str) -> list[str]:
    """``text`` cut at the commas that are neither in quotes nor in brackets."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def dump_config(
    config: TrainConfig | PretokenizeConfig, form: str = "toml", *, plugins: PluginManager | None = None
) -> str:
    """``config`` as ``toml``, ``yaml`` or ``json`` text, every plugin by its qualified key, for ``load_config``."""
    table = ConfigConverter(plugins or default_manager()).unstructure(config)
    if form == "json":
        return json.dumps(table, indent=2) + "\n"
    if form == "yaml":
        import yaml

        return str(yaml.safe_dump(table, sort_keys=False))
    import tomli_w

    return tomli_w.dumps(_without_null(table))


def _without_null(value: Any) -> Any:
    """TOML has no null: every option that may be None has None as its default, so leaving it out says the same."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def commented_toml(kind: str = "train", *, plugins: PluginManager | None = None) -> str:
    """The full default configuration of ``train`` or ``pretokenize`` as TOML, each option with its explanation."""
    default = TrainConfig() if kind == "train" else PretokenizeConfig(folder="contexts")
    manager = plugins or default_manager()
    lines = ["# Every option with its default. Options that are not set are shown as `# option =`."]
    _comment_class(default, (), manager, lines, "")
    return "\n".join(lines) + "\n"


def _comment_class(
    config: Any, path: tuple[str, ...], manager: PluginManager, lines: list[str], name: str, doc: str = ""
) -> None:
    """Append the table of ``config``: its own options first, then its sub-tables, as TOML wants it."""
    docs = field_docs(type(config))
    if path:
        lines += ["", *_comment(doc), f"[{'.'.join(path)}]"]
    if name:
        lines.append(f"name = {_toml(name)}")
    tables = []
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        chosen = ""
        kind = field.metadata.get(PLUGIN_KIND)
        if kind and isinstance(value, str) and attrs.fields(manager.get(kind, value).entry.config):
            chosen, value = value, manager.options(kind, value)
        if attrs.has(type(value)):
            tables.append((field.name, value, chosen))
            continue
        lines += _comment(docs.get(field.name, ""))
        lines.append(f"# {field.name} =" if value is None else f"{field.name} = {_toml(value)}")
    for field_name, value, chosen in tables:
        _comment_class(value, (*path, field_name), manager, lines, chosen, docs.get(field_name, ""))


def _comment(doc: str) -> list[str]:
    return [f"# {line.strip()}" for line in doc.splitlines() if line.strip()]


def _toml(value: object) -> str:
    import tomli_w

    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return tomli_w.dumps({"v": value})[4:].strip()
