"""What `saekit plan` finds."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

__all__ = ["Plan", "cannot_run"]


@attrs.frozen
class Plan:
    """What a run would be."""

    facts: Mapping[str, str]
    """In words, for people."""
    numbers: Mapping[str, float]
    """Steps, tokens, bytes and seconds, by name."""
    problems: list[str]
    """Errors that ``train`` would stop with."""
    warnings: list[str]
    """What looks wrong, but would run."""
    verdict: str = ""
    """In a line: whether it could run, and whether memory and disk suffice."""
    fits: bool | None = None
    """Whether there is as much memory and disk as it needs; None: that is not known."""


def cannot_run(problems: list[str]) -> str:
    """The verdict on what has ``problems``; empty if there are none."""
    return f"It cannot run: {len(problems)} problem{'s' if len(problems) > 1 else ''}." if problems else ""
