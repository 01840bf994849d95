"""What there is to say of several SAEs that train together: each thing once, with those that have it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from saekit.data.faults import problems_of
from saekit.errors import SaekitError

__all__ = ["Findings", "of_all", "of_some"]

_T = TypeVar("_T")
_SHOWN = 3  # names, or kinds of what differs, that are told one by one
_LONGEST = 40  # letters of a name that stands beside what is told of it
_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\w)")
"""A number that is a word of its own, no part of a name."""


def of_some(text: str, having: Collection[str], names: Collection[str]) -> str:
    """``text`` that is said of those ``having`` it, who are named where they are not all of ``names``."""
    return text if len(having) == len(names) else f"{_named(having)}: {text}"


def _named(names: Collection[str]) -> str:
    first = list(names)
    if len(first) > _SHOWN:
        first = [*first[: _SHOWN - 1], f"{len(first) - _SHOWN + 1} more SAEs"]
    return " and ".join([", ".join(first[:-1]), first[-1]] if len(first) > 1 else first)


def of_all(texts: Mapping[str, str], names: Collection[str]) -> str:
    """One text for those of each SAE, by its name; those without one are left out.

    What all have is said once; of few kinds, whose each is; of many that differ in numbers alone, from where to where
    these go.
    """
    kinds: dict[str, list[str]] = {}
    for name, text in texts.items():
        kinds.setdefault(text, []).append(name)
    if len(kinds) == 1 and len(texts) == len(names):
        return next(iter(kinds))
    if len(kinds) > _SHOWN and (found := _from_to(list(kinds))) is not None:
        return found
    told = [f"{text} ({_short(own[0]) if len(own) == 1 else f'{len(own)} SAEs'})" for text, own in kinds.items()]
    if len(told) > _SHOWN:
        told = [*told[: _SHOWN - 1], f"{len(told) - _SHOWN + 1} others"]
    return "; ".join(told)


def _short(name: str) -> str:
    """The beginning of a long name, which has its number."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _from_to(texts: Sequence[str]) -> str | None:
    """One text with the least and the largest of each number; None where words differ, too."""
    if len({_NUMBER.sub("#", text) for text in texts}) > 1:
        return None
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    ranges = [sorted(set(column), key=lambda number: float(number.replace(",", ""))) for column in columns]
    told = iter([own[0] if len(own) == 1 else f"{own[0]} to {own[-1]}" for own in ranges])
    return _NUMBER.sub(lambda _: next(told), texts[0])


class Findings:
    """Problems and doubts, and the SAEs that have them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._problems: dict[str, dict[str, None]] = {}
        self._doubts: dict[str, dict[str, None]] = {}
        self._whose: tuple[SaekitError, Collection[str]] | None = None

    def attempt(self, work: Callable[[], _T], of: Collection[str] = ()) -> _T | None:
        """``work()``, which is for the SAEs ``of`` these names, by default all; None with its error among the
        problems."""
        try:
            return work()
        except SaekitError as error:
            whose, self._whose = self._whose, None
            of = of or (whose[1] if whose is not None and whose[0] is error else ())
            for path, message in problems_of(error):
                self._note(self._problems, f"{path}: {message}" if path else message, of)
        return None

    @contextlib.contextmanager
    def about(self, names: Collection[str]) -> Iterator[None]:
        """An error that is raised meanwhile, and comes to :meth:`attempt`, is a problem of the SAEs of these names."""
        try:
            yield
        except SaekitError as error:
            self._whose = error, names
            raise

    def doubt(self, *texts: str, of: Collection[str] = ()) -> None:
        """What looks wrong, but would run."""
        for text in texts:
            self._note(self._doubts, text, of)

    def _note(self, found: dict[str, dict[str, None]], text: str, of: Collection[str]) -> None:
        found.setdefault(text, {}).update(dict.fromkeys(of or self.names))

    @property
    def problems(self) -> list[str]:
        """Each once."""
        return [of_some(text, own, self.names) for text, own in self._problems.items()]

    @property
    def warnings(self) -> list[str]:
        """Likewise."""
        return [of_some(text, own, self.names) for text, own in self._doubts.items()]
