"""What came of a sweep, as a file for programs; people look at what :mod:`saekit.reports` makes of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.files.storage import write_text
from saekit.reports.sweep import NUMBERS

if TYPE_CHECKING:
    from saekit.runs.session import Member

__all__ = ["write_summary"]


def write_summary(
    folder: Path, members: Sequence[Member], changed: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Write ``summary.csv`` into ``folder``; returns the rows, one for each SAE."""
    rows = [_row(member, options) for member, options in zip(members, changed, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "summary.csv", text.getvalue())
    return list(rows)


def _row(member: Member, options: Mapping[str, Any]) -> dict[str, Any]:
    latest = member.latest
    numbers = {
        name: next((latest[source] for source in sources if source in latest), None)
        for name, sources in NUMBERS.items()
    }
    diverged = member.trainer.diverged
    return {
        "name": member.name,
        **options,
        **(numbers if diverged is None else dict.fromkeys(numbers)),
        "tokens": member.trainer.tokens,
        "status": "trained" if diverged is None else "diverged",
    }
