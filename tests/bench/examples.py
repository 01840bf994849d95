"""How well and how fast the examples of the documentation train: ``python tests/bench/examples.py [PAGE ...]``.

Each page is followed word for word in a process of its own; for every training the held-out explained variance, seconds
by the clock and of all processors, and the seconds since the process began, imports included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/index.md", "docs/getting-started.md", "docs/data.md", "docs/training.md"]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    from support.follow import script_of

    for page in sys.argv[1:] or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            script = Path(folder) / "page.py"
            script.write_text(script_of(ROOT / page, results), encoding="utf-8")
            path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
            found = subprocess.run(
                [sys.executable, script],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
            )
            print(page, "" if found.returncode == 0 else f"failed:\n{found.stderr[-2000:]}")
            for one in json.loads(results.read_text()) if results.exists() else ():
                variance = ", ".join(f"{value:.3f}" for value in one["explained_variance"])
                print(f"  EV {variance:30} {one['seconds']:6.1f} s  {one['processor']:6.1f} s of processors  "
                      f"{one['since_start']:6.1f} s after the start")  # fmt: skip


if __name__ == "__main__":
    main()
