"""What came of a sweep: a table and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.analysis.sweep import plot_sweep
from saekit.storage import write_text
from saekit.training.session import Member

__all__ = ["write_summary"]

_NUMBERS = {
    "l0": ("evals/l0", "metrics/l0"),
    "explained_variance": ("evals/explained_variance", "metrics/explained_variance"),
    "ce_recovered": ("evals/ce_recovered",),
    "mse": ("evals/mse", "losses/mse_loss"),
    "dead_features": ("sparsity/dead_features",),
}
"""The columns, and the metrics that each is taken from, the first that is there."""


def write_summary(
    folder: Path, members: Sequence[Member], changed: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Write ``summary.csv`` and ``summary.png`` into ``folder``; returns the rows, one for each SAE."""
    rows = [_row(member, options) for member, options in zip(members, changed, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "summary.csv", text.getvalue())
    plot_sweep(rows, list(changed[0]), folder / "summary.png")
    return list(rows)


def _row(member: Member, options: Mapping[str, Any]) -> dict[str, Any]:
    latest = member.latest
    numbers = {
        name: next((latest[source] for source in sources if source in latest), None)
        for name, sources in _NUMBERS.items()
    }
    diverged = member.trainer.diverged
    return {
        "name": member.name,
        **options,
        **(numbers if diverged is None else dict.fromkeys(numbers)),
        "tokens": member.trainer.tokens,
        "status": "trained" if diverged is None else "diverged",
    }
