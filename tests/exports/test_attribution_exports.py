"""From which tokens an attention brings what makes features active, as Neuronpedia's files have it (DFA)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.stores import LastKnown, small_sae, small_store
from support.tiny import hooked_transformer

import saekit
from saekit.analysis.attribution import AttentionSources
from saekit.errors import ConfigError, ModelError

Z = "blocks.1.attn.hook_z"
CONTEXTS = torch.randint(1, 2000, (6, 9), generator=torch.Generator().manual_seed(3))
CONTEXTS[:, 0] = 0


def test_windows_say_what_comes_from_each_of_their_tokens(tmp_path: Path, export: Any) -> None:
    model = saekit.load_model(hooked_transformer())
    sae = at(drawn_sae(16, d_sae=6), Z, model_name=model.name, neuronpedia_id="tiny/1-att-x")
    store = small_store(tmp_path / "features", sae, model=model, contexts=CONTEXTS)
    asked = {"attribution": True, "model": model, "weights": sae, "top": 4, "quantiles": 2, "per_quantile": 1}
    (batch,) = [json.loads(file.read_text()) for file in export(store, **asked).glob("batch-*.json")]
    sources, seen = AttentionSources.of(sae, model), 0
    for one in batch["features"]:
        feature = store.feature(one["feature_index"])
        about = [window for window in feature.top(8, None) if window.position][:4]  # none is about BOS
        for window, own in zip(about, one["activations"], strict=False):
            (wanted,) = sources.at(CONTEXTS[window.context, None], feature.index, [0], [window.position]).tolist()
            assert own["dfa_values"] == pytest.approx(wanted[1:], abs=1e-5), "without BOS"
            assert own["dfa_maxValue"] == max(own["dfa_values"])
            assert own["dfa_targetIndex"] == own["qualifying_token_index"] == window.position - 1
            seen += 1
    assert seen > 10
    home = export(store, schema="bulk", folder=tmp_path / "bulk", **asked | {"window": (2, 2)})
    rows = [*map(json.loads, gzip.decompress((home / "activations/batch-0.jsonl.gz").read_bytes()).splitlines())]
    assert all(len(row["dfaValues"]) == len(row["tokens"]) for row in rows)
    assert all(row["dfaMaxValue"] == max(row["dfaValues"]) for row in rows)
    assert json.loads((home / "sourceset.jsonl").read_text())["showDfa"] is True


def test_attribution_is_refused_where_it_has_no_meaning(export: Any) -> None:
    with pytest.raises(ConfigError, match="attribution: is for 'saedashboard' and 'bulk': 'sae_lens_3' has no place"):
        export(schema="sae_lens_3", attribution=True)
    with pytest.raises(
        ModelError, match=r"only where an SAE reads the heads of an attention \(hook_z\), and it reads blo"
    ):
        export(attribution=True, model=LastKnown(), weights=small_sae(neuronpedia_id="tiny/3-res-x"))
