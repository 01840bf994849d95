"""What becomes of the configuration of another library's run: the options here, and a word about every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from saekit.config.formats import write
from saekit.config.values import shown

__all__ = ["ConvertedConfig"]


@attrs.frozen(kw_only=True)
class ConvertedConfig:
    """A configuration of saekit, and what became of every key of the other."""

    table: Mapping[str, Any]
    """As :func:`saekit.load_config` takes it."""
    renamed: Mapping[str, str] = attrs.field(factory=dict)
    """Their keys to the options here, where these are called otherwise."""
    changed: Mapping[str, str] = attrs.field(factory=dict)
    """Their keys to how the same is written here, where the value is another."""
    dropped: Mapping[str, str] = attrs.field(factory=dict)
    """Their keys to why they are not needed: what they say is so here, or says nothing about training."""
    assumed: Mapping[str, Any] = attrs.field(factory=dict)
    """Keys that are not there, with the defaults of the library that hold for that."""
    lost: Mapping[str, str] = attrs.field(factory=dict)
    """Their keys to what they asked for, which is not here: the run is another without it."""

    @property
    def toml(self) -> str:
        """The file."""
        return write(self.table, "toml")

    def report(self) -> list[str]:
        """A line for each key that is not simply the same here."""
        lines = [f"renamed: {theirs} is {ours}" for theirs, ours in self.renamed.items()]
        lines += [f"changed: {theirs}: {how}" for theirs, how in self.changed.items()]
        lines += [f"dropped: {theirs}: {why}" for theirs, why in self.dropped.items()]
        lines += [f"assumed: {theirs} is {shown(value)}, the default there" for theirs, value in self.assumed.items()]
        return lines + [f"NOT THE SAME: {theirs}: {why}" for theirs, why in self.lost.items()]
