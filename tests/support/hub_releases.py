"""Fixtures as releases of the registry: on a fake Hub, under the names and paths that the registry gives them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.fake_hub import FakeHub, fake_hub
from support.formats import FIXTURES, NOT_OF_THE_FORMAT

from saekit.pretrained.catalog import Catalog, find_sae


@attrs.frozen
class Published:
    """One SAE of the registry, and the fixture that stands for it."""

    release: str
    sae_id: str
    fixture: str
    at: str = ""
    """Where the files that go to its path lie in the fixture: a folder, or the beginning of the names of files."""
    beside: bool = False
    """The path is a file: whatever the fixture has lies beside it, and what begins with ``at`` is called like it."""
    loader: Mapping[str, Any] | None = None


def publish(hub: FakeHub, one: Published) -> None:
    """Put its fixture where the registry says that it lies."""
    release = Catalog().find(one.release)
    path = find_sae(release, one.sae_id).path
    repository = hub.root / "models" / str(release.repo)
    source = FIXTURES / one.fixture / ("" if one.beside else one.at)
    target = repository if one.beside else repository / path
    for file in source.rglob("*"):
        name = file.relative_to(source).as_posix()
        if file.is_file() and name not in NOT_OF_THE_FORMAT:
            if one.beside and one.at and name.startswith(one.at):
                name = path.rpartition(".")[0] + name.removeprefix(one.at)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)


@contextmanager
def hub_of(folder: Path, *published: Published) -> Iterator[FakeHub]:
    """A Hub with these, which this process asks, with a cache of its own."""
    from huggingface_hub import constants

    import saekit.hub

    with fake_hub(folder / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(saekit.hub, "_reached", set())
        for one in published:
            publish(hub, one)
        yield hub
