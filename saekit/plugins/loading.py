"""The entry points of the installed distributions, read so that a damaged one hides no other, and imported watched."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import attrs

from saekit.cautions import stands_between
from saekit.errors import PluginError
from saekit.plugins.text import normalized, printable, short
from saekit.reasons import last_line

__all__ = ["Point", "installed_points", "watched"]

_GROUP = "saekit"
_SLOW = 0.5
"""Seconds from which the time that a plugin takes to load is told."""


@attrs.frozen
class Point:
    """One entry point and the distribution that it is from."""

    distribution: str
    version: str
    name: str
    value: str
    found: Any
    """The :class:`importlib.metadata.EntryPoint`, or None where the distribution's files cannot be read."""
    fault: str | None = None
    """Why it cannot be used."""

    @property
    def plugin(self) -> str:
        """``distribution:entry point``."""
        return f"{self.distribution}:{self.name}" if self.name else self.distribution

    def load(self) -> object:
        """Import it.  Raises whatever the stranger's module raises, and :class:`PluginError` for :attr:`fault`."""
        if self.fault is not None:
            raise PluginError(self.fault)
        found: object = self.found.load()
        stands_between(self.found.value.partition(":")[0])
        return found


def installed_points() -> list[Point]:
    """Every entry point of saekit's group, sorted by distribution, name and value: the order decides nothing."""
    try:
        found = list(importlib.metadata.entry_points(group=_GROUP))
        points: list[Point] = []
    except Exception:  # one distribution, of saekit or not, has an entry_points.txt that cannot be read
        found, points = _one_by_one()
    # Reading a distribution's name parses its whole metadata, so once for each.
    owners = {key: _owner(dist) for key, dist in {id(point.dist): point.dist for point in found}.items()}
    names = [name for name, _ in owners.values()]
    for point in found:
        name, version = owners[id(point.dist)]
        fault = _fault(point, name, shared=names.count(name) > 1)
        points.append(Point(name, version, printable(point.name), point.value, point, fault))
    return sorted(points, key=lambda point: (point.distribution, point.name, point.value))


def _one_by_one() -> tuple[list[Any], list[Point]]:
    """The entry points of each distribution by itself, and the distributions whose own cannot be read."""
    found: list[Any] = []
    damaged = []
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name, version = _owner(distribution)
        if name in seen:  # the first on the path hides the others
            continue
        seen.add(name)
        try:
            found += distribution.entry_points.select(group=_GROUP)
        except Exception as error:
            if _may_be_ours(distribution):
                why = f"its entry_points.txt cannot be read ({last_line(error)}); install it again"
                damaged.append(Point(name, version, "", "", None, why))
    return found, damaged


def _may_be_ours(distribution: importlib.metadata.Distribution) -> bool:
    try:
        return f"[{_GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return True


def _owner(distribution: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """The distribution's name, normalized so that a key has one spelling, and its version, as they can be shown."""
    try:
        metadata: Any = (distribution.metadata if distribution is not None else None) or {}
        name, version = metadata.get("Name"), metadata.get("Version")
    except Exception:  # a METADATA that is missing or no text
        name, version = None, None
    return normalized(printable(name or "unknown")), printable(version or "")[:60]


def _fault(point: Any, distribution: str, *, shared: bool) -> str | None:
    if shared and not _is_listed(point, distribution):
        return f"its metadata says that it is {distribution}, which is another distribution that is installed here"
    if isinstance(point, importlib.metadata.EntryPoint) and not point.pattern.match(point.value):
        return f"its entry point is {short(point.value)}, expected a module, such as my_package.my_module"
    return None


def _is_listed(point: Any, distribution: str) -> bool:
    """Whether the distribution that Python knows by that name has the entry point, too."""
    try:
        known = importlib.metadata.distribution(distribution).entry_points.select(group=_GROUP)
    except Exception:
        return True
    return (point.name, point.value) in {(own.name, own.value) for own in known}


# ---- what a module does on the side


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Keeps standard output and warnings of strangers' code apart; the list is filled with what is worth telling.

    What it prints is held back, since commands print what programs read.  Its warnings are shown where warnings are
    shown, and stop nothing where they are errors.
    """
    notes: list[str] = []
    had_torch = "torch" in sys.modules
    start = time.perf_counter()
    try:
        with _held_output(notes), _held_warnings(notes):
            yield notes
    finally:
        seconds = time.perf_counter() - start
        if "torch" in sys.modules and not had_torch:
            notes.append("imports torch at discovery, which slows every command: import it inside build")
        if seconds > _SLOW:
            notes.append(f"took {seconds:.1f} s to import, in every command: import heavy packages inside build")


class _Held:
    """In the place of standard output: holds what this thread prints, until it is released."""

    def __init__(self, real: Any) -> None:
        self._real, self._thread, self.parts = real, threading.get_ident(), list[str]()
        self.holding = True

    def write(self, text: str) -> int:
        if self.holding and threading.get_ident() == self._thread:
            self.parts.append(str(text))
            return len(text)
        return int(self._real.write(text))  # a log handler that was made meanwhile goes on working

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def _held_output(notes: list[str]) -> Iterator[None]:
    if sys.stdout is None:  # no console at all
        yield
        return
    held = _Held(sys.stdout)
    try:
        with _descriptor_elsewhere(), contextlib.redirect_stdout(held):
            yield
    finally:
        held.holding = False
        if text := "".join(held.parts).strip():
            notes.append(f"printed while it was loaded, which was held back: {short(text, 200)}")


@contextlib.contextmanager
def _descriptor_elsewhere() -> Iterator[None]:
    """What bypasses Python (a library in C, a command that is started) goes to standard error meanwhile.

    Only in a program of one thread whose output is the process's own, as saekit's commands are.
    """
    saved = None
    own: Any = sys.__stdout__
    if sys.stdout is own and threading.active_count() == 1:
        with contextlib.suppress(OSError, ValueError):  # closed, or no descriptor at all
            own.flush()
            saved = os.dup(1)
            os.dup2(2, 1)
    try:
        yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


@contextlib.contextmanager
def _held_warnings(notes: list[str]) -> Iterator[None]:
    before = list(warnings.filters)
    added: list[Any] = []
    raised: dict[tuple[str, str, int], warnings.WarningMessage] = {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            own = warnings.filters[0]
            try:
                yield
            finally:
                raised = {(str(w.message), w.filename, w.lineno): w for w in caught}
                added = [entry for entry in warnings.filters if entry is not own and entry not in before]
    finally:
        if added:  # what packages ask for when they are imported stays
            warnings.filters[:0] = added  # type: ignore[index]
            with warnings.catch_warnings():  # tells Python that the filters have changed
                pass
        for warning in raised.values():
            notes.append(f"warned while it was loaded: {warning.category.__name__}: {short(str(warning.message), 200)}")
            with contextlib.suppress(Warning):  # where warnings are errors, those of strangers are none
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
