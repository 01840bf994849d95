"""``metrics.jsonl`` as far as tables and pictures need it: also while it is written, torn, or cut back by a resume."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from saekit.errors import StorageError
from saekit.files.storage import check_file, parse_json

__all__ = ["History", "MetricsFile", "Piece", "Series", "read_history"]

_KEPT = ("losses/", "evals/", "details/current_")
_ALSO_KEPT = ("metrics/explained_variance", "metrics/l0", "sparsity/dead_features")
_MOST_SERIES = 200  # a stranger's eval may measure each feature
_TOKENS, _SECONDS = "details/n_training_tokens", "seconds"
_LONGEST_LINE = 1 << 24
_CONTEXT = 256  # bytes before the place that was read to, by which it is known again


@attrs.frozen
class Piece:
    """Some records that follow one another, as one."""

    x: float
    """The tokens at the last of them."""
    mean: float
    """nan: none of them had a number."""
    low: float
    high: float


class Series:
    """A metric over a run in a bounded number of pieces, each with its least and largest value: no spike is lost."""

    def __init__(self, most: int = 400) -> None:
        """``most`` pieces at least, if there are so many records, and twice as many at most."""
        self._most, self._width = most, 1
        self._x: list[float] = []
        self._sums: list[tuple[float, int, float, float]] = []  # total, how many, least, largest
        self._in_last = 0
        self.last = math.nan
        """The newest number."""

    def __len__(self) -> int:
        return len(self._x)

    def add(self, x: float, value: float) -> None:
        """Append ``value`` at ``x`` tokens; nan leaves a gap."""
        self.last = value
        one = (value, 1, value, value) if math.isfinite(value) else (0.0, 0, math.inf, -math.inf)
        if self._in_last == self._width or not self._x:
            self._x.append(x)
            self._sums.append(one)
            self._in_last = 1
            if len(self._x) > 2 * self._most:
                self._halve()
        else:
            self._x[-1], self._sums[-1] = x, _together(self._sums[-1], one)
            self._in_last += 1

    def _halve(self) -> None:
        """Every two pieces become one."""
        whole = len(self._x) % 2 == 0
        self._sums = [
            _together(self._sums[n], self._sums[n + 1]) if n + 1 < len(self._sums) else self._sums[n]
            for n in range(0, len(self._sums), 2)
        ]
        self._x = [self._x[min(n + 1, len(self._x) - 1)] for n in range(0, len(self._x), 2)]
        self._in_last += self._width if whole else 0
        self._width *= 2

    def pieces(self, most: int | None = None) -> list[Piece]:
        """What there is, the oldest first; no more than ``most``, if that is given, and the last ends at the last x."""
        at_once = 1 if most is None else -(-len(self._x) // most)
        found = []
        for n in range(0, len(self._x), at_once):
            total, number, low, high = self._sums[n]
            for other in self._sums[n + 1 : n + at_once]:
                total, number, low, high = _together((total, number, low, high), other)
            x = self._x[min(n + at_once, len(self._x)) - 1]
            found.append(Piece(x, total / number, low, high) if number else Piece(x, *[math.nan] * 3))
        return found


def _together(one: tuple[float, int, float, float], other: tuple[float, int, float, float]) -> Any:
    return one[0] + other[0], one[1] + other[1], min(one[2], other[2]), max(one[3], other[3])


class History:
    """What a run has logged of one SAE, in little memory however long it is."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.step = 0
        self.tokens = 0.0
        self.seconds = 0.0
        self.records = self.damaged = 0
        """Lines that are records, and lines that are none."""
        self.latest: dict[str, float] = {}
        """The newest number of every metric; nan where it was none."""
        self.series: dict[str, Series] = {}
        self.evals_at: float | None = None
        """The tokens at the newest evals."""
        self._pace: deque[tuple[float, float]] = deque(maxlen=600)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line.  One of a step before the newest was said already; one without a step says nothing."""
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
            self.damaged += 1
            return
        if step < self.step:
            return
        numbers = {name: _number(value) for name, value in record.items() if not isinstance(value, (dict, list, str))}
        tokens = numbers.get(_TOKENS, math.nan)
        if not (math.isfinite(tokens) and tokens >= self.tokens):  # evals do not say it
            tokens = self.tokens * (step / self.step) if self.step else self.tokens
        self.step, self.tokens = step, tokens
        self.records += 1
        seconds = numbers.pop(_SECONDS, math.nan)
        if math.isfinite(seconds):
            self.seconds = seconds
            self._pace.append((seconds, tokens))
        numbers.pop("step")
        self.latest |= numbers
        for name, value in numbers.items():
            if name.startswith(_KEPT) or name in _ALSO_KEPT:
                self._add(name, value)
        if any(name.startswith("evals/") for name in numbers):
            self.evals_at = tokens

    def _add(self, name: str, value: float) -> None:
        series = self.series.get(name)
        if series is None:
            if len(self.series) >= _MOST_SERIES:
                return
            series = self.series[name] = Series()
        series.add(self.tokens, value)

    def get(self, *names: str) -> float | None:
        """The newest number of the first of ``names`` that there is; None where that is none."""
        value = next((self.latest[name] for name in names if name in self.latest), math.nan)
        return value if math.isfinite(value) else None

    def rate(self, over: float = 60.0) -> float | None:
        """Tokens in a second, in the last ``over`` seconds of training; None where that cannot be told."""
        if not self._pace:
            return None
        end, tokens = self._pace[-1]
        start, before = next(((s, t) for s, t in self._pace if s >= end - over), self._pace[-1])
        if end - start < 1.0:
            start, before = self._pace[0]
        return (tokens - before) / (end - start) if end > start and tokens > before else None


def _number(value: object) -> float:
    """``value`` as a finite number, or nan: JSON has no nan, so a tracker writes null."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # a whole number of many digits
        return math.nan


