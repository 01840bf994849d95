"""Configuration files: TOML, YAML and JSON in, dotted overrides on top, commented TOML out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import attrs

from saekit.config import PretokenizeConfig, TrainConfig
from saekit.config.converter import ConfigConverter
from saekit.config.describe import field_docs
from saekit.config.fields import PLUGIN_KIND
from saekit.config.formats import READERS, read_toml, toml_value, write
from saekit.config.merging import MOST_KEYS, Place, in_order, set_option, tables, undotted
from saekit.config.sae_lens_names import is_run_of_sae_lens, is_sae_alone
from saekit.config.values import shown, too_nested
from saekit.config.writing import plain_table
from saekit.errors import ConfigError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager, default_manager

__all__ = [
    "apply_overrides",
    "commented_toml",
    "dump_config",
    "in_a_file",
    "load_config",
    "load_configs",
    "parse_grid",
    "plain_config",
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
    return load_configs([source], overrides, plugins=plugins, kind=kind)[0]


def load_configs(
    sources: Iterable[Any], overrides: Iterable[str] = (), *, plugins: PluginManager | None = None, kind: type[C]
) -> list[C]:
    """Several configurations, each as :func:`load_config` reads it."""
    tables = [_read(source, kind) for source in sources]  # to see that one is not there needs no plugins
    plugins, overrides = plugins or default_manager(), list(overrides)
    converter = ConfigConverter(plugins)
    return [_loaded(table, name, overrides, converter, kind) for table, name in tables]


def _read(source: Any, kind: type) -> tuple[Any, str]:
    """What ``source`` holds, and what to call it."""
    if isinstance(source, (str, Path)):
        return read_table(as_path(source)), str(source)
    if not isinstance(source, (kind, Mapping)):
        raise ConfigError(
            f"expected a {kind.__name__}, a dict or the path of a configuration file, found {type(source).__qualname__}"
        )
    return source, "the configuration"


def _loaded(table: Any, name: str, overrides: list[str], converter: ConfigConverter, kind: type[C]) -> C:
    if isinstance(table, Mapping) and is_sae_alone(table):
        raise ConfigError(
            f"{name} is what an SAE states about itself (cfg.json), and no configuration of a run: saekit.SAE.load("
            "FOLDER) reads it with its weights, and training.from_pretrained_path=FOLDER starts a run from it"
        )
    if isinstance(table, Mapping) and is_run_of_sae_lens(table):
        file = "FILE" if name == "the configuration" else name
        raise ConfigError(
            f"{name} is that of a run of sae-lens, where options are called otherwise: `saekit convert-config {file} "
            "run.toml` turns it into one of saekit"
        )
    if overrides:
        name += "" if name == "the configuration" else ", with the changes that were given"
        table = apply_overrides(table, overrides, kind=kind, plugins=converter.plugins)
    elif not too_nested(table):  # which is told when it is read
        table = undotted(table, Place(kind, converter.plugins))
    return converter.structure(table, kind, name)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file."""
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for names that no file can have
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if _is_folder(path.parent) else []
        hint = f"; in that folder there are {', '.join(beside)}" if beside else ""
        raise ConfigError(f"there is no configuration file {path}{hint}. `saekit config > run.toml` writes one")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path} is not a configuration file: the name must end in {', '.join(READERS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = reader(text) if text.strip() else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        twice = "Cannot declare" in str(error) or "Cannot mutate" in str(error)
        hint = ". A section is begun once: write all its options below one [section]" if twice else ""
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}{hint}") from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply, as no configuration is") from None
    if not text.strip():  # as a command that failed leaves it, whose output went there
        raise ConfigError(
            f"{path} is empty: it has no option. Was it to be written by a command that failed? `saekit config > "
            "run.toml` writes one with all defaults, and defaults need no file: `saekit train sae.name=topk`"
        )
    table = {} if table is None else table  # comments alone in YAML
    if not isinstance(table, dict):
        raise ConfigError(f"{path} must hold a table of sections, found {type(table).__name__}")
    return table


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - as above


def apply_overrides(
    table: object,
    overrides: Iterable[str],
    *,
    kind: type | None = None,
    plugins: PluginManager | None = None,
) -> dict[str, Any]:
    """A copy of ``table`` (or of a configuration, as a table) with ``section.option=value`` set.

    Values are TOML; what is not TOML is a text.  A plugin comes before its options, in whatever order they are given.

    ``kind`` is the class that the table is of: a table that is given for one of its sections (``training={lr=3}``)
    leaves the rest of the section as it is.
    """
    plugins, overrides = plugins or default_manager(), list(overrides)
    if problem := too_nested(table):
        raise ConfigError(f"the configuration {problem}")
    changes = []
    for number, override in enumerate(overrides):
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            how = _in_one_word(overrides, number) or "write section.option=value, as in training.lr=1e-4"
            raise ConfigError(f"{override!r} is not an override; {how}")
        if len(keys) > MOST_KEYS:
            raise ConfigError(f"{shown(override)} is not an override: no option lies {len(keys)} levels deep")
        changes.append((path.strip(), _parsed(text.strip())))
    result: dict[str, Any] = tables(undotted(table, Place(kind, plugins)), plugins)
    for path, value in in_order(changes):
        set_option(result, path, value, Place(kind, plugins))
    return result


