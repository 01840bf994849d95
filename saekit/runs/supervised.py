"""An activation source under supervision: what its plugin does wrong says which plugin it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor

from saekit.abilities import (
    CopiesState,
    HasMemory,
    KeepsRecipe,
    Pauses,
    SharesRows,
    SourceForwards,
    StatesForwards,
    StatesRows,
    StatesWidths,
    TakesStates,
)
from saekit.errors import PluginFailedError
from saekit.plugins.building import Part, blamed, returned, wrong
from saekit.plugins.registry import Registered
from saekit.protocols import ActivationSource
from saekit.runs.state_files import UnsavableError
from saekit.site import Site
from saekit.source_forwards import fault_of_forwards
from saekit.values import Batch

__all__ = ["SupervisedSource"]

_END = object()
_T = TypeVar("_T")


class SupervisedSource:
    """``source`` of the plugin ``item``; what it can do beside the methods of its kind, this can, and no more."""

    widths: Mapping[Site, int]
    rows: int
    source_forwards: SourceForwards
    pause: Callable[[], None]
    memory_bytes: Callable[[], int]
    recipe_size: Callable[[], tuple[int, int]]
    copies_state: bool
    shares_rows: bool
    load_states: Callable[[Sequence[Mapping[str, Any]]], None]

    def __init__(
        self,
        source: ActivationSource,
        item: Registered,
        sites: Sequence[Site],
        parts: Sequence[Part],
        most: int | None = None,
    ) -> None:
        """``sites`` are those that each batch must hold, ``most`` the rows that it may have; ``parts`` are other
        plugins' objects that it uses."""
        self._most = most
        self._source, self._item, self._sites, self._parts = source, item, tuple(sites), tuple(parts)
        self._stated: Mapping[Site, int] = {}
        # To look whether a property is there may be to ask it, and it is a stranger's.
        with self._blamed("widths"):
            if isinstance(source, StatesWidths):
                self.widths = self._stated = self._checked(dict(source.widths))
        with self._blamed("rows"):
            if isinstance(source, StatesRows):
                self.rows = self._count(source.rows)
        with self._blamed("source_forwards"):
            if isinstance(source, StatesForwards):
                self.source_forwards = self._stated_forwards(source.source_forwards)
        with self._blamed("copies_state"):
            if isinstance(source, CopiesState):
                self.copies_state = source.copies_state is True
        if isinstance(source, Pauses):
            self.pause = self._watched("pause", source.pause)
        with self._blamed("shares_rows"):
            if isinstance(source, SharesRows):
                self.shares_rows = bool(source.shares_rows)
        if isinstance(source, TakesStates):
            self.load_states = self._load_states
        if isinstance(source, HasMemory):
            self.memory_bytes = self._watched("memory_bytes", source.memory_bytes)
        if isinstance(source, KeepsRecipe):
            self.recipe_size = self._watched("recipe_size", source.recipe_size)

    @property
    def key(self) -> str:
        """The plugin's qualified key."""
        return self._item.key

    def _checked(self, widths: Mapping[Site, int]) -> Mapping[Site, int]:
        wrong = [site.name for site in self._sites if type(widths.get(site)) is not int or widths[site] < 1]
        if wrong:
            raise returned(self._item, "widths", widths, f"expected a width of 1 or more for {', '.join(wrong)}")
        return widths

    def _count(self, rows: object) -> int:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            raise returned(self._item, "rows", rows, "expected how many rows one reading has, a whole number")
        return rows

    def _stated_forwards(self, stated: object) -> SourceForwards:
        if fault := fault_of_forwards(stated):
            raise returned(self._item, "source_forwards", stated, fault)
        assert isinstance(stated, SourceForwards)
        return stated

    def _watched(self, doing: str, work: Callable[[], _T]) -> Callable[[], _T]:
        def watched() -> _T:
            with self._blamed(doing):
                return work()

        return watched

    def _blamed(self, doing: str) -> AbstractContextManager[None]:
        return blamed(self._item, doing, at_work=True, parts=self._parts)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._blamed("__next__"):
            batch: Any = next(self._source, _END)
            fault = self._fault(batch)
        if batch is _END:
            raise StopIteration
        if fault:
            raise returned(self._item, "__next__", batch, fault)
        return batch  # type: ignore[no-any-return]

    def _fault(self, batch: object) -> str:
        """What is wrong with ``batch``, in words; nothing, where there is none."""
        if batch is _END:
            return ""
        if not isinstance(batch, Batch):
            return "expected a saekit.Batch; a source whose data has ended raises StopIteration"
        if missing := [site.name for site in self._sites if site not in batch.activations]:
            return f"which lacks the activations of {', '.join(missing)}"
        if len({len(rows) for rows in batch.activations.values()}) != 1:
            return "which has another number of rows at each site"
        for site, width in self._stated.items():
            rows = batch.activations.get(site)
            if rows is not None and tuple(rows.shape[1:]) != (width,):
                return f"whose rows at {site.name} are not {width} wide, as it says that they are"
        if self._most is not None and len(batch) > self._most:
            return (
                f"which has {len(batch)} rows, expected stream.batch_size, {self._most}, and fewer in the last alone: "
                "schedules would end before their time"
            )
        return "" if len(batch) else "which has no rows; a source whose data has ended raises StopIteration"

    def peek(self) -> Mapping[Site, Tensor]:
        with self._blamed("peek"):
            return self._source.peek()

    def state_dict(self) -> dict[str, Any]:
        with self._blamed("state_dict"):
            state: Any = self._source.state_dict()
        if not isinstance(state, Mapping):
            raise returned(self._item, "state_dict", state, "expected a mapping of plain values and tensors by name")
        return dict(state)

    def blamed_for(self, error: UnsavableError, place: str) -> UnsavableError | PluginFailedError:
        """``error`` of a state that holds this one's at ``place``: what is wrong there is its plugin's fault."""
        if not f"{error.place}/".startswith(f"{place}/"):
            return error
        where = "state_dict()" + error.place.removeprefix(place)
        return wrong(self._source, f"the state at {where} {error.what}", self._item)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._blamed("load_state_dict"):
            self._source.load_state_dict(state)

    def _load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        assert isinstance(self._source, TakesStates)
        with self._blamed("load_states"):
            self._source.load_states(states)

    def close(self) -> None:
        with self._blamed("close"):
            self._source.close()
