"""What a run was given from memory, which its configuration cannot name: whoever goes by that would take another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saekit.errors import ConfigError, PlaceError
from saekit.files.paths import as_path
from saekit.files.storage import read_json
from saekit.runs.place import RECORD

__all__ = ["IN_MEMORY", "OPTIONS", "check_config_names_all", "from_memory", "unnamed"]

IN_MEMORY = ("model", "dataset")
"""What :func:`saekit.train` takes from memory."""
OPTIONS = {"model": "model.name", "dataset": "dataset.path"}
"""The options in the place of which that is."""
_CONFIG = "config.toml"
_OF_RECORD = {"format", "saes", "in_memory"}
"""What every record has: a file that has one of these or none, perhaps by chance, is something else."""


def from_memory(home: Path) -> tuple[str, ...]:
    """Of the run of which ``home`` has the ``config.toml``, alone or as one of several: ``model``, ``dataset``.

    Nothing where there is no run.  :class:`PlaceError` where its record cannot be read.  Another ``run.json``, and the
    record of other SAEs in the folder above, say nothing.
    """
    whole = home.resolve()
    for folder, own in ((whole, "."), (whole.parent, whole.name)):
        record = _record(folder / RECORD, own)
        if record is None:
            continue
        try:
            kinds, homes = record["in_memory"], [*record["saes"].values()]
            if not all(kind in IN_MEMORY for kind in kinds):
                raise ValueError(f"in_memory holds {kinds!r}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PlaceError(f"{folder / RECORD} cannot be read: {type(error).__name__} {error}") from error
        if own in homes:
            return tuple(kinds)
    return ()


def _record(file: Path, own: str) -> Mapping[str, Any] | None:
    """What a run has written there; None: there is nothing, something else, or what is not of the SAE in ``own``."""
    if not file.is_file():
        return None
    try:
        table = read_json(file)
    except (OSError, ValueError) as error:
        if own != ".":  # in the folder above, where nothing says that it is of this one
            return None
        raise PlaceError(f"{file} cannot be read: {type(error).__name__} {error}") from error
    if not isinstance(table, Mapping) or len(table.keys() & _OF_RECORD) < 2:
        return None
    homes = table.get("saes")
    is_other = own != "." and not (isinstance(homes, Mapping) and own in homes.values())
    return None if is_other else table


def unnamed(
    source: object,
    overrides: Iterable[str] = (),
    *,
    model: object | None = None,
    dataset: object | None = None,
    kinds: Iterable[str] = IN_MEMORY,
) -> list[tuple[str, str]]:
    """Options of the ``config.toml`` of a run, each with why it is not what the run had: that came from memory.

    Nothing of other sources, of ``kinds`` that are not needed, and of what is given anew: ``overrides``
    (``section.option=value``), ``model``, ``dataset``.
    """
    if not isinstance(source, (str, Path)) or as_path(source).name != _CONFIG:
        return []
    given: Mapping[str, Any] = {"model": model, "dataset": dataset}
    said = {override.partition("=")[0].strip() for override in overrides}
    needed = {kind for kind in kinds if given[kind] is None}
    return [*_unnamed(as_path(source), needed, said)]


def _unnamed(source: Path, needed: set[str], said: set[str]) -> Iterator[tuple[str, str]]:
    for kind in from_memory(source.parent):
        option = OPTIONS[kind]
        if kind not in needed or not said.isdisjoint((kind, option)):
            continue
        what = "a name or a folder" if kind == "model" else "a file or a name"
        yield (
            option,
            f"is not what this run was trained with: its {kind} came from memory, which a configuration cannot name. "
            f"Give {kind}=... from Python, or {option}=... ({what}) after the configuration",
        )


def check_config_names_all(
    source: object,
    overrides: Iterable[str] = (),
    *,
    model: object | None = None,
    dataset: object | None = None,
    kinds: Iterable[str] = IN_MEMORY,
) -> None:
    """:class:`ConfigError` for what :func:`unnamed` finds."""
    if problems := unnamed(source, overrides, model=model, dataset=dataset, kinds=kinds):
        raise ConfigError(problems, str(source))
