"""The tests of the suite that run on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

FILES = ["kernels/test_gpu_steps.py", "kernels/test_triton.py", "kernels/test_sparse_products.py"]


def tests(device: str, *, quick: bool) -> dict[str, Any]:
    """Those of :data:`FILES`, which lie beside this in a bundle or above it in the repository."""
    here = Path(__file__).resolve().parent
    root = here / "tests" if (here / "tests").is_dir() else here.parent
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        return {"ok": False, "error": f"{' and '.join(missing)} cannot be imported"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["--collect-only"] if quick else [])]
    done = subprocess.run(
        [*command, *(str(root / name) for name in FILES)], capture_output=True, text=True, check=False, cwd=root.parent
    )
    lines = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "text": lines[-1] if lines else done.stderr[-300:], "output": lines[-40:]}
