"""Distributions that tests build and install for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0"

[project.entry-points.saekit]
{points}

[tool.hatch.build.targets.wheel]
only-include = {files}
"""


def project(folder: Path, name: str, modules: dict[str, str], **points: str) -> Path:
    """A project ``name`` in ``folder`` with ``modules`` (file name to source) and entry points (name to module)."""
    home = folder / name
    home.mkdir(parents=True)
    lines = "\n".join(f'{point} = "{module}"' for point, module in points.items())
    (home / "pyproject.toml").write_text(PYPROJECT.format(name=name, points=lines, files=list(modules)))
    for file, source in modules.items():
        (home / file).write_text(source)
    return home


def install(projects: list[Path], target: Path, python: str = sys.executable) -> None:
    """Install ``projects`` (folders or wheels) into the folder ``target``, without their dependencies."""
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(target), *map(str, projects)]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
