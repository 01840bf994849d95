"""Stage four: activations shuffled in a preallocated buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.site import Site

__all__ = ["ShuffleBuffer"]


class ShuffleBuffer:
    """A fixed block of rows per site, served in random order without replacement.

    Rows are written into free slots and read from random ones, so nothing is moved to shuffle: each batch mixes
    old rows with new ones.  All sites share the slots, so row ``i`` of each is the same token.
    """

    def __init__(
        self, widths: Mapping[Site, int], capacity: int, *, generator: torch.Generator, dtype: torch.dtype, device: str
    ) -> None:
        self.capacity = capacity
        self._generator = generator
        self._rows = {site: torch.empty(capacity, d, dtype=dtype, device=device) for site, d in widths.items()}
        self._free = torch.arange(capacity)
        self._order = torch.empty(0, dtype=torch.long)  # filled slots in the order in which they will be served

    @property
    def filled(self) -> int:
        """Rows that can be served."""
        return len(self._order)

    @property
    def free(self) -> int:
        """Rows that can be added."""
        return len(self._free)

    def add(self, rows: Mapping[Site, Tensor]) -> None:
        """Write ``[n, d]`` rows per site into free slots.  Call :meth:`shuffle` when done adding."""
        n = len(next(iter(rows.values())))
        slots, self._free = self._free[:n], self._free[n:]
        for site, values in rows.items():
            block = self._rows[site]
            block.index_copy_(0, slots.to(block.device), values.to(block.device, block.dtype))
        self._order = torch.cat([self._order, slots])

    def shuffle(self) -> None:
        """Draw a new random order over all filled slots."""
        self._order = self._order[torch.randperm(len(self._order), generator=self._generator)]

    def take(self, n: int) -> dict[Site, Tensor]:
        """The next ``n`` rows per site (fewer if fewer are filled), ``[n, d]``; their slots become free."""
        slots, self._order = self._order[:n], self._order[n:]
        self._free = torch.cat([self._free, slots])
        return {site: block.index_select(0, slots.to(block.device)) for site, block in self._rows.items()}

    def peek(self) -> dict[Site, Tensor]:
        """Every filled row, nothing used up."""
        return {site: block.index_select(0, self._order.to(block.device)) for site, block in self._rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """The filled rows, the slots and the generator."""
        return {
            "rows": {site.name: block.clone() for site, block in self._rows.items()},
            "free": self._free.clone(),
            "order": self._order.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next row."""
        for site, block in self._rows.items():
            block.copy_(state["rows"][site.name])
        self._free, self._order = state["free"].clone(), state["order"].clone()
        self._generator.set_state(state["generator"])
