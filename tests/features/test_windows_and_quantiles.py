"""Windows and quantiles: for any feature, window and number what their definitions say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saekit.errors import ConfigError

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
