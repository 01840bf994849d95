"""What a manifest alone shows of a store that was made otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saekit.commands.beforehand import check_store
from saekit.errors import DataError
from saekit.features.manifest import StoreManifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a store beside its SAE, of which there is nothing but what says so."""
    (tmp_path / "run/sae").mkdir(parents=True)
    (tmp_path / "run/sae/cfg.json").write_text("{}")
    (tmp_path / "run/features").mkdir()
    StoreManifest(
        model={}, dataset={}, contexts=800, context_size=64, digest="", options={"seed": 0, "partners": 20}, saes=[]
    ).save(tmp_path / "run/features")
    return tmp_path / "run"


@pytest.mark.parametrize("asked", [{}, {"n_contexts": 800}, {"n_contexts": 1024}, {"n_contexts": None, "seed": 0}])
def test_what_may_be_the_same_store_is_left_to_those_who_read_the_text(run: Path, asked: Any) -> None:
    check_store(run, None, asked)
    check_store(run / "sae", None, asked)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"n_contexts": 5}, "n_contexts: there 800, wanted 5"),
        ({"context_size": 32}, "context_size: there 64, wanted 32"),
        ({"seed": 1, "partners": 2}, "partners: there 20, wanted 2"),
    ],
)
def test_a_store_that_surely_is_another_is_refused(run: Path, asked: Any, told: str) -> None:
    for what, folder in ((run, None), (str(run), None), (run / "sae", None), ("gpt2:x", run / "features")):
        with pytest.raises(DataError, match=told):
            check_store(what, folder, asked)
    assert json.loads((run / "features/manifest.json").read_text())["contexts"] == 800
