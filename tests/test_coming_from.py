"""What the pages for people who come from other libraries name on saekit's side is there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import saekit
from saekit.config import PretokenizeConfig, TrainConfig
from saekit.config.elsewhere import option_paths
from saekit.features.feature import Feature

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/coming-from-*.md"))
ABSENT = ("not here", "not here yet", "not needed")


def named(page: Path) -> Iterator[str]:
    """Everything in backticks in the column of saekit, of every table that has one; and options in the text below."""
    text = page.read_text(encoding="utf-8")
    for table in re.findall(r"^\| [^|\n]+ \| saekit \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text, re.M):
        for row in table.splitlines():
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            assert len(cells) in (2, 3), row
            found = re.findall(r"`([^`]+)`", cells[1])
            assert found or cells[1].rstrip(" |") in (*ABSENT, "found out from the data"), row
            yield from found
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    yield from re.findall(r"`((?:sae|training|activations|optimizer|evals|dataset|checkpoints)\.\w[^`]*)`", prose)


@cache
def options() -> dict[str, set[str]]:
    """The paths of all options by their first word."""
    plugins = saekit.default_manager()
    paths = [
        path for kind in (TrainConfig, PretokenizeConfig) for at in option_paths(kind, plugins).values() for path in at
    ]
    return {
        first: {path for path in paths if path.split(".")[0] == first} for first in (p.split(".")[0] for p in paths)
    }


def is_there(name: str) -> bool:
    """Whether ``name`` is an option, one with a value, a method of SAEs, a call, or a command of saekit."""
    if command := re.match(r"saekit ([\w-]+)", name):
        return f'"{command[1]}"' in (ROOT / "saekit/cli.py").read_text(encoding="utf-8")
    if name.startswith("saekit."):
        thing: object = saekit
        for part in re.match(r"[\w.]+", name)[0].split(".")[1:]:  # type: ignore[index]
            thing = getattr(thing, part) if hasattr(thing, part) else __import__(f"saekit.{part}", fromlist=[part])
        arguments = re.findall(r"(\w+)=", name)
        return all(argument in inspect.signature(thing).parameters for argument in arguments)  # type: ignore[arg-type]
    if about := re.match(r"sae\.info\.(\w+)", name):
        return hasattr(saekit.SAEInfo, about[1])
    if about := re.match(r"sae\.sites?(?:\.(\w+))?$", name):
        return about[1] is None or about[1] in saekit.Site.__annotations__
    if own := re.match(r"sae\.(W_enc|threshold)\b", name):
        return hasattr(saekit.SAE.from_dict({"name": "batchtopk", "d_in": 2, "d_sae": 4, "k": 1}), own[1])
    if name.startswith("feature."):
        return all(hasattr(Feature, word) for word in re.findall(r"feature\.(\w+)", name))
    if name == "sae.use_error_term" or re.match(r"sae(\.\w+)?\(", name):
        words = re.findall(r"\w+", name)
        return words[1] == "use_error_term" or hasattr(saekit.SAE, words[1])
    path, value = (part.strip(' "') for part in name.partition("=")[::2])
    if path == "sae.name":  # which chooses the options' class
        return not value or bool(saekit.default_manager().get("sae_architectures", value))
    return path in options().get(path.split(".")[0], set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_is_there(page: Path) -> None:
    names = list(named(page))
    assert len(names) > 30, "the tables are not found"
    assert [name for name in names if not is_there(name)] == []


@pytest.mark.parametrize(
    "name", ["sae.kk", "nowhere.lr", "training.k", "saekit trian", "saekit.train(config, modell=...)", "sae.encoed(x)"]
)
def test_what_is_not_there_is_seen(name: str) -> None:
    assert not is_there(name)
