"""A small feature store whose numbers are known, and what they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from support.saes import at, drawn_sae

import saekit
from saekit.testing import FakeBackend

HOOK = "blocks.1.hook_resid_post"
DEAD = (4, 9)


class LastKnown(FakeBackend):
    """It says which hook holds the last residual stream."""

    def entry_of(self, hooks: Any) -> str:
        return HOOK

    def run_from(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def some_contexts(n: int = 40, size: int = 12) -> torch.Tensor:
    """``[n, size]``: the first token of each is BOS."""
    found = torch.randint(1, 128, (n, size), generator=torch.Generator().manual_seed(5))
    found[:, 0] = 0
    return found


def small_sae(**metadata: Any) -> Any:
    """24 features, of which :data:`DEAD` never fire, at :data:`HOOK`."""
    sae = at(drawn_sae(8, d_sae=24), HOOK, model_name="fake", **metadata)
    with torch.no_grad():
        sae.b_enc.sub_(3)
        sae.b_enc[[*DEAD]] = -1e4
    return sae


def small_store(folder: Path, sae: Any | None = None, **options: Any) -> saekit.FeatureStore:
    """That of :func:`small_sae` on :func:`some_contexts`."""
    sae = small_sae(neuronpedia_id="tiny/3-res-x") if sae is None else sae
    options = {"model": LastKnown(), "contexts": some_contexts(), "verbose": False, "device": "cpu"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return saekit.collect_features(sae, folder=folder, **options)


def dense(sae: Any, contexts: torch.Tensor | None = None) -> torch.Tensor:
    """``[n, size, d_sae]``: what a plain encode of all gives."""
    contexts = some_contexts() if contexts is None else contexts
    with torch.no_grad():
        found: torch.Tensor = sae.encode(FakeBackend().run(contexts, read=[HOOK]).held[HOOK])
    return found
