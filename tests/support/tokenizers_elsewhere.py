"""Tokenizers of tests that other processes import: what they are given by name must be in a module."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from saekit.errors import DataError
from saekit.testing import FakeBackend

__all__ = ["ElsewhereBackend", "codes", "ended_at_x", "refusing_x"]


def codes(text: str) -> list[int]:
    """Each character a token; in another process it also prints, as libraries do."""
    if "pytest" not in sys.modules:
        print("tokenizing")
    return [ord(character) % 128 for character in text]


def refusing_x(text: str) -> list[int]:
    if "x" in text:
        raise DataError("there is an x in it")
    return codes(text)


def ended_at_x(text: str) -> list[int]:
    """As where the system ends a process, which is none of pytest's."""
    if "x" in text and "pytest" not in sys.modules:
        os.kill(os.getpid(), signal.SIGKILL)
    return codes(text)


class ElsewhereBackend(FakeBackend):
    """A tiny model whose tokenizer other processes have, too."""

    def tokenize(self, text: str) -> list[int]:
        return codes(text)

    def tokenizing(self) -> Callable[[str], Sequence[int]]:
        return codes
