"""What a run folder says of itself, so that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from saekit.config import TrainConfig
from saekit.config_files import dump_config, load_config
from saekit.converter import ConfigConverter
from saekit.errors import StorageError
from saekit.manager import PluginManager
from saekit.storage import write_text

__all__ = ["RunRecord", "differences"]

RECORD, CONFIG = "run.json", "config.toml"
FORMAT = 1


@attrs.frozen
class RunRecord:
    """A run folder: the SAEs that train in it, and what came from memory and so has to be given again."""

    folder: Path
    saes: Mapping[str, str]
    """The folder of each SAE below ``folder``; ``.`` for one that is alone."""
    in_memory: tuple[str, ...] = ()
    """``model``, ``dataset``."""

    def home(self, name: str) -> Path:
        """The folder of an SAE: its ``config.toml``, ``metrics.jsonl`` and, at the end, ``sae/``."""
        return self.folder / self.saes[name]

    def write(self, configs: Mapping[str, TrainConfig], plugins: PluginManager) -> None:
        """Write the folders of all SAEs, their configurations, and the record."""
        for name, config in configs.items():
            try:
                self.home(name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make the folder {self.home(name)}: {error.strerror}") from error
            write_text(self.home(name) / CONFIG, dump_config(config, plugins=plugins))
        table = {"format": FORMAT, "saes": dict(self.saes), "in_memory": list(self.in_memory)}
        write_text(self.folder / RECORD, json.dumps(table, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record in ``folder``; :class:`StorageError` when it is not a run folder."""
        path = folder / RECORD
        if not path.is_file():
            if not folder.exists():
                raise StorageError(f"there is no folder {folder}; a run prints the name of its folder when it ends")
            near = sorted(found.parent.name for found in folder.glob(f"*/{RECORD}")) if folder.is_dir() else []
            hint = f" It holds the runs {', '.join(near)}." if near else ""
            raise StorageError(f"{folder} is not a run folder: there is no {RECORD} in it.{hint}")
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            if table["format"] != FORMAT:
                raise StorageError(f"{path} has format {table['format']!r}, expected {FORMAT}: update saekit to go on")
            return cls(folder, {str(k): str(v) for k, v in table["saes"].items()}, tuple(table["in_memory"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} cannot be read: {type(error).__name__} {error}") from error

    def configs(self, plugins: PluginManager) -> dict[str, TrainConfig]:
        """The configuration of every SAE, as it was written."""
        return {name: load_config(self.home(name) / CONFIG, plugins=plugins) for name in self.saes}


def differences(old: TrainConfig, new: TrainConfig, plugins: PluginManager) -> dict[str, tuple[Any, Any]]:
    """The dotted options in which two configurations differ, with both values."""
    converter = ConfigConverter(plugins)
    before, after = _flat(converter.unstructure(old)), _flat(converter.unstructure(new))
    return {
        path: (before.get(path), after.get(path))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    }


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
