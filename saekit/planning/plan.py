"""What `saekit plan` finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager
from saekit.runs.sweep import member_names

__all__ = ["Plan", "cannot_run", "in_order", "names_of"]


@attrs.frozen
class Plan:
    """What a run would be, of one SAE or of several."""

    facts: Mapping[str, str]
    """In words, for people."""
    numbers: Mapping[str, float]
    """Steps, tokens, bytes and seconds, by name.  Of several SAEs, ``saes`` says how many there are; bytes and seconds
    are those of all, and steps, tokens and widths those of the one that has the most."""
    problems: list[str]
    """Errors that ``train`` would stop with."""
    warnings: list[str]
    """What looks wrong, but would run."""
    verdict: str = ""
    """In a line: whether it could run, and whether memory and disk suffice."""
    fits: bool | None = None
    """Whether there is as much memory and disk as it needs; None: that is not known."""


def names_of(configs: Sequence[TrainConfig], plugins: PluginManager) -> list[str]:
    """The names of the SAEs, as a run would have them; where it could not name them, numbers."""
    if len(configs) == 1:
        return ["sae"]
    try:
        return member_names(configs, plugins)[1]
    except ConfigError:
        return [f"SAE {number}" for number in range(len(configs))]


def cannot_run(problems: list[str]) -> str:
    """The verdict on what has ``problems``; empty if there are none."""
    return f"It cannot run: {len(problems)} problem{'s' if len(problems) > 1 else ''}." if problems else ""


def in_order(facts: dict[str, str]) -> dict[str, str]:
    """As people read them: what it is, what it reads, what it takes."""
    first = ("training", "site", "sites", "inputs", "targets", "SAE", "SAEs", "names")
    last = ("SAE step", "silent at start", "memory", "memory of the process", "disk", "buffer in checkpoints",
            "activation cache", "duration")  # fmt: skip

    def place(name: str) -> int:
        known = "memory" if name.startswith("memory on ") else name
        return first.index(known) - len(first) if known in first else last.index(known) + 1 if known in last else 0

    return {name: facts[name] for name in sorted(facts, key=place)}
