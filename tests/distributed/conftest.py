"""Processes that are started once for all tests of a file, whoever of pytest's workers runs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import Results, once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked ``processes`` takes many launches: ``make test-processes`` runs it, the suite a part."""
    if "SAEKIT_PROCESSES" not in os.environ:
        for item in items:
            if item.get_closest_marker("processes"):
                item.add_marker(pytest.mark.skip(reason="make test-processes runs it"))


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the calls of this file leave what they write; pytest's workers share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return base / request.module.__name__.rpartition(".")[-1]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, folder: Path) -> Results:
    """What each process made of the calls that the file's ``calls(folder)`` names, by their labels.

    There are two of them, or as many as the file's ``SIZE`` says.
    """
    return once(folder, request.module.calls, getattr(request.module, "SIZE", 2))


_WORST: dict[tuple[tuple[int, int], str], tuple[float, str]] = {}
"""By mesh and by what is compared, the largest deviation from one process, and of what it is."""


@pytest.fixture
def worst() -> Callable[[tuple[int, int], str, float, str], None]:
    """Takes note of a deviation; the largest are told at the end."""

    def note(mesh: tuple[int, int], kind: str, off: float, of: str) -> None:
        if not off <= _WORST.get((mesh, kind), (-1.0, ""))[0]:
            _WORST[mesh, kind] = off, of

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The largest deviations, where all was compared in this process."""
    for ((data, features), kind), (off, of) in sorted(_WORST.items()):
        terminalreporter.write_line(f"data {data} features {features}: {kind} off by {off:.1e} at most, {of}")
