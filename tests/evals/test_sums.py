"""Sums by contexts: merged in any order, resampled, and compared."""

from __future__ import annotations

import functools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.evals import AccumulatingEval, Sums, Totals, finished
from saekit.evals.sums import resamples
from saekit.measuring import Evaluation, Evaluations, Measure, Needs, Seen, measured_text


def drawn(n: int, seed: int = 0, **facts: Any) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(seed)
    return np.arange(n), {
        "value": generator.normal(size=n) * 10.0 ** generator.integers(-8, 8, n),
        "n": generator.integers(1, 9, n).astype(float),
        "vector": generator.normal(size=(n, 5)),
    }


def part(numbers: Any, columns: dict[str, Any], fired: Any = (1, 2, 3)) -> Sums:
    sums = Sums(d_sae=3)
    sums.add(numbers, {name: values[numbers] for name, values in columns.items()}, {"fired": np.array(fired)})
    return sums


def metrics(totals: Totals) -> dict[str, Any]:
    return {"mean": totals["value"] / totals["n"], "length": np.linalg.norm(totals["vector"], axis=1)}


@settings(max_examples=30)
@given(st.data())
def test_parts_merged_in_any_order_give_the_very_same_numbers(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 12))
    numbers, columns = drawn(n)
    shuffled = np.array(data.draw(st.permutations(list(numbers))))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4)))
    parts = [part(chunk, columns) for chunk in np.split(shuffled, cuts)]
    left = functools.reduce(lambda one, other: one.merged(other), parts)
    right = functools.reduce(lambda one, other: other.merged(one), parts)
    whole = part(numbers, columns, fired=np.array([1, 2, 3]) * len(parts))
    expected = finished(whole, metrics, 50)
    for merged in (left, right):
        found = finished(merged, metrics, 50)
        assert found.numbers() == expected.numbers()
        assert all(np.array_equal(found.resampled[name], expected.resampled[name]) for name in expected.resampled)
        assert np.array_equal(merged.count("fired"), whole.count("fired"))


def test_the_error_of_a_mean_is_that_of_its_closed_form() -> None:
    values = np.random.default_rng(1).normal(size=200)
    sums = Sums()
    sums.add(range(200), {"value": values})
    found = finished(sums, lambda totals: {"mean": totals["value"] / 200}, 4000)
    assert found["mean"] == pytest.approx(values.mean())
    assert found.errors["mean"] == pytest.approx(values.std() / math.sqrt(200), rel=0.05)


def test_resamples_are_the_same_for_all_and_whole_however_they_are_portioned(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = resamples(7, 30)
    assert (whole.sum(1) == 7).all()
    monkeypatch.setattr("saekit.evals.sums._BYTES", 7 * 8 * 11)
    portions = list(resamples(7, 30))
    assert [len(portion) for portion in portions] == [11, 11, 8]
    assert np.array_equal(np.concatenate(portions), whole)
    assert list(resamples(7, 0)) == []


def test_the_spread_of_rows_is_that_around_their_mean() -> None:
    generator = np.random.default_rng(2)
    contexts = [generator.normal(size=(n, 4)) + 1e5 for n in (3, 1, 6, 0)]
    sums = Sums()
    rows = [len(rows) for rows in contexts]
    totals = [rows.sum(0) for rows in contexts]
    within = [((rows - rows.mean(0)) ** 2).sum() if len(rows) else 0.0 for rows in contexts]
    sums.add(range(4), {"n": rows, "total": totals, "within": within})
    together = np.concatenate(contexts)
    (spread,) = sums.totals().spread("within", "total", "n")
    assert spread == pytest.approx(((together - together.mean(0)) ** 2).sum(), rel=1e-9)


def test_vectors_of_contexts_are_kept_once() -> None:
    sums, vectors = Sums(), np.arange(3 * 2 * 20_000.0).reshape(3, 2, 20_000)
    tracemalloc.start()
    try:
        for numbers, values in zip(([4, 1], [0, 5], [2, 3]), vectors, strict=True):
            sums.add(numbers, {"vector": values})
        assert sums.column("vector")[:, 0].tolist() == vectors[[1, 0, 2, 2, 0, 1], [0, 1, 0, 1, 0, 1], 0].tolist()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 1.2 * vectors.nbytes
    assert sums.column("vector") is sums.column("vector")
    sums.add([-1], {"vector": vectors[0, :1]})
    assert sums.column("vector")[:2, 0].tolist() == [vectors[0, 0, 0], vectors[1, 0, 0]], "in order once more"


def test_parts_that_do_not_belong_together_are_refused() -> None:
    numbers, columns = drawn(4)
    one = part(numbers[:2], columns)
    with pytest.raises(ValueError, match="context 1 is there twice; parts must have contexts of their own"):
        one.merged(part(numbers[1:], columns))
    with pytest.raises(ValueError, match="parts of different measurements: d_sae=3 and d_sae=4"):
        one.merged(Sums(d_sae=4))
    with pytest.raises(ValueError, match="columns must be value, n, vector, found other"):
        one.add([7], {"other": [1.0]})
    with pytest.raises(ValueError, match="nothing was measured"):
        finished(Sums(), metrics)


def test_one_context_has_no_error() -> None:
    sums = Sums()
    sums.add([0], {"value": [2.0]})
    assert finished(sums, lambda totals: {"mean": totals["value"]}).numbers() == {"mean": 2.0}


class Nothing(AccumulatingEval):
    needs = Needs(clean=True)

    def update(self, sums: Sums, seen: Seen) -> None: ...

    def metrics(self, totals: Totals) -> dict[str, Any]:
        return {}


def test_needs_are_united() -> None:
    both = Needs(rows=True, mean=3, batch_size=8) | Needs(clean=True, mean=5)
    assert both == Needs(rows=True, clean=True, mean=5, batch_size=8)
    assert (both.model, both.sae, both.by_logits) == (True, True, False)
    assert Nothing().needs.model


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.85312, 0.01234, "0.853 ± 0.012"),
        (1234.5, 67.8, "1,234 ± 68"),
        (4096.0, None, "4,096"),
        (0.123456, None, "0.1235"),
        (math.nan, 0.1, "nan"),
        (2.0, 0.0, "2 ± 0"),
        (3.0, math.nan, "3"),
        (1e-12, 1e-13, "1e-12 ± 1e-13"),
    ],
)
def test_numbers_have_as_many_digits_as_their_errors_leave(value: float, error: float | None, text: str) -> None:
    assert measured_text(value, error) == text


def test_evaluations_show_themselves_and_are_json() -> None:
    one = Evaluation(values={"l0": 3.0, "odd": math.nan}, errors={"l0": 0.5}, features={"f": np.array([0.5, np.nan])},
                     measures={"l0": Measure("L0", headline=1)})  # fmt: skip
    assert one.to_dict()["values"] == {"l0": 3.0, "odd": None}
    assert "features" not in one.to_dict()
    assert one.to_dict(features=True)["features"] == {"f": [0.5, None]}
    assert repr(one) == "Evaluation(l0 3.00 ± 0.50; 2 numbers on 0 contexts)"
    several = Evaluations({"a <b>": one, "c": Evaluation(values={"new": 1.0})})
    assert several.rows() == [["l0", "3.00 ± 0.50", ""], ["odd", "nan", ""], ["new", "", "1"]]
    assert "a &lt;b&gt;" in several._repr_html_()
    assert "3.00 ± 0.50" in one._repr_html_()
