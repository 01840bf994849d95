"""Windows and quantiles: for any feature, window and number what their definitions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.saes import at, drawn_sae
from support.stores import HOOK, small_store

import saekit
from saekit.errors import ConfigError
from saekit.features.subject import chosen_features

few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
widths = st.one_of(st.none(), st.tuples(st.integers(0, 14), st.integers(0, 14)))


@few
@given(index=st.integers(0, 23), position=st.integers(0, 11), context=st.integers(0, 59), width=widths)
def test_a_window_is_the_context_around_a_token_and_nothing_else(
    store: Any, dense: Any, contexts: Any, index: int, position: int, context: int, width: Any
) -> None:
    window = store.saes["one"].feature(index).window(context, position, width)
    before, after = (99, 99) if width is None else width
    expected = [place for place in range(12) if position - before <= place <= position + after]
    assert window.start == expected[0]
    assert list(window.ids) == contexts[context, expected].tolist()
    assert list(window.values) == dense["one"][context, expected, index].tolist()
    assert window.position == position
    assert window.value == float(dense["one"][context, position, index])
    assert window.token == chr(contexts[context, position])


@few
@given(index=st.integers(0, 23), n=st.integers(1, 12), per=st.integers(0, 9), seed=st.integers(0, 3))
def test_quantiles_are_drawn_from_their_intervals(
    store: Any, dense: Any, index: int, n: int, per: int, seed: int
) -> None:
    feature = store.saes["one"].feature(index)
    values = dense["one"][..., index].double().numpy()
    found = feature.quantiles(n, per, seed)
    if values.max() == 0:
        assert found == []
        return
    assert [one.number for one in found] == [*range(n)][::-1]
    for one in found:
        low, high = values.max() * one.number / n, values.max() * (one.number + 1) / n
        assert (one.low, one.high) == pytest.approx((low, high), rel=1e-15)
        inside = (values >= one.low) & (values <= one.high)
        assert one.share == pytest.approx(inside.mean())
        assert len(one.windows) == min(per, inside.sum())
        places = [(window.context, window.position) for window in one.windows]
        assert len(set(places)) == len(places), "without replacement"
        assert all(inside[place] for place in places)
    assert found[0].high == values.max()
    assert found == feature.quantiles(n, per, seed), "by the seed"


def test_draws_are_fair_and_differ_by_seed(store: Any) -> None:
    feature = max(store.saes["one"], key=lambda one: one.fired)
    lowest = [feature.quantiles(2, 5, seed)[-1].windows for seed in range(80)]
    values = np.array([window.value for windows in lowest for window in windows])
    share = feature.quantiles(2, 1)[-1].share * feature.sae.tokens_counted
    zeros = feature.sae.tokens_counted - feature.fired
    assert (values == 0).mean() == pytest.approx(zeros / share, abs=0.1)
    fires = [window for one in feature.quantiles(2, 5, zeros=False) for window in one.windows]
    assert all(window.value > 0 for window in fires)


def test_peaks_at_the_ends_of_contexts_have_shorter_windows(store: Any, dense: Any) -> None:
    feature = next(one for one in store.saes["one"] if {0, 11} <= {window.position for window in one.top(100)})
    for window in feature.top(100, (3, 3)):
        assert len(window.ids) == min(window.position, 3) + 1 + min(11 - window.position, 3)
    assert {len(window.ids) for window in feature.top(9, (11, 11))} == {12}, "as long as the context"
    assert feature.top(9, (50, 50)) == feature.top(9, None), "contexts shorter than the window"


def test_top_windows_are_the_largest_activations(store: Any, dense: Any) -> None:
    for feature in store.saes["one"]:
        values = dense["one"][..., feature.index].flatten()
        largest = values.sort(descending=True, stable=True)
        expected = [divmod(int(place), 12) for place in largest.indices[:20] if values[place] > 0]
        assert [(window.context, window.position) for window in feature.top(20)] == expected
        distinct = feature.top(20, distinct_contexts=True)
        assert len({window.context for window in distinct}) == len(distinct)
        assert distinct[:1] == feature.top(1)


def test_no_example_is_about_a_special_token_that_does_not_count(store: Any, contexts: Any) -> None:
    for feature in store.saes["two"]:
        windows = feature.top(30) + [window for one in feature.quantiles(3, 50) for window in one.windows]
        assert all(window.counted[window.at] and window.ids[window.at] != 0 for window in windows)
        for window in windows:
            assert all(not window.values[place] for place, token in enumerate(window.ids) if token == 0)


@pytest.mark.parametrize("window", [-5, (1,), (-1, 2), (1.5, 2), "all"])
def test_what_is_no_window_is_refused(store: Any, window: Any) -> None:
    with pytest.raises(ConfigError, match="window: must be two whole numbers of 0 or more"):
        store.saes["one"].feature(0).top(1, window)


def test_one_number_is_both_sides_of_a_window(store: Any) -> None:
    feature = next(one for one in store.saes["one"] if not one.dead)
    assert feature.top(3, 2) == feature.top(3, (2, 2))


def test_what_is_in_a_store_is_told_in_a_line(store: Any) -> None:
    sae = store.saes["one"]
    feature = next(one for one in sae if not one.dead)
    assert repr(store) == f"FeatureStore({str(store.folder)!r}: 40 features of 2 SAEs on 720 tokens)"
    assert repr(sae) == "SAEFeatures('one': 24 features on 720 tokens)"
    assert repr(feature).startswith(f"Feature({feature.index} of 'one': fires on ")
    assert repr(sae.feature(4)) == "Feature(4 of 'one': fires on no token)"
    (window,) = feature.top(1)
    assert repr(window).startswith(f"Window({window.value:.4g} at {window.context}:{window.position}: ")
    assert f"⟦{window.token}⟧" in repr(window)
    assert "\n" not in "".join(map(repr, feature.quantiles()))
    assert f"Feature {feature.index} of one" in feature._repr_html_()
    with pytest.raises(ConfigError, match="found 'cosine'; each of them has its cosine"):
        feature.partners("cosine")


def test_what_no_store_has_is_refused_by_name(store: saekit.FeatureStore) -> None:
    sae = store.saes["one"]
    feature = sae.feature(int(sae.fired.argmax()))
    asked = {
        r"context: must be a whole number from 0 to 59, found -1": lambda: feature.window(-1, 0),
        r"context: .*found 60": lambda: feature.window(60, 0),
        r"position: must be a whole number from 0 to 11, found -1": lambda: feature.window(0, -1),
        r"position: .*found 12": lambda: feature.window(0, 12),
        r"n: must be a whole number of 1 or more, found 0": lambda: feature.quantiles(0),
        r"n: .*found -1": lambda: feature.quantiles(-1),
        r"per: must be a whole number of 0 or more, found -1": lambda: feature.quantiles(2, -1),
        r"n: must be a whole number of 0 or more, found -2": lambda: feature.top(-2),
        r"n: .*found -3": lambda: feature.partners(n=-3),
        r"n: .*found -4": lambda: feature.neighbors(-4),
        r"bins: must be a whole number of 1 or more, found 2\.5": lambda: feature.histogram(2.5),  # type: ignore[arg-type]
        r"feature: must be 0 to 23 for one, found '3'": lambda: sae.feature("3"),  # type: ignore[arg-type]
        r"feature: .*found None": lambda: sae.feature(None),  # type: ignore[arg-type]
        r"feature: must be 0 to 23 for one, found 1000": lambda: sae.feature(10**30),
    }
    for message, call in asked.items():
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_window_of_a_context_that_is_not_stored_is_no_zeros(tmp_path: Path) -> None:
    feature = max(small_store(tmp_path / "store", max_per_feature=10, top_kept=3).sae, key=lambda one: one.fired)
    lost = next(number for number in range(40) if number not in feature.contexts)
    with pytest.raises(ConfigError, match=rf"context: {lost} is not in the sample that is stored of feature"):
        feature.window(lost, 0)
    at = int(feature.contexts[0]), int(feature.positions[0])
    assert feature.window(*at).value == feature.values[0]


def test_neighbors_are_features_of_the_sae(tmp_path: Path) -> None:
    sae = at(drawn_sae(8, d_sae=5), HOOK, model_name="fake")
    with torch.no_grad():
        sae.W_dec[3] = 0
    store = small_store(tmp_path / "store", sae)
    assert {number for number, _ in store.feature(0).neighbors()} == {1, 2, 4}
    assert len(store.feature(0).alignment()) == 8
    assert (store.feature(3).neighbors(), store.feature(3).alignment()) == ([], [])


@pytest.mark.parametrize("features", [np.array([[1, 2]]), torch.tensor([1.5]), [True], "1,2", {1: 2}, iter([1]), 3])
def test_what_are_no_numbers_of_features_is_refused(features: Any) -> None:
    with pytest.raises(ConfigError, match="features: must be numbers"):
        chosen_features(features, 8, "one")


@pytest.mark.parametrize(
    "features",
    [
        np.array([3, 1]),
        torch.tensor([1, 3]),
        [torch.tensor(1), np.int32(3)],
        (1, 3, 3),
        {3, 1},
        dict.fromkeys((1, 3)).keys(),
    ],
)
def test_numbers_of_features_are_of_any_kind(features: Any) -> None:
    assert chosen_features(features, 8, "one").tolist() == [1, 3]
