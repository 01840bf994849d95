"""Relative paths of a run, which are of the folder in which it was started, where somebody goes on from another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saekit.config import TrainConfig
from saekit.files.paths import here
from saekit.files.storage import read_json
from saekit.plugins.manager import PluginManager
from saekit.runs.place import RECORD
from saekit.runs.sweep import spelled_out

__all__ = ["away", "start_of", "started_in"]

_OPTIONS = ("model.name", "dataset.path", "dataset.data_files")
_SOURCE = "activations.source."


def started_in(home: Path) -> Path | None:
    """Where the run was started of which ``home`` is the folder, or that of one of its SAEs; None: nobody knows."""
    for folder in (home.resolve(), home.resolve().parent):
        try:
            said = read_json(folder / RECORD)["started_in"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(said, str) and Path(said).is_absolute():
            return Path(said)
    return None


def start_of(configs: Iterable[TrainConfig], plugins: PluginManager, given_in: Path | None) -> str | None:
    """``given_in``, where a configuration names something that is in it by a relative path; else None."""
    if given_in is None:
        return None
    paths = (path for config in configs for _, path in _paths(spelled_out(config, plugins)))
    return str(given_in) if any(_is_in(given_in, path) for path in paths) else None


def away(config: TrainConfig, plugins: PluginManager, start: Path | None) -> dict[str, str]:
    """Options that name what is below ``start`` and not in the working directory, each with what is to be done."""
    if start is None or start == here():
        return {}
    return {
        option: _told(path, start)
        for option, path in _paths(spelled_out(config, plugins))
        if _is_in(start, path) and not Path(path).exists()
    }


def _paths(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What may be paths, by the options that say them."""
    for option, value in options.items():
        if option in _OPTIONS or option.startswith(_SOURCE):
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from ((option, path) for path in values if isinstance(path, str) and path)


def _is_in(folder: Path, path: str) -> bool:
    try:
        return not Path(path).is_absolute() and (folder / path).exists()
    except (OSError, ValueError):  # no file can have that name
        return False


def _told(path: str, start: Path) -> str:
    return (
        f"is {path!r}, in the folder {str(start)!r} in which the run was started, and there is none of that "
        "name here. Go there first (cd)"
    )
