"""Metrics as they are on disk: half lines, torn lines, files that are cut, and long runs in little memory."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.written import lines_of, records

from saekit.errors import StorageError
from saekit.reports.history import History, MetricsFile, Series, read_history

NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-(10**400), 10**400), st.booleans(), st.just("text"))
NAMES = st.sampled_from(
    ["losses/overall_loss", "metrics/l0", "evals/ce_recovered", "details/n_training_tokens", "seconds", "other"]
)
RECORDS = st.lists(
    st.tuples(st.integers(-2, 60), st.dictionaries(NAMES, NUMBERS, max_size=4)).map(lambda r: {"step": r[0], **r[1]}),
    max_size=12,
)
JUNK = st.one_of(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"") + b"\n"), st.just(b"[1]\n"))

few = settings(max_examples=80)


def bytes_of(made: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in made)


def told(history: History) -> Any:
    """All that a history says, so that nan is equal to nan."""
    series = {name: (one.pieces(), one.last) for name, one in history.series.items()}
    return repr(
        (history.step, history.tokens, history.seconds, history.records, history.damaged, history.latest, series,
         history.evals_at, history.rate())
    )  # fmt: skip


@few
@given(RECORDS, st.lists(JUNK, max_size=3), st.lists(st.integers(0, 2000), max_size=5))
def test_a_file_that_grows_is_read_once_whatever_pieces_it_comes_in(
    made: list[dict[str, Any]], junk: list[bytes], cuts: list[int]
) -> None:
    data = bytes_of(made) + b"".join(junk) + bytes_of(made[::-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        history, file = History(), MetricsFile(path)
        assert not file.update(history), "it is not there yet"
        ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
        for start, end in zip([0, *ends], ends, strict=False):
            with path.open("ab") as written:
                written.write(data[start:end])
            file.update(history)
        assert told(history) == told(read_history(path))
        assert not file.update(history), "nothing is new"
        assert history.records + history.damaged <= data.count(b"\n")


@few
@given(RECORDS, RECORDS, st.integers(0, 12), st.binary(max_size=20))
def test_a_file_that_is_cut_and_written_anew(
    made: list[dict[str, Any]], after: list[dict[str, Any]], kept: int, torn: bytes
) -> None:
    """As a run does that goes on: the lines of steps that come again are taken away, in a file that takes its place."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(bytes_of(made) + torn.replace(b"\n", b""))
        history, file = History(), MetricsFile(path)
        file.update(history)
        new = path.with_name("new")
        new.write_bytes(bytes_of(made[:kept] + after))
        new.replace(path)
        file.update(history)
        assert told(history) == told(read_history(path))


@few
@given(st.binary(max_size=300))
def test_nothing_in_a_file_is_an_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(data)
        assert read_history(path).records <= data.count(b"\n")


def test_the_end_of_a_large_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(records(400)))
    whole, end = read_history(path), read_history(path, last=20_000)
    assert end.latest == whole.latest
    assert end.step == whole.step == 400
    assert end.records < whole.records / 5
    assert end.damaged == 0, "it begins with a whole line"
    history, file = History(), MetricsFile(path, last=20_000)
    file.update(history)
    with path.open("a") as grown:
        grown.write('{"step": 401, "metrics/l0": 7.0}\n')
    assert file.update(history)
    assert (history.step, history.latest["metrics/l0"]) == (401, 7.0)


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(records(2000)))
    history, file = History(), MetricsFile(path)
    file.update(history)
    read: list[int] = []

    class Counted:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def read(self, size: int) -> bytes:
            read.append(size)
            return self.inner.read(size)

        def readline(self, size: int) -> bytes:
            line = self.inner.readline(size)
            read.append(len(line))
            return line

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest, **more: Counted(opened(self, *rest, **more)))
    for _ in range(3):
        assert not file.update(history)
    assert sum(read) < 3 * 300, "of a file of more than a megabyte"


