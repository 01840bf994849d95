"""Configurations of other libraries' runs, by the loaders that know them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from saekit.abilities import ConvertsConfigs
from saekit.cautions import warn
from saekit.config import TrainConfig
from saekit.config.files import load_config
from saekit.converted import ConvertedConfig
from saekit.errors import ConfigError, PluginFailedError, PluginWarning
from saekit.files.paths import as_path
from saekit.files.storage import write_text
from saekit.kinds import PRETRAINED_LOADERS
from saekit.plugins.building import blamed, built, returned
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.registry import Registered
from saekit.pretrained.detecting import usable
from saekit.reasons import error_text

__all__ = ["convert_config", "write_new"]


def convert_config(table: Mapping[str, Any], *, plugins: PluginManager | None = None) -> ConvertedConfig:
    """What ``table``, the configuration of another library's run, is here.

    The loaders are asked that can tell (:class:`saekit.abilities.ConvertsConfigs`), and what comes out is loaded once,
    so that it can be.  :class:`ConfigError` for what none of them knows, and for what has no meaning here.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"expected a table of options, found {type(table).__name__}")
    if "saekit" in table or {"training", "site"} <= table.keys():
        raise ConfigError("this is saekit's own already, and needs no conversion")
    plugins = plugins or default_manager()
    found, asked, failed = {}, [], []
    for item in plugins.registry(PRETRAINED_LOADERS).items:
        try:
            if usable(item) and isinstance(loader := built(item, None), ConvertsConfigs):
                asked.append(item.key)
                if (said := _converted(item, loader, table)) is not None:
                    found[item.key] = said
        except PluginFailedError as error:  # which stops no other loader
            failed.append(error)
    if failed and not found:
        raise failed[0]
    for failure in failed:
        warn(error_text(failure), PluginWarning)
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(found)} both know this configuration; leave one out (SAEKIT_DISABLE_PLUGINS=DISTRIBUTION)"
        )
    if not found:
        known = ", ".join(sorted(asked)) or "nobody's"
        raise ConfigError(
            f"this is no configuration of a run that can be converted: those of {known} can, and none of them knows "
            "its keys. Expected the file that the library saves of a run's options"
        )
    (converted,) = found.values()
    table = _qualified(converted.table, load_config(dict(converted.table), plugins=plugins))
    order = [field.name for field in attrs.fields(TrainConfig)]
    return attrs.evolve(converted, table={name: table[name] for name in sorted(table, key=order.index)})


def _qualified(table: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """``table`` with the qualified keys of the plugins that it chooses, as ``config``, which it was loaded as, has
    them."""
    own = {field.name: getattr(config, field.name) for field in attrs.fields(type(config))}
    return {name: _value(value, own[name]) if name in own else value for name, value in table.items()}


def _value(value: Any, own: Any) -> Any:
    if isinstance(own, Choice):
        if isinstance(value, Mapping):
            return {"name": own.key} | _qualified(
                {key: one for key, one in value.items() if key != "name"}, own.options
            )
        return own.key if isinstance(value, str) else value
    if isinstance(value, list) and isinstance(own, tuple) and len(value) == len(own):
        return [_value(*both) for both in zip(value, own, strict=True)]
    return _qualified(value, own) if isinstance(value, Mapping) and attrs.has(type(own)) else value


def _converted(item: Registered, loader: ConvertsConfigs, table: Mapping[str, Any]) -> ConvertedConfig | None:
    with blamed(item, "convert_config"):
        said = loader.convert_config(table)
    if said is not None and not isinstance(said, ConvertedConfig):
        raise returned(item, "convert_config", said, "expected a saekit.converted.ConvertedConfig, or None")
    return said


def write_new(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to the file ``path``, all or nothing.

    :class:`ConfigError` if there is one, :class:`saekit.errors.StorageError` if it cannot be written.
    """
    target = as_path(path)
    if os.path.lexists(target):
        raise ConfigError(f"{path} is there already; choose another name, or remove it")
    write_text(target, text)
    return target
