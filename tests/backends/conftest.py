"""Fixtures of the tests of models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.compiled import Counted, use


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that was compiled before is there, nor afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    use(counted, monkeypatch)
    return counted