def test_half_a_line_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "metrics/l0": 5.0}\n{"step": 2, "metr')
    history, file = History(), MetricsFile(path)
    assert file.update(history)
    assert (history.step, history.records, history.damaged) == (1, 1, 0)
    assert not file.update(history)
    with path.open("a") as more:
        more.write('ics/l0": 6.0}\n')
    assert file.update(history)
    assert (history.step, history.latest["metrics/l0"]) == (2, 6.0)


def test_a_file_that_goes_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    history, file = History(), MetricsFile(path)
    file.update(history)
    path.unlink()
    assert file.update(history)
    assert (history.step, history.records) == (0, 0)
    assert not file.update(history)
    path.write_text('{"step": 1}\n')
    assert file.update(history)
    assert history.step == 1


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(StorageError, match=r"metrics.jsonl cannot be read: it is a pipe or a device"):
        read_history(tmp_path / "metrics.jsonl")
    with pytest.raises(StorageError, match="cannot be read: it is a folder"):
        read_history(tmp_path)


def test_evals_are_where_they_were_made_and_nan_is_a_gap() -> None:
    history = History()
    for record in (
        {"step": 10, "details/n_training_tokens": 1000, "metrics/l0": 4.0, "losses/overall_loss": 2.0},
        {"step": 15, "evals/l0": 3.0},
        {"step": 20, "details/n_training_tokens": 2000, "metrics/l0": 5.0, "losses/overall_loss": None},
        {"step": 20, "evals/l0": 2.5},
        {"step": 12, "metrics/l0": 99.0},
        {"step": True},
        {"no step": 3},
    ):
        history.add(record)
    assert [(piece.x, piece.mean) for piece in history.series["evals/l0"].pieces()] == [(1500, 3.0), (2000, 2.5)]
    assert [piece.mean for piece in history.series["metrics/l0"].pieces()] == [4.0, 5.0], "step 12 was said before"
    loss = history.series["losses/overall_loss"].pieces()
    assert loss[0].mean == 2.0
    assert math.isnan(loss[1].mean)
    assert history.get("losses/overall_loss") is None
    assert history.get("evals/ce_recovered", "metrics/l0") == 5.0
    assert (history.tokens, history.evals_at, history.damaged) == (2000, 2000, 2)


def test_the_rate_is_that_of_the_last_minute() -> None:
    history = History()
    for step in range(1, 401):
        seconds = step if step < 300 else 299 + (step - 299) / 10  # ten times as fast at the end
        history.add({"step": step, "seconds": seconds, "details/n_training_tokens": 100 * step})
    assert history.rate(over=5) == pytest.approx(1000)
    assert history.rate(over=1e9) == pytest.approx((40_000 - 100) / (history.seconds - 1))
    assert History().rate() is None


@few
@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300), st.integers(2, 9))
def test_a_series_keeps_every_spike_in_few_pieces(values: list[float], most: int) -> None:
    series = Series(most)
    for x, value in enumerate(values):
        series.add(x, value)
    finite = [value for value in values if math.isfinite(value)]
    for pieces in (series.pieces(), series.pieces(most)):
        assert len(pieces) <= 2 * most
        there = [piece for piece in pieces if math.isfinite(piece.mean)]
        assert (min(p.low for p in there), max(p.high for p in there)) == (min(finite), max(finite)) if finite else True
        assert [piece.x for piece in pieces] == sorted({piece.x for piece in pieces})
        assert pieces[-1].x == len(values) - 1
        assert all(piece.low <= piece.mean + 1e-6 and piece.mean - 1e-6 <= piece.high for piece in there)
    assert len(series.pieces(most)) <= most
    if len(values) <= 2 * most:
        assert repr([piece.mean for piece in series.pieces()]) == repr(values), "of a short run, each number"


def test_a_long_run_takes_little_memory() -> None:
    history = History()
    for step in range(1, 20_001):
        history.add({"step": step, "details/n_training_tokens": step * 4096, "losses/overall_loss": 1.0 / step})
    assert len(history.series["losses/overall_loss"]) <= 800
    for number in range(500):
        history.add({"step": 20_001 + number, f"evals/of_feature_{number}": 1.0})
    assert len(history.series) <= 200
