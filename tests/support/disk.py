"""What is written is not waited for until the disk has it.

That outlives a power cut, which no test can make; what a process leaves that is killed, every other process sees at
once.  Waiting took one second in thirty-five of the suite, and more where a disk is slow.
"""

from __future__ import annotations

import os

wait_for = os.fsync


def fsync(handle: int) -> None:
    """A handle that is none is an error, as ever."""
    os.fstat(handle)


def wait_no_more() -> None:
    """From now on, in this process and in its forks."""
    os.fsync = fsync
