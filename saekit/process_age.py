"""How long the process is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["process_age"]


def process_age() -> float:
    """Seconds since this process was started, that of its interpreter included.

    Where the system does not tell (it does on Linux), those that it was at work, which until its libraries are imported
    are nearly all.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the system began; see proc(5), starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()
