"""What `saekit plan` finds."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

__all__ = ["Plan"]


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
