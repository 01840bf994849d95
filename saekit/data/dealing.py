"""Which documents are whose, where several readers share a text: they are dealt out in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from saekit.data.faults import check_counts

__all__ = ["Before", "Dealer", "Place", "checked_before"]

Place: TypeAlias = tuple[int, int]
"""How often the text had been read to its end, and the number of the record that comes next."""
Before: TypeAlias = tuple[tuple[Place, ...], ...]
"""The places that all readers had come to, each time that others took over from them."""


class Dealer:
    """Says of each document, in their order, whether it is of reader ``number`` of ``readers``.

    In every reading of the text, documents go to the readers in turn.  Where the readers of ``before`` were others,
    what none of them had read by then is dealt out anew, in the order of the text and in turn, among those after them:
    so each document of a reading is read once, by whomever.  ``reading`` is the number of this one, from 0.
    """

    def __init__(self, number: int, readers: int, before: Before = (), reading: int = 0) -> None:
        self._number, self._before, self._reading = number, before, reading
        self._readers = [*map(len, before), readers]
        self._met = [0] * len(self._readers)  # by the first readers, all; by others, what those before had left

    def is_own(self, record: int) -> bool:
        """Whether the document in ``record`` is this reader's; every document must be asked about, once."""
        last = len(self._before)
        for turn, readers in enumerate(self._readers):
            owner, self._met[turn] = self._met[turn] % readers, self._met[turn] + 1
            if turn == last:
                return owner == self._number
            if (self._reading, record) < self._before[turn][owner]:
                break  # it was read by then
        return False

    def state_dict(self) -> dict[str, Any]:
        """How many documents were met."""
        first, *others = self._met
        return {"met": first} | ({"met_since": others} if others else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next document."""
        others = list(state.get("met_since", ()))
        met = {f"met {number}": count for number, count in enumerate([state["met"], *others])}
        check_counts(met, *met)
        if len(met) != len(self._readers):
            raise ValueError(f"a saved reader has met documents of {len(met)} readings, expected {len(self._readers)}")
        self._met = list(met.values())


def checked_before(saved: Any) -> Before:
    """The places of a saved state; :class:`ValueError` where they are none."""
    before = tuple(tuple((reading, record) for reading, record in turn) for turn in saved)
    for place in (place for turn in before for place in turn):
        check_counts(dict(zip(("reading", "record"), place, strict=True)), "reading", "record")
    if not all(before):
        raise ValueError("a saved state says that there were no readers")
    return before
