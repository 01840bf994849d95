"""Token set enrichment: scores against a running sum that is written out, chance, tables and figures."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
import torch

import saekit
from saekit.analysis import tsea
from saekit.analysis.enrichment import checked_sets, p_values, stable_order
from saekit.analysis.tsea_figures import corners, labeled, lifts
from saekit.analysis.tsea_page import page
from saekit.testing import FakeBackend

V = 240
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((20, V)).round(1).astype(np.float32)  # with many ties
LOGITS[3] = 0.0
SETS = {f"of_{size}": RANDOM.choice(V, size, replace=False) for size in (0, 1, 2, 7, 60, 200, V - 1, V)}
SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")


def slowly(logits: Any, ids: Any) -> Fraction:
    """The running sum, token by token, where it is furthest from 0."""
    members, size = set(ids.tolist()), len(ids)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    total = highest = lowest = Fraction(0)
    for token in order:
        total += Fraction(1, size) if token in members else -Fraction(1, len(logits) - size)
        highest, lowest = max(highest, total), min(lowest, total)
    assert total == 0
    return highest if highest >= -lowest else lowest


def made(d_sae: int = 40) -> saekit.SAE:
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 8, "d_sae": d_sae})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, 8, generator=generator))
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(SITE))
    return sae


@pytest.fixture(scope="module")
def found() -> tsea.Enrichment:
    backend = FakeBackend()
    return tsea.enrich(made(), tsea.token_sets(backend), backend=backend, k=12, permutations=99, min_size=1)


# ---- scores


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_scores_are_those_of_the_running_sum(kind: Any) -> None:
    scores = tsea.enrichment_scores(LOGITS.astype(kind), SETS)
    for place, ids in enumerate(SETS.values()):
        for feature, logits in enumerate(LOGITS):
            if len(ids) in (0, V) or feature == 3:
                assert np.isnan(scores.signed[place, feature])
                continue
            wanted = slowly(logits, ids)
            assert scores.signed[place, feature] == float(wanted)
            assert scores.unsigned[place, feature] == abs(float(wanted))


def test_of_equal_logits_the_smaller_id_comes_first() -> None:
    values = np.array([[-0.0, 0.0, 1.0, -1.0, 1.0, -1.0]], dtype=np.float32)
    assert stable_order(values).tolist() == [[2, 4, 0, 1, 3, 5]]
    assert stable_order(values.astype(np.float64)).tolist() == [[2, 4, 0, 1, 3, 5]]
    tiny = np.array([[1e-45, -1e-45, 3e38, -3e38]], dtype=np.float32)
    assert stable_order(tiny).tolist() == [[2, 0, 1, 3]]


def test_what_is_given_is_not_changed() -> None:
    """The reference filled up the caller's sets: fault 29."""
    sets: dict[str, Any] = {"a": [5, 3, 3], "b": np.array([9, 2]), "c": torch.tensor([1])}
    logits = LOGITS.copy()
    logits.setflags(write=False)
    sets["b"].setflags(write=False)
    tsea.enrichment_of(lambda some: logits[list(some)], [0, 1], sets, d_vocab=V, permutations=5, min_size=1)
    tsea.enrichment_scores(logits, sets)
    assert sets["a"] == [5, 3, 3]
    assert sets["b"].tolist() == [9, 2]
    assert sets["c"].tolist() == [1]
    assert (logits == LOGITS).all()


def test_the_score_is_1_where_the_set_comes_first_and_minus_1_where_it_comes_last() -> None:
    falling = -np.arange(V, dtype=np.float32)[None]
    scores = tsea.enrichment_scores(falling, {"first": np.arange(9), "last": np.arange(V - 9, V)})
    assert scores.signed[:, 0].tolist() == [1.0, -1.0]


