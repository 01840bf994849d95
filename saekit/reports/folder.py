"""What the folder of a run says of it, finished or not, whole or not.  Nothing here imports torch or a plugin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import attrs

from saekit.errors import StorageError
from saekit.files.names import SAE_CONFIG, is_plain_name
from saekit.files.paths import folder_of
from saekit.files.storage import is_locked, read_json
from saekit.reports.history import History, read_history
from saekit.reports.numbers import duration
from saekit.reports.options import Options
from saekit.runs.checkpoints import Checkpoint, all_checkpoints
from saekit.runs.place import RECORD, check_is_run
from saekit.runs.record import RunRecord

__all__ = ["RunFolder", "SAERun", "State", "read_run"]

_FRESH = 60.0  # seconds; a run that has written so lately is at work, where that cannot be seen otherwise


@attrs.frozen
class State:
    """How it stands with a run."""

    kind: Literal["running", "finished", "interrupted", "diverged", "failed", "stopped"]
    """``stopped``: it did not say how it ended, as one does not that is killed."""
    reason: str = ""
    """In words, where there is more to say."""
    at_work: bool = False
    """Whether a process is in the folder."""
    age: float = 0.0
    """Seconds since it has written anything, by the clock of this machine."""

    @property
    def outcome(self) -> str:
        """How it ended, in a line, which stays true."""
        return self.kind if not self.reason else f"{self.kind}: {self.reason}"

    @property
    def text(self) -> str:
        """How it stands now, in a line."""
        line = self.outcome
        return f"{line} (a process is at work in the folder)" if self.at_work and self.kind != "running" else line


@attrs.define(slots=False, eq=False)
class SAERun:
    """One SAE of a run: what it was to be, and what was logged of it."""

    name: str
    home: Path
    """Its folder: ``config.toml``, the metrics and, at the end, ``sae/``."""
    options: Options
    record: RunRecord | None = None
    """That of its run, where there is one."""
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    """What the newest checkpoint says of it."""
    why_diverged: str | None = None
    last: int | None = None
    """So many bytes of the metrics are read, at their end; None: all."""

    @cached_property
    def history(self) -> History:
        """What was logged; :class:`StorageError` where that cannot be read."""
        return read_history(self.metrics, last=self.last)

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        name = self.options.metrics_file
        return self.home / (name if is_plain_name(name) else "metrics.jsonl")

    @property
    def tokens(self) -> float:
        """Activation vectors that it was trained on."""
        total, trained = self.options.total_tokens, max(self.history.tokens, self._told("tokens"))
        return min(trained, total) if total else trained

    @property
    def step(self) -> int:
        """Steps that it was trained for, as far as they were logged or are in a checkpoint."""
        return max(self.history.step, self._told("step"))

    def _told(self, name: str) -> int:
        """What the newest checkpoint counts, which may be later than what was logged."""
        count = self.facts.get(name)
        return count if isinstance(count, int) else 0

    @cached_property
    def d_sae(self) -> int | None:
        """How many features it has, where that is known."""
        places = [self.saved.get("d_sae"), self.facts.get("d_sae"), self.options.whole("sae.d_sae")]
        return next((value for value in places if isinstance(value, int) and value > 0), None)

    @cached_property
    def saved(self) -> Mapping[str, Any]:
        """The ``cfg.json`` of the SAE at the end of training; nothing before."""
        try:
            table = read_json(self.home / "sae" / SAE_CONFIG)
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, Mapping) else {}

    @property
    def what(self) -> str:
        """What is trained, in words: ``topk, 1,024 features``."""
        parts = [self.options.architecture or "an SAE", f"{self.d_sae:,} features" if self.d_sae else ""]
        return ", ".join(part for part in parts if part)

    @property
    def where(self) -> str:
        """On what: ``blocks.8.hook_resid_post of gpt2-small``."""
        model = self.model
        if model.count("/") > 1 or model[:1] in ("/", "~", "."):  # a folder, of which the name is enough
            model = model.rstrip("/").rpartition("/")[2]
        return " of ".join(part for part in (self.options.site, model) if part)

    @property
    def model(self) -> str:
        """The name of the language model, as it calls itself; empty where there is none."""
        if self.record is not None and self.record.model is not None:
            return self.record.model
        return self.options.text("model.name")

    @property
    def text(self) -> str:
        """The text that it is trained on; empty where there is none, since there is no model."""
        if self.record is not None and "dataset" in self.record.in_memory:
            return "a dataset from memory"
        return self.options.text("dataset.path") if self.model else ""


@attrs.define(slots=False, eq=False)
class RunFolder:
    """A run, of one SAE or of several."""

    folder: Path
    saes: Mapping[str, SAERun]
    sweep: bool
    """Whether each SAE has a folder of its own."""
    state: State
    problems: tuple[str, ...] = ()
    """What of it is broken, in words."""

    @property
    def alone(self) -> SAERun:
        """The one SAE of a run that is no sweep."""
        (sae,) = self.saes.values()
        return sae

    def picture(self, name: str) -> Path | None:
        """The path of a picture, if it is there."""
        path = self.folder / name
        return path if path.is_file() else None


def read_run(folder: str | Path, *, last: int | None = None) -> RunFolder:
    """The run in ``folder``, or one SAE of a sweep in its own folder; whatever there is of it.

    What :func:`saekit.train` returned stands for its folder.  ``last``: so many bytes at the end of each file of
    metrics are enough.  :class:`PlaceError` where there is no run.
    """
    folder = folder_of(folder)
    if not (folder / RECORD).exists() and (folder / "config.toml").is_file():
        return _one_of_several(folder, last)
    check_is_run(folder)
    record = RunRecord.read(folder)
    newest = _newest(folder)
    about = {} if newest is None else newest.facts["saes"]
    saes = {}
    for name in record.saes:
        facts = about.get(name, {})
        why = record.diverged.get(name, facts.get("diverged"))
        home = record.home(name)
        saes[name] = SAERun(name, home, Options.read(home / "config.toml"), record, facts, why, last)
    state = _state(record, saes, newest is not None and newest.facts["finished"])
    problems = [sae.options.problem for sae in saes.values() if sae.options.problem is not None]
    return RunFolder(folder, saes, list(record.saes.values()) != ["."], state, tuple(problems))


def _one_of_several(folder: Path, last: int | None) -> RunFolder:
    """The SAE in its own folder below that of a sweep."""
    name = folder.resolve().name
    sae = SAERun(name, folder, Options.read(folder / "config.toml"), last=last)
    try:
        whole = read_run(folder.resolve().parent, last=last)
        sae, state = whole.saes[name], whole.state
        sae.home = folder
    except (StorageError, KeyError):
        state = State("finished" if sae.saved else "stopped")
    if sae.why_diverged is not None:
        state = State("diverged", sae.why_diverged)
    return RunFolder(folder, {name: sae}, False, state, (sae.options.problem,) if sae.options.problem else ())


def _newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that says anything."""
    for path in all_checkpoints(folder):
        try:
            return Checkpoint.open(path)
        except StorageError:  # it is damaged, or just being removed
            continue
    return None


def _state(record: RunRecord, saes: Mapping[str, SAERun], finished: bool) -> State:
    locked, age = is_locked(record.folder), _age(record, saes)
    if record.end is not None:
        return State(record.end.status, record.end.reason, locked is True, age)
    if locked:
        return State("running", "", True, age)
    if finished:
        return State("finished", "", False, age)  # by a saekit that did not write it down
    here = "" if locked is None else ", and no process of this machine is in the folder"
    return State("running" if age < _FRESH else "stopped", f"it has written {duration(age)} ago{here}", False, age)


def _age(record: RunRecord, saes: Mapping[str, SAERun]) -> float:
    """Seconds since the run has written anything, by the clock of this machine."""
    newest = 0.0
    for path in (record.folder / RECORD, *(sae.metrics for sae in saes.values())):
        try:
            newest = max(newest, path.stat().st_mtime)
        except OSError:
            continue
    return max(time.time() - newest, 0.0)
