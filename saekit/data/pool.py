"""The first documents of a text that can only be read from its beginning, to draw from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from saekit.errors import DataError
from saekit.reasons import reason

__all__ = ["Pool"]

_END = object()
_AVERAGE = 16_384  # characters: of longer documents fewer are held


class Pool:
    """Records from the first on, of which more can be added; of each the ``columns`` that are read of it.

    No more is added when it has ``bound`` characters.
    """

    def __init__(self, records: Iterable[Any], columns: Sequence[str], where: str, bound: int) -> None:
        self._source, self._columns, self._where, self._bound = records, columns, where, bound
        self._iterator: Iterator[Any] | None = None
        self._ahead: Any = None  # the record after those that are held
        self._characters = 0
        self.records: list[Any] = []

    @property
    def whole(self) -> bool:
        """Whether there are no others."""
        return self._ahead is _END

    @property
    def full(self) -> bool:
        """Whether there is room for no more."""
        return self._characters > self._bound

    def grow(self, most: int) -> None:
        """Add records until there are ``most``, or as much text as so many of 16,384 characters have."""
        try:
            if self._iterator is None:
                self._iterator = iter(self._source)
                self._ahead = next(self._iterator, _END)
            bound = min(most * _AVERAGE, self._bound)
            while not self.whole and len(self.records) < most and self._characters <= bound:
                self._hold(self._ahead)
                self._ahead = next(self._iterator, _END)
        except DataError:
            raise
        except Exception as error:  # as of a record that a reader comes to
            raise DataError(f"document {len(self.records)} of {self._where} cannot be read: {reason(error)}") from error

    def _hold(self, record: Any) -> None:
        # One that lacks a column stays as it is, for the error of whoever reads it.
        if self._columns and isinstance(record, Mapping) and all(name in record for name in self._columns):
            record = {name: record[name] for name in self._columns}
            self._characters += sum(map(_characters, record.values()))
        else:
            self._characters += _characters(record)
        self.records.append(record)


def _characters(value: Any) -> int:
    """About how many there are in it: as many as a number has digits for each of several."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, (list, tuple)):
        numbers = not value or isinstance(value[0], int)
        return 4 * len(value) if numbers else sum(map(_characters, value))
    return 4 * math.prod(getattr(value, "shape", ()))
