"""Processes that are started once for all tests of a file, whoever of pytest's workers runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.processes import Results, once


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
