"""The command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def cli(
    *arguments: object, cwd: Path | None = None, check: int = 0, watch: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``saekit``; with ``watch``, fail if it imports torch or transformer_lens."""
    options = ["-X", "importtime"] if watch else []
    found = subprocess.run(
        [sys.executable, *options, "-m", "saekit.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )
    if watch:
        imported = {
            line.rpartition("|")[2].strip() for line in found.stderr.splitlines() if line.startswith("import time:")
        }
        heavy = {"torch", "transformer_lens", "transformers", "datasets"}
        assert not imported & heavy, sorted(imported & heavy)
        found.stderr = "".join(f"{line}\n" for line in found.stderr.splitlines() if not line.startswith("import time:"))
    assert found.returncode == check, found.stderr
    return found
