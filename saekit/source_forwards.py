"""How an activation source runs the model: what `saekit plan` counts and times by."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs

__all__ = ["SourceForwards", "StatesForwards", "fault_of_forwards"]

_TYPES = ("float32", "bfloat16", "float16", "float64")


@attrs.frozen(kw_only=True)
class SourceForwards:
    """Forwards of the model that an activation source makes."""

    contexts: int = 16
    """Contexts in one of them, at most."""
    buffered: int = 1
    """Forwards that fill what batches are drawn from, which is filled up again when less than half of it is left."""
    ahead: bool = False
    """Whether they are made while the SAEs train, in a thread."""
    needed: bool = False
    """Whether it is filled up to no more than training still takes."""
    needed_line: str = ""
    """The option that has it so, as a command line takes it (``section.option=value``); empty: there is none."""
    tokenizing: int = 0
    """Processes that tokenize for them."""
    device: str | None = None
    """Where their rows wait, in memory that ``memory_bytes`` tells; None: where the model is."""
    dtype: str | None = None
    """The type of their numbers there: `float32`, `bfloat16`, `float16` or `float64`; None: as the model gives them."""
    contexts_option: str = ""
    """The path of the option that is :attr:`contexts`; empty: it cannot be chosen."""
    buffered_option: str = ""
    """The path of the option that is :attr:`buffered`, likewise."""


@runtime_checkable
class StatesForwards(Protocol):
    """An activation source that runs the model, and says how.

    Of one that reads the text and does not say it, a plan takes what :class:`SourceForwards` has by default.
    """

    @property
    def source_forwards(self) -> SourceForwards:
        """As its options have it; asked before the first batch."""


def fault_of_forwards(stated: object) -> str:
    """What is wrong with what an activation source states; empty where nothing is."""
    if not isinstance(stated, SourceForwards):
        return "expected saekit.abilities.SourceForwards"
    for name, least in (("contexts", 1), ("buffered", 1), ("tokenizing", 0)):
        value: object = getattr(stated, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"expected {least} or more {name}, a whole number"
    for name in ("ahead", "needed"):
        if not isinstance(getattr(stated, name), bool):
            return f"expected True or False as {name}"
    for name in ("needed_line", "contexts_option", "buffered_option"):
        if not isinstance(getattr(stated, name), str):
            return f"expected text as {name}"
    if stated.device is not None and not isinstance(stated.device, str):
        return "expected the name of a device, or None, as device"
    return f"expected {', '.join(_TYPES)} or None as dtype" if stated.dtype not in (None, *_TYPES) else ""
