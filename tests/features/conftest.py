"""A small store of two SAEs, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae

import saekit
from saekit.testing import FakeBackend

HOOK, EARLY = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
Collect = Callable[..., saekit.FeatureStore]


@pytest.fixture(scope="session")
def contexts() -> torch.Tensor:
    """``[60, 12]``: the first token of each is BOS."""
    found = torch.randint(1, 128, (60, 12), generator=torch.Generator().manual_seed(5))
    found[:, 0] = 0
    return found


@pytest.fixture(scope="session")
def saes() -> dict[str, Any]:
    """One that counts every token, and a TopK that leaves special ones out; both have features that never fire."""
    one = at(drawn_sae(8, d_sae=24), HOOK, model_name="fake")
    two = saekit.SAE.from_dict({"name": "topk", "k": 3, "d_sae": 16, "d_in": 8})
    at(two, EARLY, model_name="fake", exclude_special_tokens=True)
    with torch.no_grad():
        one.b_enc.sub_(3)
        one.b_enc[[4, 9]] = -1e4
        two.b_enc[3] = -1e4
    return {"one": one, "two": two}


@pytest.fixture(scope="session")
def collect(contexts: torch.Tensor) -> Collect:
    """Collects into a folder, without a word."""

    def collected(saes: Any, folder: Path, **options: Any) -> saekit.FeatureStore:
        options = {"model": FakeBackend(), "contexts": contexts, "verbose": False, "device": "cpu"} | options
        return saekit.collect_features(saes, folder=folder, **options)

    return collected


@pytest.fixture(scope="session")
def store(saes: dict[str, Any], collect: Collect, tmp_path_factory: pytest.TempPathFactory) -> saekit.FeatureStore:
    return collect(saes, tmp_path_factory.mktemp("stores") / "two")


@pytest.fixture(scope="session")
def dense(saes: dict[str, Any], contexts: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[60, 12, d_sae]``: what each SAE gives on tokens that count, by a plain encode of all."""
    found = {}
    for name, hook in (("one", HOOK), ("two", EARLY)):
        held = FakeBackend().run(contexts, read=[hook]).held[hook]
        with torch.no_grad():
            found[name] = saes[name].encode(held)
    found["two"][contexts == 0] = 0
    return found
