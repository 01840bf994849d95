"""Several SAEs in one call: which, under what names, and in what they differ."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.abilities import EndsWithTraining
from saekit.config import PLUGIN_KIND, TrainConfig
from saekit.config.files import load_configs, plain_config, read_table
from saekit.config.merging import Place, in_order, set_option, tables, undotted
from saekit.config.values import plain, too_nested
from saekit.errors import ConfigError
from saekit.files.names import SWEEP_FILES, is_plain_name
from saekit.files.paths import as_path
from saekit.kinds import ACTIVATION_SOURCES
from saekit.plugins.manager import PluginManager, default_manager
from saekit.site import Site

__all__ = [
    "changed_options",
    "check_together",
    "grid",
    "lane_key",
    "member_names",
    "short_names",
    "spelled_out",
    "value_text",
]

_COMMON = ("model.", "dataset.", "evals.split", "evals.held_out_every", "checkpoints.", "reports.", "distributed.")
"""What SAEs that train together cannot differ in."""
_LONGEST_NAME = 100


def grid(
    cfg: TrainConfig | Mapping[str, Any] | str | Path,
    axes: Mapping[str, Iterable[Any]],
    *,
    plugins: PluginManager | None = None,
) -> list[TrainConfig]:
    """``cfg`` with every combination of the values of ``axes``, by dotted option; the last axis changes fastest.

    ``saekit.grid("run.toml", {"sae.l1_coefficient": [1, 5], "training.lr": [1e-4, 3e-4]})`` gives four, for
    :func:`saekit.train`.  A plugin is an axis too (``"lr_schedule": ["constant", CosineConfig(end=1e-5)]``), and so are
    its options (``"lr_schedule.end"``).  :class:`ConfigError` says which axis or option is wrong.
    """
    plugins = plugins or default_manager()
    table = cfg if isinstance(cfg, (TrainConfig, Mapping)) else read_table(as_path(cfg))
    if problem := too_nested(table):
        raise ConfigError(f"the configuration {problem}")
    table = undotted(table, Place(TrainConfig, plugins))
    values = {path: _axis(path, axis) for path, axis in axes.items()}
    points = []
    for point in itertools.product(*values.values()):
        changed = tables(table, plugins)
        for path, value in in_order(zip(values, point, strict=True)):
            set_option(changed, path, tables(value, plugins), Place(TrainConfig, plugins))
        points.append(changed)
    return load_configs(points, plugins=plugins, kind=TrainConfig)


def _axis(path: str, values: Iterable[Any]) -> list[Any]:
    values = plain(values)
    listed = [] if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable) else list(values)
    if not listed:
        raise ConfigError([(path, f"an axis of a grid needs a list of values, found {values!r}")])
    return listed


def spelled_out(
    config: object, plugins: PluginManager, prefix: str = "", table: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every option by its dotted path as plain data: a plugin's key at its own path, and its options below that.

    ``table`` is ``config`` as plain data, where that is there already.
    """
    table = plain_config(config, plugins) if table is None else table
    found: dict[str, Any] = {}
    for field in attrs.fields(type(config)):  # type: ignore[arg-type]
        if not field.init or field.name not in table:
            continue
        path, value = prefix + field.name, getattr(config, field.name)
        kind = field.metadata.get(PLUGIN_KIND)
        if kind is not None and value is not None and not isinstance(value, tuple):
            choice = plugins.bound(kind, value)
            found[path] = choice.key
            found |= spelled_out(choice.options, plugins, f"{path}.", table[field.name] if choice.spelled else None)
        elif attrs.has(type(value)):
            found |= spelled_out(value, plugins, f"{path}.", table[field.name])
        else:
            found[path] = table[field.name]
    return found


def lane_key(config: TrainConfig, plugins: PluginManager) -> str:
    """What decides the batches, among configurations that share a model and a text."""
    source = plugins.bound(ACTIVATION_SOURCES, config.activations.source)
    options = spelled_out(source.options, plugins)
    chosen = config.tokens if config.tokens.chooses else None
    batches = [source.key, options, config.training.train_batch_size_tokens, config.training.seed, chosen]
    if isinstance(source.options, EndsWithTraining) and source.options.ends_with_training:
        batches.append(config.training.total_tokens)
    return repr(batches)


def changed_options(configs: Sequence[TrainConfig], plugins: PluginManager) -> list[dict[str, Any]]:
    """For each configuration, the options that tell it from the others; None: not an option of its plugins.

    Where plugins differ, these are their keys, and of their options those that are not their defaults somewhere.
    """
    tables = [spelled_out(config, plugins) for config in configs]
    telling = {path for options in _naming_options(configs, plugins) for path in options}
    return [{path: table.get(path) for path in _changed(tables) if path in telling} for table in tables]


