"""SAEs of every registered architecture go through a pass, onto a page, and into an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from support.neuronpedia import batches
from support.saes import at
from support.stores import HOOK, dense, small_store, some_contexts

import saekit
from saekit.dashboards import Look, feature_data
from saekit.kinds import SAE_ARCHITECTURES
from saekit.sae.build import build_module

EVERY = [
    item.key for item in saekit.default_manager().registry(SAE_ARCHITECTURES).items if item.key.startswith("saekit:")
]
SMALL = {"k": 2, "n_heads": 2, "bottleneck_factor": 2, "widths": (3,)}
CONTEXTS = some_contexts(6, 5)


def made(architecture: str) -> Any:
    """8 features of drawn weights, at :data:`HOOK`."""
    plugins = saekit.default_manager()
    item = plugins.get(SAE_ARCHITECTURES, architecture)
    options = {name: value for name, value in SMALL.items() if name in attrs.fields_dict(item.entry.config)}
    sae = build_module(item, item.entry.config(d_sae=8, **options), 8, plugins)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return at(sae, HOOK, model_name="fake", neuronpedia_id="tiny/3-res-x")


@pytest.mark.parametrize("architecture", EVERY)
def test_a_pass_a_page_and_an_export(architecture: str, tmp_path: Path, export: Any) -> None:
    sae = made(architecture)
    store = small_store(tmp_path / "store", sae, contexts=CONTEXTS)
    found = dense(sae, CONTEXTS).double().numpy()
    assert store.sae.about.architecture == architecture
    assert store.sae.fired.tolist() == (found != 0).sum((0, 1)).tolist()
    fires = [number for number in range(8) if store.sae.fired[number]]
    assert fires
    (batch,) = batches(export(store, top=3, quantiles=0))
    assert [one["feature_index"] for one in batch["features"]] == fires
    for one in batch["features"]:
        number = one["feature_index"]
        values = found[..., number]
        page = feature_data(store.feature(number), Look(top=3, window=None))
        shown = [window["values"] for window in page["top"]]
        assert bool(shown) == bool(one["activations"]) == (values.max() > 0), "what is never above 0 has no largest"
        assert max(map(max, shown), default=0) == pytest.approx(max(values.max(), 0), rel=1e-3)
        for window in one["activations"]:
            assert min(np.abs(values[:, 1:] - np.array(window["values"])).max(1)) < 1e-4
