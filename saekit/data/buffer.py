"""Stage four: activations shuffled in a preallocated buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.data.faults import check_counts
from saekit.data.recipe import RowRecipes, with_unknown
from saekit.devices import rows_on, sent
from saekit.errors import DataError
from saekit.site import Site
from saekit.values import Batch

__all__ = ["ShuffleBuffer"]


class ShuffleBuffer:
    """A fixed block of rows per site, served in random order without replacement.

    Rows are written into free slots and read from random ones, so nothing is moved to shuffle.  Rows that were added
    wait until :meth:`shuffle` mixes them with those that are left; when they were added makes no difference.  All sites
    share the slots, so row ``i`` of each is the same token.
    """

    def __init__(
        self,
        widths: Mapping[Site, int],
        capacity: int,
        *,
        generator: torch.Generator,
        dtypes: Mapping[Site, torch.dtype],
        device: str,
        recipes: bool = False,
    ) -> None:
        """``recipes``: of rows of which it is known, states have how they can be computed again, not the rows."""
        self._recipes = RowRecipes(capacity) if recipes else None
        self.capacity = capacity
        self._generator = generator
        self._rows = {site: torch.empty(capacity, d, dtype=dtypes[site], device=device) for site, d in widths.items()}
        self._origins = torch.zeros(capacity, 3, dtype=torch.long)  # token, document, position
        self._free = torch.arange(capacity)  # at the last shuffle; slots served since then come after these
        self._used = 0  # of the free slots, those that were written since
        self._order = torch.empty(0, dtype=torch.long)  # slots in the order in which they are served
        self._served = 0
        self._beyond: Batch | None = None  # on the CPU: what other processes left, as far as there is no room for it

    @property
    def filled(self) -> int:
        """Rows that can be served."""
        return len(self._order) - self._served

    @property
    def waiting(self) -> int:
        """Rows that were added since the last :meth:`shuffle`, and those of a loaded state that had no room."""
        return self._used + self._left_beyond

    @property
    def free(self) -> int:
        """Rows that can be added."""
        return max(self._empty - self._left_beyond, 0)

    @property
    def _empty(self) -> int:
        return len(self._free) + self._served - self._used

    @property
    def _left_beyond(self) -> int:
        return 0 if self._beyond is None else len(self._beyond)

    @property
    def nbytes(self) -> int:
        """The memory of all rows."""
        return sum(block.nbytes for block in (*self._rows.values(), self._origins))

    def add(self, batch: Batch) -> None:
        """Write rows into free slots, where they wait for :meth:`shuffle`."""
        slots = self._free_slots(self._used, self._used + len(batch))
        self._used += len(batch)
        for site, block in self._rows.items():
            values = batch.activations[site]
            block.index_copy_(0, sent(block.device, slots), rows_on(block.device, values, block.dtype))
        for column, origin in enumerate((batch.tokens, batch.documents, batch.positions)):
            if origin is not None:
                self._origins[slots, column] = origin.to("cpu", torch.long)
        if self._recipes is not None:
            self._recipes.note(slots, batch)

    def _free_slots(self, start: int, end: int) -> Tensor:
        """Free slots ``start`` to ``end`` in the order in which they came free."""
        first = self._free[start:end]
        later = self._order[max(start - len(self._free), 0) : max(end - len(self._free), 0)]
        return first if not len(later) else torch.cat([first, later])

    def shuffle(self) -> None:
        """Draw a new random order over every row that is there."""
        self._move_in()
        free = len(self._free) + self._served
        added, left = self._free_slots(0, self._used), self._order[self._served :]
        self._free = self._free_slots(self._used, free).clone()
        filled = torch.cat([left, added])
        self._order = filled[torch.randperm(len(filled), generator=self._generator)]
        self._used = self._served = 0
        if self._recipes is not None:
            self._recipes.forget_all_but(self._order)

    def _move_in(self) -> None:
        """Rows that had no room come where there is some by now, behind those that were added."""
        if self._beyond is not None and (n := min(self._empty, len(self._beyond))):
            rows, self._beyond = self._beyond, None
            self.add(rows.at(slice(n)))
            self._beyond = rows.at(slice(n, None)) if n < len(rows) else None

    def take(self, n: int) -> Batch:
        """The next ``n`` rows (fewer if fewer are filled); their slots become free."""
        slots = self._order[self._served : self._served + n]
        self._served += len(slots)
        return self._at(slots)

    def peek(self) -> dict[Site, Tensor]:
        """Every row that can be served, ``[n, d]`` per site in no order, nothing used up.

        A buffer that was just filled is shown as it lies, not copied.
        """
        if self.filled == self.capacity:
            return dict(self._rows)
        return dict(self._at(self._order[self._served :]).activations)

    def _at(self, slots: Tensor) -> Batch:
        rows = {site: block.index_select(0, sent(block.device, slots)) for site, block in self._rows.items()}
        tokens, documents, positions = self._origins[slots].unbind(1)
        return Batch(rows, tokens=tokens, documents=documents, positions=positions)

    def state_dict(self, *, waiting: bool = True) -> dict[str, Any]:
        """The rows that are there, on the CPU, in the order in which they are served and then in which they came.

        With ``waiting`` off, without the rows that were added since the last :meth:`shuffle`.  With recipes, rows that
        can be computed again are left out: :func:`saekit.data.recipe.with_rows` puts them back.
        """
        left, added = self._order[self._served :], self._free_slots(0, self._used if waiting else 0)
        slots = torch.cat([left, added])
        recipe: dict[str, Any] = {}
        held = slots
        if self._recipes is not None:
            recipe = {"recipe": self._recipes.state_dict(slots)}
            held = slots[~self._recipes.known(slots)]
        rows = {site.name: _gathered(block, held) for site, block in self._rows.items()}
        origins = self._origins[held]
        if (beyond := self._beyond) is not None:
            rows = {site.name: torch.cat([rows[site.name], beyond.activations[site]]) for site in self._rows}
            origins = torch.cat([origins, _origins_of(beyond)])
            recipe = {name: with_unknown(one, len(beyond)) for name, one in recipe.items()}
        return {
            "rows": rows,
            "origins": origins,
            **recipe,
            "waiting": len(added),
            "capacity": self.capacity,
            "generator": self._generator.get_state(),
            **({} if beyond is None else {"beyond": len(beyond)}),
        }

    def check_fits(self, state: Mapping[str, Any]) -> None:
        """:class:`DataError` for the ``state`` of a buffer of another size, or of other sites."""
        check_counts({"beyond": 0, **state}, "capacity", "waiting", "beyond")
        if state["capacity"] != self.capacity or set(state["rows"]) != {site.name for site in self._rows}:
            raise DataError(
                f"the saved buffer has {state['capacity']:,} rows of {', '.join(state['rows'])}, but this run's has "
                f"{self.capacity:,} of {', '.join(site.name for site in self._rows)}: go on with the options it was "
                "saved with"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next row.  Which slots hold the rows makes no difference."""
        self.check_fits(state)
        beyond = state.get("beyond", 0)
        rows, origins = len(state["origins"]) - beyond, state["origins"]
        if not 0 <= state["waiting"] <= rows <= self.capacity or tuple(origins.shape) != (rows + beyond, 3):
            raise ValueError(
                f"the saved buffer has {rows:,} rows, {state['waiting']:,} of them waiting, which cannot be"
            )
        recipe = state.get("recipe")
        if recipe is not None and len(recipe["contexts"]) != rows + beyond:
            raise ValueError(
                "the saved buffer has a recipe in the place of rows: saekit.data.recipe.with_rows makes them"
            )
        if self._recipes is not None:
            self._recipes.load_state_dict(recipe)
        for site, block in self._rows.items():
            block[:rows] = state["rows"][site.name][:rows].to(block.device)
        self._origins[:rows] = origins[:rows]
        self._beyond = None
        if beyond:
            kept = {site: state["rows"][site.name][rows:].to(self._rows[site].dtype, copy=True) for site in self._rows}
            tokens, documents, positions = origins[rows:].clone().unbind(1)
            self._beyond = Batch(kept, tokens=tokens, documents=documents, positions=positions)
        left = rows - state["waiting"]
        self._order, self._served = torch.arange(left), 0
        self._free, self._used = torch.arange(left, self.capacity), state["waiting"]
        self._generator.set_state(state["generator"])


def _origins_of(batch: Batch) -> Tensor:
    assert batch.tokens is not None
    assert batch.documents is not None
    assert batch.positions is not None
    return torch.stack([batch.tokens, batch.documents, batch.positions], dim=1)


def _gathered(block: Tensor, slots: Tensor) -> Tensor:
    """The rows ``slots`` of ``block`` on the CPU; in pieces, since a GPU need not have room for all of them twice."""
    if block.device.type == "cpu":
        return block.index_select(0, slots)
    rows = torch.empty(len(slots), *block.shape[1:], dtype=block.dtype, pin_memory=block.device.type == "cuda")
    for part, target in zip(slots.split(65_536), rows.split(65_536), strict=True):
        target.copy_(block.index_select(0, sent(block.device, part)))
    return rows
