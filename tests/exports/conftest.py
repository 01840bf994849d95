"""A small store, and exports of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stores import small_store

import saekit

Export = Callable[..., Path]


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> saekit.FeatureStore:
    return small_store(tmp_path_factory.mktemp("stores") / "features")


@pytest.fixture
def export(store: saekit.FeatureStore, tmp_path: Path) -> Export:
    """Exports the store into a new folder, without a word."""

    def exported(features: Any = store, **options: Any) -> Path:
        return saekit.export_neuronpedia(features, **({"folder": tmp_path / "out", "verbose": False} | options))

    return exported