def test_bad_sets_and_logits_are_told() -> None:
    for wrong, told in (
        ([-1, 3], "the id -1"),
        ([V], f"the id {V}"),
        ([0.5], "ids of tokens"),
        (["a"], "ids of tokens"),
    ):
        with pytest.raises(saekit.ConfigError, match=told):
            checked_sets({"it": wrong}, V)
    with pytest.raises(saekit.ConfigError, match="names none"):
        checked_sets({}, V)
    with pytest.raises(saekit.ConfigError, match="must be finite"):
        tsea.enrichment_scores(np.array([[1.0, np.nan]]), {"a": [0]})
    with pytest.raises(saekit.ConfigError, match="empty: no token of the vocabulary is in it; full: every token"):
        tsea.enrichment_of(lambda some: LOGITS[list(some)], [0], {"empty": [], "full": range(V)}, d_vocab=V)


# ---- chance


def test_p_values_are_even_by_chance_and_small_where_it_is_not() -> None:
    sets = [np.sort(RANDOM.choice(V, size, replace=False)) for size in (3, 30)]
    orders = RANDOM.permuted(np.tile(np.arange(V, dtype=np.float32), (400, 1)), axis=1)
    named = dict(zip("ab", sets, strict=True))
    p = p_values(tsea.enrichment_scores(orders, named).unsigned, sets, V, permutations=499, seed=1)
    assert p.min() >= 1 / 500
    for own in p:
        assert np.abs(np.sort(own) - np.arange(1, 401) / 400).max() < 0.12, "even"
    one = np.ones((2, 1))
    assert p_values(one, sets, V, permutations=499, seed=1)[1, 0] == 1 / 500
    assert p_values(np.zeros((2, 1)), sets, V, permutations=9)[:, 0].tolist() == [1.0, 1.0]


def test_p_values_are_those_of_permuting_this_very_feature() -> None:
    """Whatever the logits, a random order of tokens is as random."""
    ids = np.sort(RANDOM.choice(V, 12, replace=False))
    scores = tsea.enrichment_scores(LOGITS[:1], {"a": ids}).unsigned
    many = tsea.enrichment_scores(RANDOM.permuted(np.tile(LOGITS[:1], (4000, 1)), axis=1), {"a": ids}).unsigned
    fast = p_values(scores, [ids], V, permutations=4000)[0, 0]
    assert fast == pytest.approx((1 + (many >= scores[0, 0]).sum()) / 4001, abs=0.03)


def test_permutations_follow_the_seed(found: tsea.Enrichment) -> None:
    sets = [*found.sets.values()]
    first, again, other = (
        p_values(found.values.unsigned, sets, found.d_vocab, permutations=50, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.nan_to_num(first) != np.nan_to_num(other)).any()


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.005, 0.5]])
    q = tsea.q_values(p)
    assert q.ravel().tolist() == pytest.approx([0.025, 0.05, np.nan, 0.05, 0.025, 0.5], nan_ok=True)


# ---- of SAEs


def test_scores_of_an_sae_are_those_of_its_logits(found: tsea.Enrichment) -> None:
    sae, backend = made(), FakeBackend()
    logits = (sae.W_dec @ backend.unembedding()[0]).detach().numpy()
    wanted = tsea.enrichment_scores(logits[list(found.features)], found.sets)
    np.testing.assert_allclose(found.signed_scores, wanted.signed, atol=1e-12)
    skewness = pd.DataFrame(logits.T).skew().to_numpy()
    assert set(found.features) == set(np.argsort(-skewness)[:12].tolist())


def test_the_table_has_all_and_says_what_is_missing(found: tsea.Enrichment) -> None:
    table = found.table()
    assert len(table) == len(found.sets) * 12
    row = table[(table["set"] == "digits") & (table["feature"] == found.features[4])].iloc[0]
    assert row["score"] == found.scores.loc["digits", found.features[4]] == abs(row["signed_score"])
    assert row["height"] == pytest.approx(-np.log(1 - row["score"]))
    assert row["q"] >= row["p"] >= 1 / 100
    assert found.left_out["names"] == "no token of the vocabulary is in it"
    assert table[table["set"] == "names"]["score"].isna().all()
    assert table.attrs["left_out"] == found.left_out