def _in_one_word(overrides: Sequence[str], number: int) -> str | None:
    """What to write where the override of that number is part of one with spaces, as a shell gives ``lr = 1e-4``."""
    first = number - 1 if number and overrides[number - 1].rstrip().endswith("=") else number
    spaced = re.match(r"([^\s=]+)(?:\s+=\s*|=\s+)(\S*)", " ".join(overrides[first : first + 3]))
    return None if spaced is None else f"write it without spaces: {spaced[1]}={spaced[2] or 'value'}"


def in_a_file(override: str) -> str:
    """Where ``section.option=value`` goes in a TOML file, in words."""
    path, _, text = override.partition("=")
    section, _, name = path.strip().rpartition(".")
    return f"{name} = {toml_value(_parsed(text.strip()))}" + (f" below [{section}]" if section else "")


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


def parsed_choice(text: str, option: str) -> str | dict[str, Any]:
    """A plugin by its key, or as a table, ``{name="KEY", option=value}``, as overrides have it.

    :class:`ConfigError`, of ``option``, for a table that is none.
    """
    found = _parsed(text) if text.lstrip().startswith("{") else text
    if isinstance(found, dict) or not text.lstrip().startswith("{"):
        return found
    raise ConfigError([(option, f"is {text!r}, which is no table of TOML; expected a key, or options with it, as in "
                        "'{name=\"KEY\",option=value}'")])  # fmt: skip


def _parsed(text: str) -> Any:
    try:
        read = read_toml(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if set(read) == {"value"} else text  # a line break in a text begins no other option


def dump_config(
    config: TrainConfig | PretokenizeConfig,
    form: str = "toml",
    *,
    plugins: PluginManager | None = None,
    full: bool = False,
) -> str:
    """``config`` as ``toml``, ``yaml`` or ``json`` text, every plugin by its qualified key, for ``load_config``.

    ``full`` writes the options of every plugin of a loaded configuration, those that nobody has given, too.
    """
    return write(plain_config(config, plugins or default_manager(), spare=form == "toml", full=full), form)


def plain_config(config: object, plugins: PluginManager, *, spare: bool = False, full: bool = False) -> dict[str, Any]:
    """A configuration as plain data, every plugin by its qualified key; those that are bound are not looked up.

    ``spare`` leaves out the options that are None and are None by default: some formats have no null.  ``full`` is as
    for :func:`dump_config`.
    """
    return plain_table(config, lambda kind, choice: plugins.find(kind, choice).key, spare=spare, full=full)


def commented_toml(
    config: TrainConfig | PretokenizeConfig | str = "train", *, plugins: PluginManager | None = None
) -> str:
    """``config`` as TOML, each option with its explanation, those of the chosen plugins, too, for ``load_config``.

    ``"train"`` and ``"pretokenize"`` stand for the defaults.
    """
    defaults = {"train": TrainConfig(), "pretokenize": PretokenizeConfig(folder="contexts")}
    wanted = defaults[config] if isinstance(config, str) else config
    lines = ["# Every option. Those that are not set are shown as `# option =`."]
    _comment_class(wanted, (), plugins or default_manager(), lines, "")
    return "\n".join(lines) + "\n"


def _comment_class(
    config: Any, path: tuple[str, ...], manager: PluginManager, lines: list[str], name: str, doc: str = ""
) -> None:
    """Append the table of ``config``: its own options first, then its sub-tables, as TOML wants it."""
    docs = field_docs(type(config))
    if path:
        lines += ["", *_comment(doc), f"[{'.'.join(path)}]"]
    if name:
        lines.append(f"name = {toml_value(name)}")
    plain = plain_config(config, manager)
    below = []
    for field in attrs.fields(type(config)):
        if field.name not in plain:  # another option takes its place
            continue
        value, chosen = getattr(config, field.name), ""
        kind = field.metadata.get(PLUGIN_KIND)
        if kind and value is not None and not isinstance(value, (list, tuple)):
            bound = manager.bound(kind, value)
            if bound.spelled or attrs.fields(type(bound.options)):
                chosen, value = bound.key, bound.options
        if attrs.has(type(value)):
            below.append((field.name, value, chosen))
        elif field.init:
            unset = value is None and field.default is None
            lines += _comment(docs.get(field.name, ""))
            lines.append(f"# {field.name} =" if unset else f"{field.name} = {toml_value(plain[field.name])}")
    for field_name, value, chosen in below:
        _comment_class(value, (*path, field_name), manager, lines, chosen, docs.get(field_name, ""))


def _comment(doc: str) -> list[str]:
    return [f"# {line.strip()}" for line in doc.splitlines() if line.strip()]
