"""How long a command says nothing: the time to its first output, and its longest silences, with what came before them.

    python tests/bench/gaps.py                    # saekit demo, as lines in a file, and in a terminal
    python tests/bench/gaps.py train run.toml     # another command

Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import row

_SHOWN = 6
_CONTROL = re.compile(r"\x1b\[\??[0-9;]*[a-zA-Z]|\r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run; by default: demo")
    command = parser.parse_args().command or ["demo"]
    with tempfile.TemporaryDirectory() as folder:
        for name, terminal in (("lines", False), ("terminal", True)):
            where = Path(folder, name)
            where.mkdir()
            print(f"== saekit {' '.join(command)}: {name}")
            seen = watch([sys.executable, "-W", "ignore", "-m", "saekit.cli", *command], where, terminal=terminal)
            report(seen, f"saekit {' '.join(command)}", name)


def watch(command: list[str], folder: Path, *, terminal: bool) -> list[tuple[float, str]]:
    """What came from the command's output and error streams, each with the seconds since its start; an empty last."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    start = time.perf_counter()
    environment = os.environ | ({"TERM": "xterm-256color", "COLUMNS": "100"} if terminal else {})
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen: list[tuple[float, str]] = []
    while True:
        select.select([ours], [], [])
        try:
            data = os.read(ours, 65536)
        except OSError:  # as a terminal ends
            data = b""
        if not data:
            break
        seen.append((time.perf_counter() - start, data.decode(errors="replace")))
    process.wait()
    os.close(ours)
    return [*seen, (time.perf_counter() - start, "")]


def report(seen: list[tuple[float, str]], command: str, case: str) -> None:
    """Print the figures."""
    times = [0.0, *(at for at, _ in seen)]
    before = ["the start", *(_last_line(text) for _, text in seen)]
    gaps = sorted(((b - a, a, text) for a, b, text in zip(times, times[1:], before, strict=False)), reverse=True)
    print(f"first output after {seen[0][0]:.2f} s, all of it in {times[-1]:.1f} s; the longest silences:")
    found = {"first output, s": seen[0][0], "all of it, s": times[-1], "longest silence, s": gaps[0][0]}
    row(command, case, {**found, "after": gaps[0][2]})
    for gap, at, text in gaps[:_SHOWN]:
        print(f"  {gap:5.2f} s from {at:6.1f} s on, after: {text}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in _CONTROL.sub("\n", text).splitlines() if line.strip()]
    return lines[-1][:90] if lines else "nothing that can be seen"


if __name__ == "__main__":
    main()