def test_features_are_chosen_among_those_that_fire() -> None:
    sae, backend = made(), FakeBackend()
    fractions = torch.zeros(40)
    fractions[[3, 8, 20]] = 0.1
    sae.log_sparsity = torch.log10(fractions + 1e-10)
    options: Any = {"backend": backend, "permutations": 0}
    sets = tsea.token_sets(backend, "digits")
    assert tsea.enrich(sae, sets, features="random", k=9, **options).features == (3, 8, 20)
    assert sorted(tsea.enrich(sae, sets, features="skewed", k=9, **options).features) == [3, 8, 20]
    assert len(tsea.enrich(sae, sets, features="all", **options).features) == 40
    flat = made()
    with torch.no_grad():
        flat.W_dec[7] = 0
    assert tsea.enrich(flat, sets, features=[7, 8], **options).left_out == {"feature 7": "all its logits are the same"}


def test_bad_requests_are_told() -> None:
    sae, backend = made(), FakeBackend()
    sets = tsea.token_sets(backend, "digits")
    for options, told in (
        ({"features": [40]}, "are 0 to 39"), ({"features": []}, "names none"), ({"features": "best"}, "'skewed'"),
        ({"k": 0}, "k: must be a whole number"), ({"permutations": -1}, "0 or more"),
    ):  # fmt: skip
        with pytest.raises(saekit.ConfigError, match=told):
            tsea.enrich(sae, sets, backend=backend, **options)  # type: ignore[arg-type]
    with pytest.raises(saekit.ModelError, match="no token set can be enriched: .* not in the residual stream"):
        tsea.enrich(sae, sets, backend=backend, sites=saekit.Site(hook_name="blocks.0.attn.hook_z"))
    one = tsea.enrich(sae, sets, backend=backend, features=[1], permutations=0)
    with pytest.raises(saekit.ConfigError, match="2 is not among"):
        one.overlay(2)
    with pytest.raises(saekit.ConfigError, match="has no 'x'; there are digits"):
        one.running_sums(1, ["x"])


# ---- pictures


def test_running_sums_begin_and_end_with_0_and_come_to_the_score(found: tsea.Enrichment) -> None:
    for feature in found.features[:3]:
        for name, (passed, sums) in found.running_sums(feature).items():
            assert sums[0] == 0
            assert sums[-1] == 0
            assert passed[-1] == found.d_vocab
            furthest = sums[np.abs(sums).argmax()]
            assert abs(furthest) == pytest.approx(found.scores.loc[name, feature])


def test_long_lines_keep_their_highest_and_lowest_corner() -> None:
    sums = np.zeros(5001)
    sums[[1234, 4321]] = 1, -1
    at, kept = corners(np.arange(5001), sums)
    assert len(at) < 900
    assert (kept.max(), kept.min()) == (1, -1)
    assert at[[kept.argmax(), kept.argmin()]].tolist() == [1234, 4321]


def test_the_highest_three_of_each_set_are_named(found: tsea.Enrichment) -> None:
    figure = found.manhattan()
    heights, names = found.heights(), [*found.sets]
    shown = [one.text for one in figure.layout.annotations if one.name == "feature"]
    wanted = []
    for row in range(len(names)):
        order = [column for column in np.argsort(-np.nan_to_num(heights[row])) if heights[row, column] > 1]
        wanted += [str(found.features[column]) for column in order[:3]]
    assert sorted(shown) == sorted(wanted)
    assert shown
    points = sum(len(trace.x) for trace in figure.data)
    assert points == int((~np.isnan(found.values.signed)).sum())


def test_no_label_is_over_another_of_any_set() -> None:
    logits = np.random.default_rng(1).standard_normal((30, 60)).astype(np.float32)
    sets = {f"{number}": range(number, number + 2) for number in range(40)}
    many = tsea.enrichment_of(
        lambda some: logits[np.array(some) - 12_000],
        range(12_000, 12_030),
        sets,
        d_vocab=60,
        permutations=0,
        min_size=2,
    )
    top = many.manhattan().layout.yaxis.range[1]
    placed = [
        ((row + (column + 0.5) / 30 * 0.84 + 0.08) * 25, many.heights()[row, column] / top * 300 + lift)
        for (row, column), lift in zip(labeled(many), lifts(many, top), strict=True)
    ]
    assert len(placed) > 40
    assert all(
        abs(x - other) > 30 or abs(y - below) > 10.5
        for number, (x, y) in enumerate(placed) for other, below in placed[:number]
    )  # fmt: skip
    assert max(y for _, y in placed) < 300


