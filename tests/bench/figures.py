"""What a bench finds as rows, beside what it prints: `run_all.py` collects them, and `pages.py` makes tables of them.

A row is written where ``SAEKIT_BENCH_FIGURES`` names a folder, as a line of JSON in the file of the bench.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

__all__ = ["DISK", "ENDS", "FOLDER", "Figure", "cut", "late", "missing", "row", "spread"]

FOLDER, ENDS, DISK = "SAEKIT_BENCH_FIGURES", "SAEKIT_BENCH_ENDS", "SAEKIT_BENCH_DISK"
Figure: TypeAlias = "float | str | list[float]"
"""A number, words, or the median, the least and the largest of several numbers."""


def row(table: str, case: str, figures: Mapping[str, Figure]) -> None:
    """Figures of a case, by what they are, with their unit: a row of a table.  Of one case, later ones are added."""
    _write({"table": table, "case": case, "figures": dict(figures)})


def missing(*what: str) -> None:
    """Say, and note, that something is not there to be compared with."""
    for name in what:
        print(f"not installed, left out: {name}", flush=True)
        _write({"missing": name})


def late() -> bool:
    """Whether no further round should begin, since the time that `SAEKIT_BENCH_ENDS` names (of the epoch) is over."""
    return time.time() > float(os.environ.get(ENDS) or math.inf)


def cut(what: str) -> None:
    """Say, and note, what was left out for want of time."""
    print(f"for want of time: {what}", flush=True)
    _write({"cut": what})


def spread(values: Iterable[float]) -> list[float]:
    """The median, the least and the largest."""
    found = sorted(values)
    return [statistics.median(found), found[0], found[-1]]


def _write(found: Mapping[str, object]) -> None:
    if folder := os.environ.get(FOLDER):
        with Path(folder, f"{Path(sys.argv[0]).stem}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
