"""Tracker ``jsonl``: one JSON object per line, in the run folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping

import attrs

from saekit import Entry, RunInfo, hookimpl
from saekit.config import check


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
        self._file = (run.folder / config.file).open("a", encoding="utf-8")
        self._start = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no nan
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **finite}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@hookimpl
def saekit_register_trackers() -> Iterable[Entry]:
    yield Entry("jsonl", JsonlConfig, _build, summary="JSON lines in the run folder")


def _build(config: JsonlConfig, *, run: RunInfo) -> JsonlTracker:
    return JsonlTracker(config, run)