def test_small_sets_have_no_score_unless_they_are_asked_for() -> None:
    sets = {"one": [7], "four": range(4), "five": range(20, 25)}
    how: Any = {"d_vocab": V, "permutations": 9}
    found = tsea.enrichment_of(lambda some: LOGITS[list(some)], [0, 1], sets, **how)
    assert found.left_out == {
        "one": "its size is 1, and sets of fewer than 5 tokens are not scored (min_size)",
        "four": "its size is 4, and sets of fewer than 5 tokens are not scored (min_size)",
    }
    assert found.scores.loc[["one", "four"]].isna().all(axis=None)
    assert np.isnan(found.p[:2]).all()  # type: ignore[index]
    every = tsea.enrichment_of(lambda some: LOGITS[list(some)], [0, 1], sets, min_size=1, **how)
    assert not every.left_out
    assert every.scores.loc["five"].equals(found.scores.loc["five"])
    with pytest.raises(saekit.ConfigError, match="min_size: must be a whole number of 1 or more, found 0"):
        tsea.enrichment_of(lambda some: LOGITS[list(some)], [0], sets, min_size=0, **how)


def test_that_p_can_be_no_smaller_is_said() -> None:
    logits = np.stack([np.arange(V), np.random.default_rng(0).permutation(V)]).astype(np.float32)
    found = tsea.enrichment_of(
        lambda some: logits[list(some)], [0, 1], {"last": range(V - 9, V)}, d_vocab=V, permutations=19
    )
    assert found.at_the_floor() == "1 p are 0.05, the least that 19 orders can give."
    assert "more orders (permutations) tell them apart" in page(found)


def test_what_can_be_seen_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*given: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("saekit.commands.material.load_model", never)
    (tmp_path / "file").touch()
    for options, told in (
        ({"sets": ["nope"]}, "'nope' is neither a file nor one of first_letter"),
        ({"regex": {"a": "("}}, "'a' is no reg"),
        ({"features": [5000]}, "are 0 to 39 of this SAE, found 5000"), ({"permutations": -1}, "permutations: must be"),
        ({"min_size": 0}, "min_size: must be"), ({"out": tmp_path / "file" / "x"}, "cannot write token set enrichment"),
    ):  # fmt: skip
        with pytest.raises(saekit.SaekitError, match=told):
            saekit.token_set_enrichment(made(), model="nothere", verbose=False, **options)


def test_of_very_many_points_the_highest_of_each_set_are_drawn() -> None:
    logits = np.random.default_rng(0).standard_normal((3100, 40)).astype(np.float32)
    many = tsea.enrichment_of(
        lambda some: logits[list(some)],
        range(3100),
        {"a": range(9), "b": [3, 20]},
        d_vocab=40,
        permutations=0,
        min_size=2,
    )
    drawn = [height for trace in many.manhattan().data for height in trace.y]
    assert len(drawn) == 6000
    assert min(drawn) >= np.sort(many.heights(), axis=1)[:, 100].min().round(4)


def test_files_need_no_network_and_hold_no_markup_of_names(found: tsea.Enrichment, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    one = attrs.evolve(found, name=evil, sets={evil: found.sets["digits"]}, values=attrs.evolve(
        found.values, unsigned=found.values.unsigned[28:29], signed=found.values.signed[28:29]), p=None)  # fmt: skip
    paths = one.write(tmp_path / "out")
    assert [path.name for path in paths] == ["tsea.csv", "tsea.parquet", "tsea.html"]
    page = paths[2].read_text(encoding="utf-8")
    assert evil not in page
    assert not re.search(r'(src|href)="(?!data:)', page.split("<script>")[0])
    assert "connect-src" not in page
    assert "default-src 'none'" in page
    for text in re.findall(r'<script type="application/json" class="figure">(.*?)</script>', page, re.S):
        json.loads(text)
    assert len(pd.read_parquet(paths[1])) == len(pd.read_csv(paths[0])) == 12


def test_a_folder_that_cannot_be_made_is_told(found: tsea.Enrichment, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(saekit.SaekitError, match="cannot write token set enrichment into"):
        found.write(tmp_path / "file" / "out")
