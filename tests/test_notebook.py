"""The example notebook runs in a kernel of its own, and its features do what they seem to stand for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_sae.ipynb"
EXECUTE = """
import sys
import nbclient, nbformat

notebook = nbformat.read(sys.argv[1], 4)
place = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
nbformat.write(notebook, sys.argv[3])
"""


def cells(notebook: Path) -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def texts(cell: dict[str, Any]) -> str:
    """What a cell shows, as text."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "\n".join("".join(lines) for lines in shown)


def assert_good(notebook: Path) -> None:
    shown = "\n".join(map(texts, cells(notebook)))
    assert float(re.search(r"EV ([\d.]+), L0", shown)[1]) > 0.7  # type: ignore[index]
    before, after = re.search(r"([\d.]+)% -> +([\d.]+)%", shown).groups()  # type: ignore[union-attr]
    assert float(after) < float(before)


def test_the_notebook_shows_what_it_gave() -> None:
    assert all(cell["outputs"] for cell in cells(NOTEBOOK))
    assert not [output for cell in cells(NOTEBOOK) for output in cell["outputs"] if output.get("name") == "stderr"]
    assert_good(NOTEBOOK)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nbclient") is None or find_spec("ipykernel") is None, reason="the extra test has both")
def test_the_notebook_runs(tmp_path: Path) -> None:
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-c", EXECUTE, NOTEBOOK, tmp_path, executed]
    found = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert_good(executed)
