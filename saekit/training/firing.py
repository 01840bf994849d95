"""How often each feature fires, and which are dead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["FiringStatistics"]


class FiringStatistics:
    """Firing fractions over windows of steps, and steps since each feature last fired.  No host synchronization."""

    def __init__(self, d_sae: int, *, dead_after: int, window: int, device: str) -> None:
        self._dead_after, self._window = dead_after, window
        self._fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        self._rows = 0
        self._steps = 0
        self._put = False  # whether features are silent for steps that were not made
        self.since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        """``[d_sae]``: steps since each feature last fired."""
        self.last_fractions: Tensor | None = None
        """``[d_sae]``: firing fractions of the last whole window."""

    def update(self, fired: Tensor, rows: int) -> bool:
        """Count a step in which each feature fired on ``fired [d_sae]`` of ``rows`` rows; True if it ends a window."""
        self.since_fired += 1
        self.since_fired.masked_fill_(fired > 0, 0)
        self._fired += fired
        self._rows += rows
        self._steps += 1
        if self._steps < self._window:
            return False
        self.last_fractions = self.fractions()
        self._fired.zero_()
        self._rows = self._steps = 0
        return True

    def dead(self) -> Tensor:
        """``[d_sae]`` bool: not fired for more than the dead-feature window."""
        return self.since_fired > self._dead_after

    def may_have_dead(self, step: int) -> bool:
        """Whether features can be dead when ``step`` steps were made, by what needs no look at the numbers."""
        return self._put or step > self._dead_after

    def put_dead(self, which: Tensor) -> None:
        """The features ``which [d_sae]`` count as dead until they fire, as if they had been silent for as long."""
        self._put = True
        self.since_fired.masked_fill_(which, self._dead_after + 1)

    def fractions(self) -> Tensor:
        """``[d_sae]``: the fraction of tokens on which each fired, in this window so far."""
        return self._fired / max(self._rows, 1)

    def log_sparsity(self) -> Tensor:
        """``[d_sae]``: log10 of the firing fractions of the last whole window, or of the steps so far.

        1e-10 is added, as the readers of ``sparsity.safetensors`` expect for a feature that never fired.
        """
        fractions = self.last_fractions if self.last_fractions is not None else self.fractions()
        return torch.log10(fractions + 1e-10)

    def state_dict(self) -> dict[str, Any]:
        """All counts."""
        return {
            "fired": self._fired.clone(),
            "rows": self._rows,
            "steps": self._steps,
            "since_fired": self.since_fired.clone(),
            "last_fractions": self.last_fractions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._fired.copy_(state["fired"])
        self.since_fired.copy_(state["since_fired"])
        self._rows, self._steps = state["rows"], state["steps"]
        last = state["last_fractions"]
        self.last_fractions = None if last is None else last.to(self._fired.device)