class MetricsFile:
    """Reads what has come to a file of metrics since it was read the last time, and nothing twice.

    Half a line at the end is left for the next time.  A file that was cut or written anew, as a run does that goes on,
    is read from its beginning: it does not hold any more, before the place that was read to, what it held.
    """

    def __init__(self, path: Path, *, last: int | None = None) -> None:
        """``last``: of a file that is larger, so many bytes at its end are enough."""
        self.path, self._last = path, last
        self._offset, self._before = 0, b""

    def update(self, history: History) -> bool:
        """Add new records to ``history``, which forgets what is not in the file any more; whether there was anything.

        A file that is not there holds nothing.  Raises :class:`StorageError` for one that cannot be read.
        """
        try:
            check_file(self.path)
            with self.path.open("rb") as file:
                return self._update(file, history)
        except FileNotFoundError:
            gone = self._offset > 0
            self._forget(history)
            return gone
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def _update(self, file: BinaryIO, history: History) -> bool:
        length = os.fstat(file.fileno()).st_size
        anew = not self._goes_on(file)
        if anew:
            self._forget(history)
        if not self._offset and self._last is not None and length > self._last:
            file.seek(length - self._last)
            cut = file.readline(_LONGEST_LINE)  # the rest of a line
            self._offset, self._before = length - self._last + len(cut), cut[-_CONTEXT:]
        file.seek(self._offset)
        start = self._offset
        while line := file.readline(_LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                break  # it is still being written
            self._offset += len(line)
            self._before = (self._before + line)[-_CONTEXT:]
            record = _record(line)
            if record is None:
                history.damaged += 1
            else:
                history.add(record)
        return anew or self._offset > start

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the file is still the one that was read, as far as it was read."""
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _forget(self, history: History) -> None:
        self._offset, self._before = 0, b""
        history.clear()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:  # it was torn when a run was killed, or the disk was full
        return None
    return record if isinstance(record, dict) else None


def read_history(path: Path, *, last: int | None = None) -> History:
    """All that a file of metrics says, or what its ``last`` bytes do; one that is not there says nothing.

    Raises :class:`StorageError` for one that cannot be read.
    """
    history = History()
    MetricsFile(path, last=last).update(history)
    return history
