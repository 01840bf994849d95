"""What is said on the error stream, and how work that is interrupted ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from saekit.plugins.text import printable

__all__ = ["complain", "interruptible"]


def complain(text: str) -> None:
    """A line or several on the error stream."""
    sys.stderr.write(printable(text.rstrip(), keep="\n\t") + "\n")  # strangers' texts are among them


@contextmanager
def interruptible(message: str = "interrupted") -> Iterator[None]:
    """Says where the work is after Ctrl-C or SIGTERM, and exits with 130 or 143; typer would exit without a word."""
    received = [signal.SIGINT]

    def terminate(number: int, frame: object) -> None:
        received[0] = signal.SIGTERM
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        complain(str(error) or message)
        raise typer.Exit(128 + getattr(error, "signal", received[0])) from error
    finally:
        signal.signal(signal.SIGTERM, previous)
