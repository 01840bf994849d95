"""What a run folder says of itself, so that it can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from saekit.config import TrainConfig
from saekit.config.converter import ConfigConverter
from saekit.config.files import dump_config, read_table
from saekit.errors import PlaceError, StorageError
from saekit.files.names import RUN_FILES, SWEEP_FILES, fault_of_name
from saekit.files.paths import here, steady
from saekit.files.storage import check_file, leads_out, read_json, write_text
from saekit.plugins.manager import PluginManager
from saekit.runs.from_memory import IN_MEMORY, OPTIONS
from saekit.runs.place import RECORD, check_is_run
from saekit.runs.sweep import changed_options, spelled_out
from saekit.values import RunEnd

__all__ = ["RunRecord", "differences", "flat", "is_named"]

CONFIG = "config.toml"
FORMAT = 1


@attrs.frozen
class RunRecord:
    """A run folder: the SAEs that train in it, and what came from memory and so has to be given again."""

    _folder: Path
    saes: Mapping[str, str]
    """The folder of each SAE below ``folder``; ``.`` for one that is alone."""
    in_memory: tuple[str, ...] = ()
    """``model``, ``dataset``."""
    model: str | None = None
    """The name of the model, as it calls itself; empty where there is none, and None where an older saekit began."""
    checkpointed: bool = False
    """Whether a checkpoint to go on from was ever written; where there is none then, somebody has removed it."""
    end: RunEnd | None = None
    """How the run ended; None while it is at work, and of one that was killed."""
    diverged: Mapping[str, str] = attrs.field(factory=dict)
    """Why an SAE was stopped before that, by name."""
    used: Mapping[str, Any] = attrs.field(factory=dict)
    """What is used of the text, where that is not all: as in the SAEs' metadata."""
    changed: tuple[str, ...] | None = None
    """The options that tell the SAEs of a sweep apart; None where it does not say."""
    started_in: str | None = None
    """The working directory of :func:`saekit.train`, where the configuration has paths relative to it; None where an
    older saekit began, too."""

    _given_in: Path | None = attrs.field(factory=here, init=False, repr=False, eq=False)

    @property
    def folder(self) -> Path:
        """The run folder, wherever the process has gone since."""
        return steady(self._folder, self._given_in)

    def home(self, name: str) -> Path:
        """The folder of an SAE: its ``config.toml``, ``metrics.jsonl`` and, at the end, ``sae/``."""
        return self.folder / self.saes[name]

    def write(self, configs: Mapping[str, TrainConfig], plugins: PluginManager) -> None:
        """Write the folders of all SAEs, their configurations, and the record, of a run that has not ended."""
        for name, config in configs.items():
            try:
                self.home(name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make the folder {self.home(name)}: {error.strerror}") from error
            write_text(self.home(name) / CONFIG, self._unnamed() + dump_config(config, plugins=plugins))
        changed = tuple(changed_options(list(configs.values()), plugins)[0]) if len(configs) > 1 else None
        attrs.evolve(self, changed=changed)._save(ended=False)

    def _unnamed(self) -> str:
        """Lines for people, of what a configuration cannot name."""
        said = "# The {} of this run came from memory, and is not {}.\n"
        return "".join(said.format(kind, OPTIONS[kind]) for kind in self.in_memory)

    def _save(self, *, ended: bool = True) -> None:
        table: dict[str, Any] = {"format": FORMAT, "saes": dict(self.saes), "in_memory": list(self.in_memory)}
        if self.model is not None:
            table["model"] = self.model
        if self.started_in is not None:
            table["started_in"] = self.started_in
        if self.used:
            table["used"] = dict(self.used)
        if self.changed is not None:
            table["changed"] = list(self.changed)
        if self.checkpointed:
            table["checkpointed"] = True
        if ended and self.end is not None:
            table["end"] = {**attrs.asdict(self.end), "diverged": dict(self.diverged)}
        write_text(self.folder / RECORD, json.dumps(table, indent=1) + "\n")

    @classmethod
    def note_checkpoint(cls, folder: Path) -> None:
        """Say in the record in ``folder`` that there is a checkpoint by now."""
        record = cls.read(folder)
        if not record.checkpointed:
            attrs.evolve(record, checkpointed=True)._save()

    @classmethod
    def note_end(cls, folder: Path, end: RunEnd, diverged: Mapping[str, str]) -> None:
        """Say in the record in ``folder`` how its run has ended, and why SAEs were stopped before, by name."""
        attrs.evolve(cls.read(folder), end=end, diverged=dict(diverged))._save()

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record in ``folder``; :class:`StorageError` when it is not a run folder."""
        check_is_run(folder)
        path = folder / RECORD
        try:
            table = read_json(path)
            if table["format"] != FORMAT:
                raise PlaceError(f"{path} has format {table['format']!r}, expected {FORMAT}: update saekit to go on")
            checkpointed = table.get("checkpointed", False) is True
            saes = dict(table["saes"].items())
            model = table["model"] if isinstance(table.get("model"), str) else None
            used = table["used"] if isinstance(table.get("used"), dict) else {}
            memory, changed = tuple(table["in_memory"]), _changed_of(table)
            start = table["started_in"] if isinstance(table.get("started_in"), str) else None
            record = cls(
                folder, saes, memory, model, checkpointed, *_end_of(table), used=used, changed=changed, started_in=start
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlaceError(f"{path} cannot be read: {type(error).__name__} {error}") from error
        if fault := record._fault() or record.way_out():
            raise PlaceError(f"{path} is not as saekit writes it, or {folder} is not: {fault}. Nothing was changed")
        return record

    def way_out(self) -> str | None:
        """A link by which the run would write somewhere else than in its folder, in words."""
        return next(self._ways_out(), None)

    def _fault(self) -> str | None:
        """Why this may lead out of the folder, or is no record at all."""
        homes = list(self.saes.values())
        if not homes:
            return "it names no SAE"
        for name, home in self.saes.items():
            if fault := fault_of_name(name):
                return f"the name of the SAE {name!r} {fault}"
            if home != "." and (fault := fault_of_name(home)):
                return f"the folder {home!r} of the SAE {name} {fault}"
        if len(homes) > 1 and (wrong := [home for home in homes if home == "." or home.casefold() in SWEEP_FILES]):
            return f"the folder {wrong[0]!r} cannot be that of one SAE among several"
        if len(set(homes)) < len(homes):
            return "several SAEs have one folder"
        if wrong := [kind for kind in self.in_memory if kind not in IN_MEMORY]:
            return f"in_memory holds {wrong[0]!r}"
        return None

    def _ways_out(self) -> Iterator[str]:
        """Links among what a run writes by which it would write somewhere else."""
        homes = {self.folder, *(self.home(name) for name in self.saes)}
        places = [home / name for home in homes for name in ("", *RUN_FILES)]
        for inside, folders, files in os.walk(self.folder / "checkpoints"):
            every = (f"{inside}/{name}" for name in (*folders, *files))
            places += [Path(place) for place in every if os.path.islink(place)]  # noqa: PTH114 - there may be hundreds
        for place in places:
            if leads_out(place, self.folder):
                yield f"{place} is a symbolic link that leads out of it"

    def configs(self, plugins: PluginManager) -> dict[str, TrainConfig]:
        """The configuration of every SAE, as it was written; :class:`StorageError` where there is no such file."""
        for name in self.saes:
            try:
                check_file(self.home(name) / CONFIG)
            except OSError as error:
                raise StorageError(
                    f"{self.home(name) / CONFIG} cannot be read: {error.strerror}; put back the one that the run wrote"
                ) from error
        converter = ConfigConverter(plugins)
        tables = {name: as_of_today(read_table(self.home(name) / CONFIG)) for name in self.saes}
        return {name: converter.structure(tables[name], TrainConfig, str(self.home(name) / CONFIG)) for name in tables}


def as_of_today(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a run wrote as its configuration; early ones have a default ``site`` beside ``inputs``, for nothing."""
    return {name: value for name, value in table.items() if name != "site" or not table.get("inputs")}


def _end_of(table: Mapping[str, Any]) -> tuple[RunEnd | None, dict[str, str]]:
    """How a run says that it ended, and why SAEs were stopped; nothing that is not as saekit writes it."""
    end = table.get("end")
    if not isinstance(end, dict) or end.get("status") not in ("finished", "interrupted", "diverged", "failed"):
        return None, {}
    diverged = end.get("diverged")
    reasons = diverged.items() if isinstance(diverged, dict) else ()
    return RunEnd(end["status"], str(end.get("reason") or "")), {name: str(why) for name, why in reasons}


def _changed_of(table: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The options that a sweep says its SAEs differ in; None where it is not as saekit writes it."""
    changed = table.get("changed")
    return tuple(changed) if isinstance(changed, list) and all(isinstance(path, str) for path in changed) else None


def differences(old: TrainConfig, new: TrainConfig, plugins: PluginManager) -> dict[str, tuple[Any, Any]]:
    """The dotted options in which two configurations differ, with both values.

    A plugin's key is at its own path, and its options below that; where it is another, those tell nothing more.
    """
    before, after = spelled_out(old, plugins), spelled_out(new, plugins)
    found: dict[str, tuple[Any, Any]] = {}
    for path in dict.fromkeys([*before, *after]):
        if before.get(path) != after.get(path) and not is_named(path.rpartition(".")[0], found):
            found[path] = before.get(path), after.get(path)
    return found


def is_named(path: str, names: Collection[str]) -> bool:
    """Whether ``names`` have the option at ``path``, or a section that it lies in."""
    parts = path.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
