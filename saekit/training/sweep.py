"""Several SAEs in one call: which, under what names, and what came of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.config import TrainConfig
from saekit.config_files import load_config, read_table, set_option
from saekit.converter import ConfigConverter
from saekit.errors import ConfigError
from saekit.manager import PluginManager, default_manager
from saekit.training.record import differences

__all__ = ["changed_options", "grid", "member_names"]

_LONGEST_NAME = 100


def grid(
    cfg: TrainConfig | Mapping[str, Any] | str | Path,
    axes: Mapping[str, Sequence[Any]],
    *,
    plugins: PluginManager | None = None,
) -> list[TrainConfig]:
    """``cfg`` with every combination of the values of ``axes``, by dotted option; the last axis changes fastest.

    ``saekit.grid("run.toml", {"sae.l1_coefficient": [1, 5], "training.lr": [1e-4, 3e-4]})`` gives four, for
    :func:`saekit.train`.
    """
    plugins = plugins or default_manager()
    if isinstance(cfg, TrainConfig):
        table: Mapping[str, Any] = ConfigConverter(plugins).unstructure(cfg, qualify=False)
    else:
        table = cfg if isinstance(cfg, Mapping) else read_table(Path(cfg))
    if empty := [path for path, values in axes.items() if isinstance(values, str) or not len(values)]:
        raise ConfigError([(empty[0], f"an axis of a grid needs a list of values, found {axes[empty[0]]!r}")])
    configs = []
    for values in itertools.product(*axes.values()):
        changed: dict[str, Any] = _copied(table)
        for path, value in zip(axes, values, strict=True):
            set_option(changed, path, value)
        configs.append(load_config(changed, plugins=plugins))
    return configs


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def changed_options(configs: Sequence[TrainConfig], plugins: PluginManager) -> list[dict[str, Any]]:
    """For each configuration, the options in which they are not all alike."""
    paths: dict[str, Any] = {}
    for config in configs[1:]:
        for path, (first, _) in differences(configs[0], config, plugins).items():
            paths.setdefault(path, first)
    paths.pop("checkpoints.name", None)
    values = []
    for config in configs:
        own = differences(configs[0], config, plugins)
        values.append({path: own[path][1] if path in own else first for path, first in paths.items()})
    return values


def member_names(configs: Sequence[TrainConfig], plugins: PluginManager) -> tuple[str | None, list[str]]:
    """The name of the sweep's folder, if the configurations agree on one, and a name for each SAE in it.

    Configurations with different ``checkpoints.name`` name the SAEs; else the changed options do.
    """
    given = [config.checkpoints.name for config in configs]
    if len(set(given)) == 1:
        width = len(str(len(configs) - 1))
        return given[0], [
            _name(f"{index:0{width}}", changed) for index, changed in enumerate(changed_options(configs, plugins))
        ]
    if None in given or len(set(given)) < len(given):
        raise ConfigError(
            [("checkpoints.name", "must be the same for all, to name the sweep, or different for all, to name each "
              f"SAE; found {', '.join(map(repr, given))}")]
        )  # fmt: skip
    names = [str(name) for name in given]
    if wrong := [name for name in names if not re.fullmatch(r"[\w=+-][\w.=+-]*", name) or name == "checkpoints"]:
        raise ConfigError([("checkpoints.name", f"names a folder in that of the sweep, which {wrong[0]!r} cannot")])
    return None, names


def _name(number: str, changed: Mapping[str, Any]) -> str:
    parts = [number, *(f"{path.rpartition('.')[2]}={value}" for path, value in changed.items())]
    return re.sub(r"[^\w.=+-]+", "-", "_".join(parts))[:_LONGEST_NAME].rstrip("-._")
