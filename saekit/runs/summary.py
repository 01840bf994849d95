"""What came of a sweep, as a file for programs; people look at what :mod:`saekit.reports` makes of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.files.storage import write_text
from saekit.reports.sweep import NUMBERS
from saekit.runs.sweep import value_text

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
    writer.writerows({name: _in_a_file(value) for name, value in row.items()} for row in rows)
    write_text(folder / "summary.csv", text.getvalue())
    return list(rows)


def _in_a_file(value: Any) -> Any:
    """Sites by their names, and other lists and tables as JSON, which more can read than Python."""
    if not isinstance(value, (list, Mapping)):
        return value
    text = value_text(value)
    return json.dumps(value) if text == str(value) else text


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
