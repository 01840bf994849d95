"""The documents of a dataset, one after the other, from a position that can be saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from saekit.data.dealing import Dealer
from saekit.data.documents import Document, Form
from saekit.data.faults import check_counts
from saekit.errors import DataError
from saekit.reasons import reason

__all__ = ["DocumentReader", "Owners", "is_int"]

Owners: TypeAlias = tuple[str, Callable[[Sequence[int]], bool]]
"""A column that has the documents a record is from, and which of them choose the record."""


class DocumentReader:
    """An iterator of ``(position in the dataset, document)`` whose position can be saved."""

    def __init__(
        self,
        records: Any,
        column: str | None,
        keep: Callable[[int], bool] | None,
        *,
        seekable: bool = False,
        where: str = "the dataset",
        owners: Owners | None = None,
        form: Form | None = None,
        dealer: Dealer | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self._order = order  # the positions of records that can be read at any place; None: from the first on
        self._dealer = dealer  # of those that are chosen, which are read; None: all
        self._records, self._column, self._keep, self._seekable = records, column, keep, seekable
        self._where, self._owners, self._form = where, owners, form or Form()
        self._next = 0
        self._iterator: Iterator[Any] | None = None
        self._loaded: Any = None  # the position to begin at, of records that know theirs

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        return self

    def __next__(self) -> tuple[int, Document]:
        while True:
            record = self._record()
            index, self._next = self._index, self._next + 1
            if self._keep is not None and not self._keep(index):
                continue
            if self._owners is not None and not self._chosen(record, index):
                continue
            document = record if self._column is None else _field(record, self._column, index, self._where)
            if document is None:
                continue  # a missing value is no text
            if self._dealer is not None and not self._dealer.is_own(index):
                continue
            if isinstance(document, (int, float, dict)) and not self._form.chat:
                raise DataError(
                    f"document {index} has {type(document).__name__} {document!r} in column {self._column!r}, expected "
                    "a text or a list of token ids"
                )
            return index, self._form.made(document, record, index, self._where)

    @property
    def _index(self) -> int:
        """The position in the dataset of the record that was read."""
        return self._next if self._order is None else self._order[self._next]

    def _chosen(self, record: Any, index: int) -> bool:
        assert self._owners is not None
        column, chosen = self._owners
        ids = _field(record, column, index, self._where)
        if isinstance(ids, (str, bytes)) or not hasattr(ids, "__len__") or not all(is_int(number) for number in ids):
            raise DataError(
                f"document {index} of {self._where} has {ids!r:.80} in column {column!r}, expected a list of documents"
            )
        return chosen([int(number) for number in ids])

    def _record(self) -> Any:
        try:
            if self._iterator is None:
                self._iterator = self._begin()
            return next(self._iterator)
        except (StopIteration, DataError):
            raise
        except Exception as error:  # a file that is damaged later on, a connection that ended: any type at all
            raise DataError(f"document {self._index} of {self._where} cannot be read: {reason(error)}") from error

    def _begin(self) -> Iterator[Any]:
        if self._order is not None:
            return (self._records[index] for index in itertools.islice(self._order, self._next, None))
        if not self._seekable:
            return _from(self._records, self._next)
        return itertools.islice(iter(self._records), 0 if self._loaded is not None else self._next, None)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next document."""
        position = self._loaded if self._iterator is None else self._records.state_dict() if self._seekable else None
        met = {} if self._dealer is None else self._dealer.state_dict()
        return {"next": self._next, **met} | ({} if position is None else {"records": position})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next document."""
        check_counts(state, "next")
        self._next, self._iterator = state["next"], None
        if self._dealer is not None:
            self._dealer.load_state_dict(state)
        self._loaded = state.get("records") if self._seekable else None
        if self._loaded is not None:
            self._records.load_state_dict(self._loaded)


def _from(records: Any, position: int) -> Iterator[Any]:
    """``records`` from ``position`` on; a HF dataset and a list need not read what comes before."""
    if isinstance(records, Sequence):
        return (records[index] for index in range(position, len(records)))
    if position and hasattr(records, "skip"):
        at_end = hasattr(records, "__len__") and position >= len(records)  # a Dataset refuses to skip all of itself
        return iter(()) if at_end else iter(records.skip(position))
    return itertools.islice(iter(records), position, None)


def _field(record: Any, column: str, index: int, where: str) -> Any:
    try:
        return record[column]
    except (KeyError, TypeError) as error:
        found = f"it has {', '.join(map(repr, record))}" if isinstance(record, Mapping) else f"it is {record!r}"
        raise DataError(f"document {index} of {where} has no column {column!r}; {found}") from error


def is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
