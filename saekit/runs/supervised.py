"""An activation source under supervision: what its plugin does wrong says which plugin it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from torch import Tensor

from saekit.plugins.building import Part, blamed, returned
from saekit.plugins.registry import Registered
from saekit.protocols import ActivationSource, StatesWidths
from saekit.site import Site
from saekit.values import Batch

__all__ = ["SupervisedSource"]

_END = object()


class SupervisedSource:
    """``source`` of the plugin ``item``; whatever else it has beside the methods of its kind is there as it is."""

    def __init__(
        self, source: ActivationSource, item: Registered, sites: Sequence[Site], parts: Sequence[Part]
    ) -> None:
        """``sites`` are those that each batch must hold, and ``parts`` other plugins' objects that it uses."""
        self._source, self._item, self._sites, self._parts = source, item, tuple(sites), tuple(parts)

    @property
    def key(self) -> str:
        """The plugin's qualified key."""
        return self._item.key

    @cached_property
    def widths(self) -> Mapping[Site, int] | None:
        """What the source states of its own: see :class:`saekit.protocols.StatesWidths`.  None: nothing."""
        with self._blamed("widths"):
            if not isinstance(self._source, StatesWidths):
                return None
            found = dict(self._source.widths)
            wrong = [site.name for site in self._sites if type(found.get(site)) is not int or found[site] < 1]
        if wrong:
            raise returned(self._item, "widths", found, f"expected a width of 1 or more for {', '.join(wrong)}")
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

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
        for site, width in (self.widths or {}).items():
            rows = batch.activations.get(site)
            if rows is not None and tuple(rows.shape[1:]) != (width,):
                return f"whose rows at {site.name} are not {width} wide, as it says that they are"
        return "" if len(batch) else "which has no rows; a source whose data has ended raises StopIteration"

    def peek(self) -> Mapping[Site, Tensor]:
        with self._blamed("peek"):
            return self._source.peek()

    def state_dict(self) -> dict[str, Any]:
        with self._blamed("state_dict"):
            return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._blamed("load_state_dict"):
            self._source.load_state_dict(state)

    def close(self) -> None:
        with self._blamed("close"):
            self._source.close()
