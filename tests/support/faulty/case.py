"""A plugin with a fault, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from saekit.testing import fake_plugin


@attrs.frozen
class Case:
    """A fault."""

    check: str
    """The name of the check that finds it."""
    says: str
    """Of the report, a regular expression."""
    plugin: object
    given: Callable[[Path], dict[str, Any]] = lambda folder: {}
    """What else the checks are given, with an empty folder."""


def cases(kind: str, faults: dict[str, tuple[str, Callable[..., Any]]], **entry: Any) -> list[Case]:
    """By the name of the check: what is said, and how the faulty thing is built."""
    return [Case(check, says, fake_plugin(kind, build=build, **entry)) for check, (says, build) in faults.items()]
