"""What is written for Neuronpedia is what its schemas say, and what a plain loop over the model finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.neuronpedia import (
    ACTIVATION_ROW,
    CONTRIBUTIONS,
    DASHBOARD,
    FEATURE_ROW,
    RUNNER,
    SKIPPED,
    SKIPPED_OF_3,
    SOURCE_ROW,
    TABLES,
    batches,
    misfit,
    rows,
    strict,
)
from support.saes import at, drawn_sae
from support.stores import DEAD, HOOK, LastKnown, dense, small_sae, small_store, some_contexts

from saekit.errors import ConfigError, DataError, ModelError
from saekit.exports.examples import Texts
from saekit.testing import FakeBackend


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return dense(small_sae())


@pytest.mark.parametrize(("schema", "shape", "first"), [("saedashboard", DASHBOARD, 0), ("sae_lens_3", RUNNER, 1)])
def test_batches_are_as_their_schema_says(export: Any, schema: str, shape: Any, first: int) -> None:
    home = export(schema=schema, batch_size=6)
    found = batches(home)
    for batch in found:
        assert misfit(batch, shape) is None
    assert {path.name for path in home.glob("batch-*")} == {f"batch-{first + n}.json" for n in range(4)}
    assert [len(batch["features"]) for batch in found] == [6, 6, 5, 5], "nearly equal, as NumPy splits"
    skipped = strict((home / "skipped_indexes.json").read_bytes())
    assert misfit(skipped, SKIPPED if schema == "saedashboard" else SKIPPED_OF_3) is None
    numbers = [one["feature_index" if first == 0 else "featureIndex"] for batch in found for one in batch["features"]]
    assert sorted([*numbers, *skipped["skipped_indexes"]]) == [*range(24)], "each once, and none is lacking"
    assert skipped["skipped_indexes"] == [*DEAD]
    assert skipped["log_sparsity"] == (-6 if first == 0 else -5)
    tokens = torch.load(home / "tokens_40.pt", weights_only=True)
    assert torch.equal(tokens, some_contexts())
    head = found[0]
    assert (head["model_id"], head["layer"]) == ("tiny", 3 if first == 0 else "3")
    assert head["sae_set" if first == 0 else "sae_id"] == "res-x"


def test_a_schema_that_is_broken_is_seen() -> None:
    good = {"model_id": "a", "layer": "3", "sae_set": "b", "log_sparsity": -6.0, "skipped_indexes": [1]}
    assert misfit(good, SKIPPED) is None
    for bad in ({"layer": 3}, {"log_sparsity": -6}, {"skipped_indexes": [1.0]}, {"more": 1}, {"model_id": None}):
        assert misfit(good | bad, SKIPPED) is not None


def test_numbers_are_those_of_a_plain_loop(export: Any, store: Any, truth: torch.Tensor) -> None:
    flat = truth.flatten(0, 1).double()
    correlation = np.corrcoef(flat.T.numpy()[[n for n in range(24) if n not in DEAD]])
    alive = [n for n in range(24) if n not in DEAD]
    weights = small_sae().W_dec.detach()
    logits = weights @ LastKnown().unembedding()[0]
    for one in (one for batch in batches(export()) for one in batch["features"]):
        index = one["feature_index"]
        values = flat[:, index]
        assert one["frac_nonzero"] == round(float((values != 0).double().mean()), 5)
        for other, pearson, cosine in zip(
            one["correlated_features_indices"],
            one["correlated_features_pearson"],
            one["correlated_features_l1"],
            strict=True,
        ):
            assert pearson == pytest.approx(correlation[alive.index(index), alive.index(other)], abs=1e-5)
            assert cosine == pytest.approx(float(torch.cosine_similarity(values, flat[:, other], dim=0)), abs=1e-5), (
                "the name says L1, and the cosine is what is read"
            )
        assert len(one["correlated_features_indices"]) == len(one["neuron_alignment_indices"]) == 3
        order = logits[index].argsort(descending=True)
        assert one["pos_str"] == [chr(n) for n in order[:10]]
        assert one["neg_str"] == [chr(n) for n in order.flip(0)[:10]]
        assert np.allclose(one["pos_values"], logits[index][order[:10]], atol=1e-5)
        shares = weights[index].abs() / weights[index].abs().sum()
        assert np.allclose(one["neuron_alignment_l1"], shares[one["neuron_alignment_indices"]], atol=1e-5)
        assert sum(one["freq_hist_data_bar_heights"]) == int((values != 0).sum())
        assert sum(one["logits_hist_data_bar_heights"]) == 128
        assert (one["n_prompts_total"], one["n_tokens_in_prompt"]) == (40, 12)


def test_windows_are_contexts_without_bos(export: Any, truth: torch.Tensor) -> None:
    contexts = some_contexts()
    for one in (one for batch in batches(export()) for one in batch["features"]):
        column = truth[..., one["feature_index"]]
        places = {tuple("".join(map(chr, row[1:].tolist()))): n for n, row in enumerate(contexts)}
        largest = column[:, 1:].flatten().sort(descending=True).values
        top = [window for window in one["activations"] if window["bin_min"] == -1]
        assert [window["values"][window["qualifying_token_index"]] for window in top] == pytest.approx(
            [float(value) for value in largest[largest > 0][:20]], abs=1e-5
        )
        for window in one["activations"]:
            context = places[tuple(window["tokens"])]
            assert np.allclose(window["values"], column[context, 1:], atol=6e-6)
            assert len(window["values"]) == len(window["tokens"]) == 11
            value = float(column[context, 1 + window["qualifying_token_index"]])
            if window in top:
                assert (window["bin_max"], window["bin_contains"]) == (round(float(column.max()), 5), -1)
            else:
                assert window["bin_min"] - 1e-5 <= value <= window["bin_max"] + 1e-5
        bins = [window["bin_min"] for window in one["activations"] if window not in top]
        assert bins == sorted(bins, reverse=True), "from high to low"


def test_no_window_is_about_bos_and_there_are_as_many_as_without(tmp_path: Path, export: Any) -> None:
    """Features that fire on BOS more than anywhere else: position -1 would be meant."""
    sae = small_sae(neuronpedia_id="tiny/3-res-x")
    bos = LastKnown()._embedding()[0]
    with torch.no_grad():
        sae.W_enc[:, 0] += 2 * bos
    store = small_store(tmp_path / "features", sae)
    feature = store.feature(0)
    assert {one.start + one.at for one in feature.top(20, None)} == {0}
    (one,) = batches(export(store, numbers=[0]))[0]["features"]
    assert all(window["qualifying_token_index"] >= 0 for window in one["activations"])
    elsewhere = int((feature.positions > 0).sum())
    assert sum(window["bin_min"] == -1 for window in one["activations"]) == min(elsewhere, 20) > 0
    (again,) = batches(export(store, numbers=[0], schema="sae_lens_3", folder=tmp_path / "3"))[0]["features"]
    assert again["activations"][0]["tokens"][0] == chr(0), "the runner of 3.0.0 left BOS in"


def test_contexts_without_bos_are_whole(tmp_path: Path, export: Any) -> None:
    contexts = some_contexts()
    contexts[:, 0] = torch.arange(1, 41)
    store = small_store(tmp_path / "features", contexts=contexts)
    (one, *_) = batches(export(store))[0]["features"]
    assert {len(window["tokens"]) for window in one["activations"]} == {12}
    assert {window["tokens"][0] for window in one["activations"]} <= {chr(n) for n in range(1, 41)}


def test_short_windows_are_cut_only_where_they_hold_bos(export: Any) -> None:
    found = [window for one in batches(export(window=(2, 1)))[0]["features"] for window in one["activations"]]
    assert max(len(window["tokens"]) for window in found) == 4
    assert all(chr(0) not in window["tokens"] for window in found)
    assert all(window["qualifying_token_index"] in (0, 1, 2) for window in found)


@pytest.mark.parametrize(
    ("contexts", "prepend_bos", "cut"),
    [
        (some_contexts(), True, 1),
        (some_contexts(), None, 1),
        (some_contexts(1), True, 1),
        (some_contexts(), False, 0),
        (some_contexts().index_fill(1, torch.tensor([0]), 7), True, 0),
        (torch.cat([some_contexts(3), some_contexts(1) + 1]), True, 0),
    ],
    ids=["BOS", "nothing said", "one context", "a BOS of the text", "an ordinary token", "not all"],
)
def test_bos_is_left_out_where_it_was_put_before_every_context(
    contexts: torch.Tensor, prepend_bos: bool | None, cut: int, export: Any, tmp_path: Path
) -> None:
    sae = small_sae(neuronpedia_id="tiny/3-res-x")
    with torch.no_grad():
        sae.b_enc.fill_(9)  # all fire everywhere
    store = small_store(tmp_path / "store", sae, contexts=contexts)
    store.sae.about.metadata["prepend_bos"] = prepend_bos  # type: ignore[index]
    (batch,) = batches(export(store, quantiles=0, top=2, numbers=[1, 2]))
    shown = [window["tokens"] for one in batch["features"] for window in one["activations"]]
    assert {len(tokens) for tokens in shown} == {12 - cut}
    firsts = {texts[0] for texts in shown}
    stored = {store.vocabulary[int(one)] for one in contexts[:, cut]}
    assert firsts <= stored


def test_rare_features_are_skipped_by_the_logarithm_of_their_fraction(export: Any, store: Any, tmp_path: Path) -> None:
    least = float(np.log10(np.median(store.sae.firing_fraction)))
    home = export(min_log_fraction=least)
    shown = [one["feature_index"] for batch in batches(home) for one in batch["features"]]
    assert shown == [n for n in range(24) if store.sae.fired[n] and np.log10(store.sae.firing_fraction[n]) > least]
    assert 0 < len(shown) < 22
    with pytest.warns(UserWarning, match=r"none of the 24 features .* fires on more than 10\^0 of the tokens"):
        home = export(min_log_fraction=0, folder=tmp_path / "none")
    assert not [*home.glob("batch-*")]
    assert strict((home / "skipped_indexes.json").read_bytes())["skipped_indexes"] == [*range(24)]


def test_the_bulk_import_has_the_rows_of_its_tables(export: Any, tmp_path: Path) -> None:
    about = {"creator_name": "Somebody", "release": "a-release", "description": "SAEs", "url": "https://example.org"}
    home = export(schema="bulk", batch_size=10, neuronpedia_id="tiny/3-res-x__l0-5", about=about)
    assert home == tmp_path / "out" / "tiny" / "3-res-x__l0-5"
    features, activations = rows(home, "features"), rows(home, "activations")
    for row in features:
        assert misfit(row, FEATURE_ROW) is None
    for row in activations:
        assert misfit(row, ACTIVATION_ROW) is None
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
    assert len({row["id"] for row in activations}) == len(activations)
    assert {len(row["id"]) for row in activations} == {25}
    same = {
        one["feature_index"]: one for batch in batches(export(folder=tmp_path / "json")) for one in batch["features"]
    }
    assert [row["index"] for row in features] == [*same]
    for row in features:
        one = same[row["index"]]
        assert {key: row[key] for key in row if key in one} == {key: one[key] for key in one if key in row}
        mine = [act for act in activations if act["index"] == row["index"]]
        assert [act["values"] for act in mine] == [act["values"] for act in one["activations"]]
        assert row["hookName"] == HOOK
        assert row["maxActApprox"] == max(act["maxValue"] for act in mine)
    tables = {
        name: strict((home / f"{name}.jsonl").read_bytes()) for name in ("release", "model", "sourceset", "source")
    }
    source = {key: value for key, value in tables["source"].items() if key in SOURCE_ROW}
    assert misfit(source, SOURCE_ROW) is None
    assert (source["id"], source["modelId"], source["setName"]) == ("3-res-x__l0-5", "tiny", "res-x")
    assert (tables["release"]["name"], tables["release"]["creatorName"]) == ("a-release", "Somebody")
    assert (tables["model"]["id"], tables["sourceset"]["releaseName"]) == ("tiny", "a-release")


def test_what_a_feature_does_at_each_token_is_a_difference_of_two_softmaxes(export: Any, tmp_path: Path) -> None:
    sae, backend = small_sae(neuronpedia_id="tiny/3-res-x"), LastKnown()
    home = export(
        schema="sae_lens_3",
        numbers=[2, 7],
        contributions=True,
        model=backend,
        weights=sae,
        window=(3, 2),
        top=5,
        per_quantile=1,
    )
    unembedding, directions = backend.unembedding()[0].double(), sae.W_dec.detach().double()
    contexts = some_contexts()
    texts = ["".join(map(chr, row)) for row in contexts.tolist()]
    streams, features = backend.run(contexts, read=[HOOK]).held[HOOK].double(), dense(sae).double()

    def likely(stream: torch.Tensor) -> torch.Tensor:
        return ((stream / stream.std(-1, correction=0, keepdim=True)) @ unembedding).log_softmax(-1)

    seen = 0
    for one in batches(home)[0]["features"]:
        active = features[..., one["featureIndex"]]
        changes = likely(streams) - likely(streams - active[..., None] * directions[one["featureIndex"]])
        for window in one["activations"]:
            text = "".join(window["tokens"])
            (context,) = [number for number, whole in enumerate(texts) if text in whole]
            start, change = texts[context].index(text), changes[context]
            told = strict(window["logitContributions"])
            assert misfit(told, CONTRIBUTIONS) is None
            assert len(told["pos"]) == len(told["neg"]) == len(window["lossValues"]) == len(window["tokens"])
            for place, where in enumerate(range(start, start + len(text))):
                expected = -float(change[where - 1, contexts[context, where]]) if where else 0.0
                assert window["lossValues"][place] == pytest.approx(expected, abs=6e-4)
                if not active[context, where]:
                    assert told["pos"][place] == told["neg"][place] == {}
                    continue
                seen += 1
                order = change[where].argsort(descending=True)
                assert told["pos"][place]["t"] == [chr(n) for n in order[:5]]
                assert np.allclose(told["pos"][place]["v"], change[where][order[:5]], atol=6e-4)
                assert told["neg"][place]["t"] == [chr(n) for n in order.flip(0)[:5]]
    assert seen > 15


def test_without_a_model_nothing_is_said_of_each_token(export: Any, tmp_path: Path, store: Any) -> None:
    (one, *_) = batches(export(schema="sae_lens_3"))[0]["features"]
    window = one["activations"][0]
    told = strict(window["logitContributions"])
    assert misfit(told, CONTRIBUTIONS) is None
    assert told == {"pos": [{}] * 12, "neg": [{}] * 12}
    assert window["lossValues"] == []
    asked: dict[str, Any] = {"schema": "sae_lens_3", "contributions": True, "model": LastKnown()}
    with pytest.raises(ConfigError, match=r"contributions: are for the schema 'sae_lens_3': 'bulk' has no place"):
        export(**asked | {"schema": "bulk"})
    with pytest.raises(ConfigError, match=r"model: is for what features do at each token, .*: ask for contributions"):
        export(**asked | {"contributions": False})
    with pytest.raises(ConfigError, match=r"weights: is missing: .* a feature store has not its weights"):
        export(**asked)
    with pytest.raises(DataError, match=r"is not the SAE whose features were collected as"):
        export(**asked, weights=_other())
    other = LastKnown()
    other.name = "other"
    with pytest.raises(DataError, match=r"were collected with 'fake', and it is called 'other'"):
        export(**asked | {"model": other}, weights=small_sae())
    with pytest.raises(ModelError, match=r"'fake' does not say which hook holds the last residual stream"):
        export(**asked | {"model": FakeBackend()}, weights=small_sae())


def _other() -> Any:
    sae = small_sae()
    with torch.no_grad():
        sae.b_dec += 1
    return sae


def test_where_there_is_no_path_to_the_logits_fields_are_empty_and_it_is_said(tmp_path: Path, export: Any) -> None:
    sae = at(drawn_sae(8), "blocks.0.attn.hook_z", model_name="fake", neuronpedia_id="tiny/0-att-x")
    store = small_store(tmp_path / "features", sae)
    with pytest.warns(UserWarning, match=r"the fields about logits are empty, for .*hook_z"):
        (one, *_) = batches(export(store))[0]["features"]
    assert misfit(one, DASHBOARD["features"][0]) is None  # type: ignore[index]
    assert all(one[name] == [] for name in ("pos_str", "pos_values", "neg_str", "logits_hist_data_bar_values"))
    rows = sae.W_dec.detach()[one["feature_index"]].unflatten(0, (2, 4)).norm(dim=1)
    assert np.allclose(one["decoder_weights_dist"], rows / rows.sum(), atol=6e-6), "the share of each of two heads"
    with pytest.raises(ModelError, match=r"nothing can be said of what features do at each token: .* Leave the model"):
        export(store, schema="sae_lens_3", contributions=True, model=LastKnown(), weights=sae, folder=tmp_path / "3")


def test_numbers_that_are_none_are_an_error_and_no_json(tmp_path: Path, export: Any) -> None:
    backend = LastKnown()
    backend._embedding()[5] = torch.inf  # so that a logit is
    store = small_store(tmp_path / "features", model=backend, contexts=some_contexts().where(some_contexts() != 5, 6))
    with pytest.raises(DataError, match=r"feature 0 of \w+.* cannot be written: it holds a number that is not finite"):
        export(store)
    assert not [*(tmp_path / "out").glob("batch*")]


def test_a_feature_with_a_sample_of_its_activations_shows_what_is_kept(tmp_path: Path, export: Any, store: Any) -> None:
    sample = small_store(tmp_path / "sample", max_per_feature=20, top_kept=4)
    often = int(sample.sae.indices[sample.sae.fired.argmax()])
    (one,) = batches(export(sample, numbers=[often]))[0]["features"]
    (whole,) = batches(export(numbers=[often], folder=tmp_path / "whole"))[0]["features"]
    top = [window for window in one["activations"] if window["bin_min"] == -1]
    assert 0 < len(top) <= 4
    assert [max(window["values"]) for window in top] == [max(w["values"]) for w in whole["activations"][: len(top)]]
    assert {name: one[name] for name in TABLES} == {name: whole[name] for name in TABLES}, "numbers are those of all"


class Vocabulary:
    """The part of a store that has texts."""

    def __init__(self, *texts: str) -> None:
        self.vocabulary = texts


def test_tokens_are_shown_as_neuronpedia_shows_them() -> None:
    raw: Any = Vocabulary("Ġthe", "Ċ", "ĉx", "é", "", "a", "", "")
    assert Texts(raw).of([0, 1, 2, 3, 4, 5]) == [" the", "\n", "\tx", "é", "", "a"]
    assert Texts(raw).of([6, 7, 8, -1]) == ["<|outofrange|>"] * 4, "what fills a vocabulary up is no token"
    plain: Any = Vocabulary(" the", "Ġ", "<script>")
    assert Texts(plain).of([0, 1, 2]) == [" the", "Ġ", "<script>"], "a letter of Maltese, where texts are decoded"
