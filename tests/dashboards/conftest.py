"""A store of SAEs of several architectures, of a model some of whose tokens are hard to show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.odd_tokens import collected, odd_contexts, several_saes

import saekit


@pytest.fixture(scope="session")
def contexts() -> torch.Tensor:
    return odd_contexts()


@pytest.fixture(scope="session")
def saes() -> dict[str, Any]:
    return several_saes()


@pytest.fixture(scope="session")
def store(
    saes: dict[str, Any], contexts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> saekit.FeatureStore:
    return collected(saes, tmp_path_factory.mktemp("dashboards") / "store", contexts)
