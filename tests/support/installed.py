"""Distributions that tests build and install for real, or write as pip would leave them."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

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


def written(home: Path, target: Path) -> None:
    """What :func:`install` leaves of a :func:`project` in ``target``, as far as anyone asks for it: in no time."""
    with (home / "pyproject.toml").open("rb") as file:
        told = tomllib.load(file)
    name, version = told["project"]["name"], told["project"]["version"]
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    points = "".join(f"{key} = {value}\n" for key, value in told["project"]["entry-points"]["saekit"].items())
    (info / "entry_points.txt").write_text(f"[saekit]\n{points}")
    for file in told["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        shutil.copy(home / file, target / file)


def run(*command: object, **options: object) -> str:
    """What ``command`` prints; it must succeed."""
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert found.returncode == 0, found.stderr
    return found.stdout


def built_wheel(folder: Path) -> Path:
    """saekit's own, built into ``folder``."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def fresh_environment(folder: Path, *projects: Path) -> tuple[Path, Path, dict[str, str]]:
    """An environment in ``folder`` with ``projects`` (folders or wheels): its Python, its packages, its variables."""
    venv.create(folder / "env", with_pip=False, symlinks=True)  # pip of this environment does for it
    python = folder / "env" / "bin" / "python"
    # torch and the like come from this environment instead of being downloaded again: a path in a .pth file adds its
    # packages behind the fresh ones, and does not run the .pth file that makes saekit importable from the checkout.
    (fresh,) = (folder / "env").glob("lib/python*/site-packages")
    (fresh / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "--no-compile", "--ignore-installed", "--disable-pip-version-check", *projects,
        cwd=folder, env=environment)  # fmt: skip
    return python, fresh, environment
