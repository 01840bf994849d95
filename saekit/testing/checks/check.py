"""What a check is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import attrs

from saekit.plugins.building import built
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.site import Site

__all__ = ["Check", "Checks", "Fault", "NotTried", "Subject", "must"]

C = TypeVar("C", bound="Callable[[Subject], None]")


class Fault(AssertionError):  # noqa: N818 - the plugin's, not an error of ours
    """What a plugin does is not what its kind promises."""


class NotTried(Exception):  # noqa: N818 - not an error
    """A check that says nothing of this plugin, and why."""


@attrs.frozen(eq=False)
class Subject:
    """An entry of a plugin with options to try it with."""

    item: Registered
    options: Any
    plugins: PluginManager
    """With the plugin, and saekit's own."""
    place: Path
    """An empty folder, for this check alone."""
    model: object | None = None
    """Of a backend: what it is to run, or a :class:`saekit.config.ModelConfig` that names it."""
    folders: tuple[Path, ...] = ()
    """Of a loader: SAEs of its format."""
    sites: tuple[Site, ...] = ()
    """Of a source with data of its own: those that it has."""
    known: dict[object, Any] = attrs.field(factory=dict)
    """What a check has found out of the entry with these options, for those after it."""

    def build(self, **services: Any) -> Any:
        """What the entry builds, with its kind's services."""
        return built(self.item, self.plugins.with_choices(self.options, self.item), **services)


@attrs.frozen
class Check:
    """One promise."""

    name: str
    promise: str
    """In words."""
    run: Callable[[Subject], None]
    """Raises a :class:`Fault` that says what was found and what was expected; whatever else it raises is one, too."""


class Checks:
    """The checks of a kind, in order.  When the first, which builds the plugin, fails, the others are left out."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    def add(self, function: C) -> C:
        """A decorator: the function's name and docstring are those of the check."""
        self._checks.append(Check(function.__name__, " ".join((function.__doc__ or "").split()), function))
        return function

    def extend(self, others: Checks) -> None:
        """With the checks of another file."""
        self._checks += others

    def __iter__(self) -> Iterator[Check]:
        return iter(self._checks)


def must(fine: object, found: str) -> None:
    """A :class:`Fault` that says what was ``found``, unless all is ``fine``."""
    if not fine:
        raise Fault(found)
