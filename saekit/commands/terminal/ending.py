"""What is said on the error stream, and how work that is interrupted ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from saekit.plugins.text import printable

__all__ = ["complain", "interruptible", "last_words"]

_FIRST_SPEAKS = 5.0
"""Seconds in which the first process of a machine has found what another has found."""


def complain(text: str) -> None:
    """A line or several on the error stream."""
    sys.stderr.write(printable(text.rstrip(), keep="\n\t") + "\n")  # strangers' texts are among them


def last_words(error: BaseException, text: str) -> None:
    """Say what has ended the work, of several processes one for all; ``text`` begins with what it is.

    Of what ends each before it has met the others, it is the first of each machine that says it: whoever started them
    ends the others then.
    """
    if "WORLD_SIZE" not in os.environ:
        complain(text)
        return
    from saekit.distributed.launched import Launched  # not at every start
    from saekit.distributed.telling import told_by

    telling = told_by(error)
    if telling is None:
        if Launched.here(os.environ).local_rank:
            if isinstance(error, KeyboardInterrupt):
                return
            time.sleep(_FIRST_SPEAKS)
        complain(text)
    elif words := telling.words(error, text):
        complain(words)
        telling.said()


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
        _leaves(error)
        last_words(error, str(error) or message)
        raise typer.Exit(128 + getattr(error, "signal", received[0])) from error
    except BaseException as error:
        _leaves(error)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, previous)


def _leaves(error: BaseException) -> None:
    """One of several processes has ended: what it has to say, and its own code, come before a signal to end."""
    from saekit.distributed.telling import told_by

    if told_by(error) is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
