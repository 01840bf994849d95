"""Tracker ``jsonl``: one JSON object per line, in the run folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import attrs

from saekit import Entry, RunInfo, hookimpl
from saekit.config import check, is_free_in_run
from saekit.files import hidden_name, parse_json
from saekit.values import Histogram, Metrics

_TAKEN = {"wandb", "wandb-run-id.txt"}
"""What else there may be in a run folder."""
_LONGEST = 200
_MAY_COME_AGAIN = 20_000  # records of the end of a run that goes on; more are never kept for a tracker


def _is_free(name: str) -> bool:
    room = len(name.encode("utf-8", "replace")) <= _LONGEST  # for the temporary name
    return is_free_in_run(name) and name.casefold() not in _TAKEN and room


@attrs.frozen(kw_only=True)
class JsonlConfig:
    """Writes metrics as JSON lines."""

    file: str = attrs.field(
        default="metrics.jsonl",
        validator=check(_is_free, "the name of a file without folders, which is none of the run's own files"),
    )
    """The file's name in the run folder."""


class JsonlTracker:
    """Every line is written at once, so that a killed run keeps what it logged.

    Of one that does not fit on the disk nothing is left, so that it can come again.
    """

    def __init__(self, config: JsonlConfig, run: RunInfo) -> None:
        self._path = run.file(config.file)
        self._resumed_at = run.resumed_at
        before, self._there = (0.0, set[bytes]()) if run.resumed_at is None else _cut_back(self._path, run.resumed_at)
        self._file = self._path.open("ab", buffering=0)
        self._counts_links = bool(os.fstat(self._file.fileno()).st_nlink)  # some file systems do not
        self._start = time.monotonic() - before

    def log(self, metrics: Metrics, step: int) -> None:
        plain = {name: _plain(value) for name, value in metrics.items()}
        if (
            self._resumed_at is not None
            and step <= self._resumed_at
            and _digest({"step": step, **plain}) in self._there
        ):
            return
        if self._counts_links and not os.fstat(self._file.fileno()).st_nlink:
            raise OSError(f"{self._path} was removed while the run was writing to it")
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **plain}
        left, before = memoryview(json.dumps(line).encode() + b"\n"), os.fstat(self._file.fileno()).st_size
        try:
            while left:  # a file takes what there is room for, which may be a part of a line
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        self._file.close()


def _plain(value: float | Histogram) -> Any:
    if isinstance(value, Histogram):
        return {"counts": list(value.counts), "edges": [_plain(edge) for edge in value.edges]}
    return value if math.isfinite(value) else None  # JSON has no nan


def _cut_back(path: Path, step: int) -> tuple[float, set[bytes]]:
    """Keep the lines up to ``step``; returns the seconds at the last of them, and digests of what may come again.

    Those are the last records: it is not known which of them were written when the run's last checkpoint was made.  At
    step 0 the run begins anew, so nothing is kept.
    """
    seconds, there = 0.0, deque[bytes](maxlen=_MAY_COME_AGAIN)
    if not path.exists():
        return seconds, set()
    temporary = path.with_name(hidden_name(path.name, "tmp"))
    try:
        with path.open("rb") as lines, temporary.open("wb") as kept:
            for line in lines:
                record = _record(line)
                if step and isinstance(record.get("step"), int) and record["step"] <= step:
                    kept.write(line)
                    said = record.pop("seconds", None)
                    seconds = said if _is_time(said) else seconds
                    there.append(_digest(record))
            kept.flush()
            os.fsync(kept.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return seconds, set(there)


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and 0 <= value < 1e12  # a person may have edited the file


def _digest(record: dict[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).digest()


def _record(line: bytes) -> dict[str, Any]:
    """What ``line`` says; nothing if it was torn by the run's end."""
    try:
        record = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {}


@hookimpl
def saekit_register_trackers() -> Iterable[Entry]:
    yield Entry("jsonl", JsonlConfig, _build, summary="JSON lines in the run folder")


def _build(config: JsonlConfig, *, run: RunInfo) -> JsonlTracker:
    return JsonlTracker(config, run)