def _changed(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths at which the options are not all alike."""
    paths = dict.fromkeys(path for table in tables for path in table)
    paths.pop("checkpoints.name", None)
    return [path for path in paths if any(table.get(path) != tables[0].get(path) for table in tables)]


def _naming_options(configs: Sequence[TrainConfig], plugins: PluginManager) -> list[dict[str, Any]]:
    """For each configuration, what tells it from the others: of another plugin, only what is not its default."""
    tables = [spelled_out(config, plugins) for config in configs]
    changed = _changed(tables)
    found = []
    for config, table in zip(configs, tables, strict=True):
        implied = _defaults(config, plugins)
        found.append({
            path: table[path]
            for path in changed
            if path in table
            and not (table[path] == implied.get(path, _NO_DEFAULT) and any(_below(path, other) for other in changed))
        })  # fmt: skip
    return found


def _below(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


_NO_DEFAULT = object()


def _defaults(config: object, plugins: PluginManager, prefix: str = "") -> dict[str, Any]:
    """By dotted path, what the options of the chosen plugins are where nothing is said of them."""
    found: dict[str, Any] = {}
    for field in attrs.fields(type(config)):  # type: ignore[arg-type]
        path, value = prefix + field.name, getattr(config, field.name)
        kind = field.metadata.get(PLUGIN_KIND)
        if kind is not None and value is not None and not isinstance(value, tuple):
            cls = type(plugins.bound(kind, value).options)
            with contextlib.suppress(Exception):  # one that has no options without some that are stated
                found |= spelled_out(cls(), plugins, f"{path}.")
        elif attrs.has(type(value)):
            found |= _defaults(value, plugins, f"{path}.")
    return found


def check_together(configs: Sequence[TrainConfig], plugins: PluginManager) -> None:
    """:class:`ConfigError` names what SAEs that train together cannot differ in."""
    if len(configs) < 2:
        return
    first, *others = [
        {
            path: value
            for path, value in spelled_out(config, plugins).items()
            if path.startswith(_COMMON) and path != "checkpoints.name"
        }
        for config in configs
    ]
    problems: dict[str, str] = {}
    for other in others:
        for path in dict.fromkeys([*first, *other]):
            if (one := first.get(path)) != (two := other.get(path)):
                problems.setdefault(
                    path, f"differs between SAEs that are to be trained together ({one!r} and {two!r}); train them "
                    "in runs of their own"
                )  # fmt: skip
    if problems:
        raise ConfigError(list(problems.items()))


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """For each dotted path the shortest end of it that no other has."""
    paths = list(paths)
    ends = {path: [path.split(".")[-n:] for n in range(1, path.count(".") + 2)] for path in paths}
    return {
        path: ".".join(
            next(
                (end for end in ends[path] if not any(end in ends[other] for other in paths if other != path)),
                ends[path][-1],
            )
        )
        for path in paths
    }


def member_names(configs: Sequence[TrainConfig], plugins: PluginManager) -> tuple[str | None, list[str]]:
    """The name of the sweep's folder, if the configurations agree on one, and a name for each SAE in it.

    Configurations with different ``checkpoints.name`` name the SAEs; else the changed options do.
    """
    given = [config.checkpoints.name for config in configs]
    if len(set(given)) == 1:
        width, naming = len(str(len(configs) - 1)), _naming_options(configs, plugins)
        labels = short_names(dict.fromkeys(path for options in naming for path in options))
        return given[0], [
            _name(f"{index:0{width}}", [f"{labels[path]}={value_text(value)}" for path, value in options.items()])
            for index, options in enumerate(naming)
        ]
    if None in given or len(set(given)) < len(given):
        raise ConfigError(
            [("checkpoints.name", "must be the same for all, to name the sweep, or different for all, to name each "
              f"SAE; found {', '.join(map(repr, given))}")]
        )  # fmt: skip
    names = [str(name) for name in given]
    if wrong := [name for name in names if not _names_a_folder(name)]:
        raise ConfigError([("checkpoints.name", f"names a folder in that of the sweep, which {wrong[0]!r} cannot")])
    return None, names


def _names_a_folder(name: str) -> bool:
    """Whether the folder of a sweep may hold a folder of this name."""
    fine = re.fullmatch(r"[\w=+-][\w.=+-]*", name) and is_plain_name(name) and len(name.encode()) <= 200
    return bool(fine) and name.casefold() not in SWEEP_FILES


def _name(number: str, options: Sequence[str]) -> str:
    """``number`` and as many of ``options`` as there is room for, none of them cut but a first one that is too long."""
    name = number
    for option in options:
        longer = name + "_" + re.sub(r"[^\w.=+-]+", "-", option, flags=re.ASCII).rstrip("-._")
        if len(longer) > _LONGEST_NAME and name != number:
            break
        name = longer
    return name[:_LONGEST_NAME].rstrip("-._")


def value_text(value: Any) -> str:
    """As short as it can be without saying something else."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "hook_name" in item for item in value):
        return "+".join(Site(**item).name for item in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
