"""What a page says of features, against what the SAEs give and the weights say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.odd_tokens import EARLY, EMBED, LATE, ODD, OddBackend, collected

import saekit
from saekit.dashboards import Look, feature_data, index_data, page_data, sae_data
from saekit.dashboards.data import EffectKind
from saekit.errors import ConfigError
from saekit.features import Feature, Window

READ = {"topk": (LATE,), "jumprelu": (EARLY,), "transcoder": (EMBED,), "crosscoder": (EARLY, LATE), "signed": (LATE,)}


@pytest.fixture(scope="module")
def dense(saes: dict[str, Any], contexts: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[40, 12, 16]``: what each SAE gives on tokens that count, by a plain encode of all."""
    found = {}
    for name, hooks in READ.items():
        held = OddBackend().run(contexts, read=hooks).held
        with torch.no_grad():
            found[name] = saes[name].encode(torch.cat([held[hook] for hook in hooks], -1))
    found["topk"][contexts == 0] = 0
    return found


def windows_of(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from data["top"]
    for quantile in data["quantiles"]:
        yield from quantile["windows"]


@pytest.mark.parametrize("name", READ)
def test_activations_are_those_of_the_sae(
    name: str, store: saekit.FeatureStore, dense: dict[str, torch.Tensor], contexts: torch.Tensor
) -> None:
    for feature in store.saes[name]:
        own = dense[name][..., feature.index]
        data = feature_data(feature, Look(top=6, per_quantile=3, window=(2, 3)))
        assert data["fired"] == int((own != 0).sum())
        largest = own.flatten().sort(descending=True).values[:6]
        assert [one["values"][one["at"]] for one in data["top"]] == pytest.approx(
            largest[largest > 0].tolist(), rel=1e-3
        )
        for window in windows_of(data):
            start, length = window["start"], len(window["ids"])
            at, row = start + window["at"], contexts[window["context"]]
            assert (start, start + length) == (max(at - 2, 0), min(at + 4, 12)), "nothing is filled in at the ends"
            assert window["ids"] == row[start : start + length].tolist()
            assert window["tokens"] == OddBackend().token_texts(window["ids"])
            expected = own[window["context"], start : start + length].tolist()
            assert window["values"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_no_example_is_about_a_special_token_that_does_not_count(store: saekit.FeatureStore) -> None:
    for name, found in (("topk", False), ("jumprelu", True)):
        data = [feature_data(feature) for feature in store.saes[name]]
        windows = [window for one in data for window in windows_of(one)]
        assert any(window["ids"][window["at"]] == 0 for window in windows) == found
        pairs = {pair for window in windows for pair in zip(window["ids"], window["counted"], strict=True)}
        counted = {count for token, count in pairs if token == 0}
        assert counted == {int(found)}, "they are in texts, and marked"
        assert all(window["counted"][window["at"]] for window in windows)


def test_intervals_have_both_bounds_and_shares_of_all_tokens(
    store: saekit.FeatureStore, dense: dict[str, torch.Tensor]
) -> None:
    feature = store.saes["jumprelu"].feature(1)
    own, data = dense["jumprelu"][..., 1], feature_data(feature)
    assert [one["number"] for one in data["quantiles"]] == [4, 3, 2, 1, 0]
    for one in data["quantiles"]:
        low, high = (float(own.max()) * (one["number"] + step) / 5 for step in (0, 1))
        assert (one["low"], one["high"]) == pytest.approx((low, high), rel=1e-3)
        inside = (own >= low - 1e-6) & (own <= high + 1e-6)
        assert one["share"] == pytest.approx(float(inside.double().mean()), rel=1e-3)
        assert all(low - 1e-3 <= window["values"][window["at"]] <= high + 1e-3 for window in one["windows"])


def test_logits_are_those_of_the_direction(store: saekit.FeatureStore, saes: dict[str, Any]) -> None:
    unembedding, _ = OddBackend().unembedding()
    for name in ("topk", "transcoder"):
        with torch.no_grad():  # what an activation of 1 adds to what is decoded
            logits = (saes[name].decode(torch.eye(16)) - saes[name].decode(torch.zeros(16, 16))) @ unembedding
        index = index_data(store.saes[name], [*store.saes[name]])
        for feature, entry in zip(store.saes[name], index, strict=True):
            data, own = feature_data(feature)["logits"], logits[feature.index]
            assert [value for *_, value in data["top"]] == pytest.approx(own.topk(10).values.tolist(), rel=1e-3)
            assert [number for number, *_ in data["bottom"]] == (-own).topk(10).indices.tolist()
            assert entry["max_logit"] == pytest.approx(float(own.max()), rel=1e-3)
            texts = OddBackend().token_texts(own.topk(10).indices.tolist())
            assert entry["raises"] == texts
            assert sum(data["histogram"]["counts"]) == 128


def test_what_has_no_meaning_is_said(store: saekit.FeatureStore) -> None:
    for name, why in (("heads", "knows no weights that lead there"), ("crosscoder", "several sites")):
        assert why in sae_data(store.saes[name])["why_no_logits"]
        assert feature_data(store.saes[name].feature(1))["logits"] is None
        assert index_data(store.saes[name], [store.saes[name].feature(1)])[0]["max_logit"] is None


def test_a_feature_that_never_fires(store: saekit.FeatureStore) -> None:
    data = feature_data(store.saes["topk"].feature(3))
    assert (data["dead"], data["fired"], data["top"], data["quantiles"], data["firing"]) == (True, 0, [], [], None)
    assert data["partners"] == data["neurons"] == []
    assert len(data["neighbors"]) == 5
    assert len(data["logits"]["top"]) == 10


def test_a_sample_is_called_one(saes: dict[str, Any], contexts: torch.Tensor, tmp_path: Path) -> None:
    small = collected(saes["topk"], tmp_path / "small", contexts, max_per_feature=20, top_kept=8)
    feature = next(one for one in small.sae if not one.complete)
    data = feature_data(feature, Look(top=20))
    assert not data["complete"]
    assert data["stored"] < data["fired"] == sum(data["firing"]["counts"])
    assert len(data["top"]) == 8, "those that are known to be the largest"


def test_everything_is_json_that_every_reader_takes(store: saekit.FeatureStore) -> None:
    features = {name: [*sae] for name, sae in store.saes.items()}
    data = page_data(store, features)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [one["about"]["name"] for one in data["saes"]] == [*store.saes]
    for sae in data["saes"]:
        assert len(sae["index"]) == len(sae["features"]) == 16
    bare = page_data(store, features, embedded=False)
    assert [one["features"] for one in bare["saes"]] == [{}] * len(features)
    assert bare["saes"][0]["index"] == data["saes"][0]["index"]


def test_the_list_names_tokens_once_the_strongest_first(
    store: saekit.FeatureStore, dense: dict[str, torch.Tensor], contexts: torch.Tensor
) -> None:
    (entry,) = index_data(store.saes["jumprelu"], [store.saes["jumprelu"].feature(1)], {1: "mine"})
    own = dense["jumprelu"][..., 1].flatten()
    order = own.argsort(descending=True, stable=True)[: int((own > 0).sum())]
    texts = OddBackend().token_texts(contexts.flatten()[order].tolist())
    assert entry["fires_on"] == [*dict.fromkeys(texts)][:10]
    assert (entry["label"], entry["index"]) == ("mine", 1)
    assert any(text in ODD.values() for one in index_data(store.saes["topk"], [*store.saes["topk"]])
               for text in one["fires_on"])  # fmt: skip


class Doubled:
    """Says of every token twice its activation, and nothing of the last one."""

    kind: EffectKind = "exact"

    def __call__(self, feature: Feature, windows: Sequence[Window]) -> list[list[float | None]]:
        return [[*(2 * value for value in window.values[:-1]), None] for window in windows]


def test_effects_stand_beside_their_tokens(store: saekit.FeatureStore) -> None:
    feature = store.saes["topk"].feature(1)
    assert feature_data(feature)["loss_effect_kind"] is None
    data = feature_data(feature, effects=Doubled())
    assert data["loss_effect_kind"] == "exact"
    for window in windows_of(data):
        *known, last = window["loss_effects"]
        assert last is None
        assert known == pytest.approx([2 * value for value in window["values"][:-1]], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top": -1}, "top: must be a whole number of 0 or more, found -1"),
        ({"quantiles": 0}, "quantiles: must be a whole number of 1 or more"),
        ({"window": (1,)}, "window: must be two whole numbers of 0 or more"),
    ],
)
def test_a_look_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Look(**options)


def test_partners_are_measured_on_the_text(store: saekit.FeatureStore, dense: dict[str, torch.Tensor]) -> None:
    own = dense["jumprelu"].reshape(-1, 16).double().numpy()
    data = feature_data(store.saes["jumprelu"].feature(1))
    fires = own != 0
    for index, pearson, cosine, jaccard in data["partners"]:
        assert pearson == pytest.approx(np.corrcoef(own[:, 1], own[:, index])[0, 1], abs=1e-3)
        assert cosine == pytest.approx(
            own[:, 1] @ own[:, index] / np.prod(np.linalg.norm(own[:, [1, index]], axis=0)), abs=1e-3
        )
        both, either = (fires[:, 1] & fires[:, index]).sum(), (fires[:, 1] | fires[:, index]).sum()
        assert jaccard == pytest.approx(both / either, abs=1e-3)
