"""The versions that saekit is tested with are written down: all of them, and those that are there."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = ("mamba", "wandb", "test", "docs")
SEEDED = {"pip", "setuptools"}  # a new environment may have them, of whatever version its Python brings


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def direct() -> list[str]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]


def needed() -> dict[str, str]:
    """Every distribution that saekit needs here, in turn, with the version that is installed."""
    found: dict[str, str] = {}
    waiting = [(text, ("",)) for text in direct()]
    seen = set()
    while waiting:
        text, extras = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = normalized(requirement.name)
        asked = (name, frozenset(requirement.extras))
        if asked in seen:
            continue
        seen.add(asked)
        found[name] = importlib.metadata.version(name)
        waiting += [(more, ("", *requirement.extras)) for more in importlib.metadata.requires(name) or ()]
    return {name: version for name, version in found.items() if name not in SEEDED}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {normalized(requirement.name): requirement for requirement in parsed}


def test_every_package_has_a_tested_version() -> None:
    assert sorted(set(needed()) - set(constraints())) == []
    assert all(str(requirement.specifier).startswith("==") for requirement in constraints().values())


@pytest.mark.skipif(not (Path(sys.prefix) / ".installed").exists(), reason="make has not made this environment")
def test_the_tested_versions_are_the_installed_ones() -> None:
    written = constraints()
    other = [f"{name} {version}, not {written[name]}" for name, version in needed().items()
             if name in written and not written[name].specifier.contains(version, prereleases=True)]  # fmt: skip
    assert other == []


def test_the_tested_versions_are_allowed() -> None:
    written = constraints()
    for text in direct():
        requirement = Requirement(text)
        (pin,) = written[normalized(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version, prereleases=True), text
