"""The command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import warm


def cli(
    *arguments: object, cwd: Path | None = None, check: int = 0, watch: bool = False, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``saekit``; with ``watch``, fail if it imports torch or transformer_lens; ``cold``: in a new interpreter."""
    if cold:
        found = _cold(list(map(str, arguments)), cwd, watch)
    else:
        found = warm.python("-m", "saekit.cli", *arguments, cwd=cwd, watch=watch)
    assert found.returncode == check, found.stderr
    return found


def _cold(arguments: list[str], cwd: Path | None, watch: bool) -> subprocess.CompletedProcess[str]:
    options = ["-X", "importtime"] if watch else []
    found = subprocess.run(
        [sys.executable, *options, "-m", "saekit.cli", *arguments], capture_output=True, text=True, cwd=cwd
    )
    if watch:
        imported = {
            line.rpartition("|")[2].strip() for line in found.stderr.splitlines() if line.startswith("import time:")
        }
        assert not imported & {*warm.HEAVY}, sorted(imported & {*warm.HEAVY})
        found.stderr = "".join(f"{line}\n" for line in found.stderr.splitlines() if not line.startswith("import time:"))
    return found
