"""What a forward of a language model is asked for, and what it gave.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from saekit.shapes import by_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Forward", "Replacement", "Want"]

Replacement: TypeAlias = "Callable[[Tensor], Tensor]"
"""Takes what a hook holds, ``[b, t, ...]``, and returns what the model shall go on with, of the same shape."""
Want: TypeAlias = Literal["held", "loss", "logits"]
"""What a forward is for beside what its hooks hold: nothing else, the loss, or the logits."""


@attrs.frozen(eq=False)
class Forward:
    """What one forward gave."""

    held: Mapping[str, Tensor]
    """What each hook that was read holds, ``[b, t, ...]``, before anything was put in its place."""
    _loss: Tensor | None = None
    _logits: Tensor | None = None

    __repr__ = by_shapes

    @property
    def loss(self) -> Tensor:
        """Next-token cross-entropy in nats, ``[b, t - 1]``, of a forward that was asked for it."""
        return _asked_for(self._loss, "loss")

    @property
    def logits(self) -> Tensor:
        """``[b, t, d_vocab]``, of a forward that was asked for them."""
        return _asked_for(self._logits, "logits")


def _asked_for(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"this forward was not asked for its {what}: run(..., want={what!r})")
    return value
