"""How an activation source runs the model: what `saekit plan` counts and times by."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs

__all__ = ["SourceForwards", "StatesForwards"]


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
    """The line of a configuration that has it so; empty: there is none."""
    tokenizing: int = 0
    """Processes that tokenize for them."""
    device: str | None = None
    """Where their rows wait, in memory that ``memory_bytes`` tells; None: where the model is."""
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
    def forwards(self) -> SourceForwards:
        """As its options have it; asked before the first batch."""
