"""Tracker ``jsonl``: one JSON object per line, in the run folder."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from saekit import Entry, RunInfo, hookimpl
from saekit.config import check
from saekit.protocols import Histogram, Metrics


@attrs.frozen(kw_only=True)
class JsonlConfig:
    """Writes metrics as JSON lines."""

    file: str = attrs.field(
        default="metrics.jsonl", validator=check(lambda name: name and "/" not in name, "a file name without folders")
    )
    """The file's name in the run folder."""


class JsonlTracker:
    """Every line is flushed, so that a killed run keeps what it logged."""

    def __init__(self, config: JsonlConfig, run: RunInfo) -> None:
        path = run.folder / config.file
        before, self._there = (0.0, []) if run.resumed_at is None else _cut_back(path, run.resumed_at)
        self._file = path.open("a", encoding="utf-8")
        self._start = time.monotonic() - before

    def log(self, metrics: Metrics, step: int) -> None:
        plain = {name: _plain(value) for name, value in metrics.items()}
        if {"step": step, **plain} in self._there:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **plain}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(value: float | Histogram) -> Any:
    if isinstance(value, Histogram):
        return {"counts": list(value.counts), "edges": [_plain(edge) for edge in value.edges]}
    return value if math.isfinite(value) else None  # JSON has no nan


def _cut_back(path: Path, step: int) -> tuple[float, list[dict[str, Any]]]:
    """Keep the lines up to ``step``, and return the seconds at the last of them, and what is said of ``step`` itself.

    The steps before it are not logged again; of its own records, the last evals may be.  At step 0 the run begins anew,
    so nothing is kept.
    """
    seconds, there = 0.0, []
    if not path.exists():
        return seconds, there
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with path.open("rb") as lines, temporary.open("wb") as kept:
            for line in lines:
                record = _record(line)
                if step and isinstance(record.get("step"), int) and record["step"] <= step:
                    kept.write(line)
                    seconds = record.pop("seconds", seconds)
                    there += [record] if record["step"] == step else []
            kept.flush()
            os.fsync(kept.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return seconds, there


def _record(line: bytes) -> dict[str, Any]:
    """What ``line`` says; nothing if it was torn by the run's end."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {}


@hookimpl
def saekit_register_trackers() -> Iterable[Entry]:
    yield Entry("jsonl", JsonlConfig, _build, summary="JSON lines in the run folder")


def _build(config: JsonlConfig, *, run: RunInfo) -> JsonlTracker:
    return JsonlTracker(config, run)
