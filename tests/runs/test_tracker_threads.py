"""Trackers in their threads: whatever one does, training goes on and the others get everything."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.trackers import SOON, Recorder, Uploader, raises, waits

import saekit
from saekit.errors import MissingPackageError, PluginError, StorageError
from saekit.runs import trackers as under_test
from saekit.runs.trackers import Trackers, close_all, start_trackers
from saekit.testing import fake_plugin
from saekit.values import Histogram


@attrs.define
class Warned:
    """Every warning, and the thread that gave it."""

    texts: list[str] = attrs.field(factory=list)
    threads: set[int] = attrs.field(factory=set)

    def __call__(self, text: str, category: type[Warning], stacklevel: int = 1) -> None:
        assert category is RuntimeWarning
        self.texts.append(text)
        self.threads.add(threading.get_ident())


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Warned:
    found = Warned()
    monkeypatch.setattr(warnings, "warn", found)
    return found


# ---- what is handed over


def test_each_tracker_gets_everything_in_order_in_a_thread_of_its_own() -> None:
    one, two = Recorder(), Uploader()
    trackers = Trackers({"one": one, "two": two})
    histogram = Histogram((1, 2), (0.0, 0.5, 1.0))
    for step in range(1, 200):
        trackers.log({"loss": 1 / step, "h": histogram}, step)
    trackers.log_checkpoint(Path("sae"), 199)
    trackers.close()
    wanted = [({"loss": 1 / step, "h": histogram}, step) for step in range(1, 200)]
    assert one.calls == wanted
    assert two.calls == [*wanted, (Path("sae"), 199)]
    assert one.closed.is_set()
    assert two.closed.is_set()
    assert len(one.threads) == len(two.threads) == 1
    assert len({threading.get_ident()} | one.threads | two.threads) == 3
    assert trackers.failed == {}


def test_a_slow_tracker_holds_up_neither_training_nor_the_others(gate: threading.Event) -> None:
    slow, quick = Recorder(on_log=waits(gate)), Recorder()
    trackers = Trackers({"slow": slow, "quick": quick})
    for step in range(1, 1000):
        trackers.log({}, step)  # would wait for the gate's 30 s
    assert trackers.flush(SOON, only="quick")
    assert quick.steps == list(range(1, 1000))
    assert len(slow.steps) <= 1
    gate.set()
    trackers.close()
    assert slow.steps == list(range(1, 1000)), "and nothing is lost"


def test_what_was_handed_over_does_not_change_any_more(gate: threading.Event) -> None:
    slow = Recorder(on_log=waits(gate))
    greedy = Recorder()
    trackers = Trackers({"slow": slow, "greedy": greedy})
    metrics = {"a": 1.0}
    trackers.log(metrics, 1)
    trackers.log(metrics, 2)
    metrics["a"] = 2.0
    assert trackers.flush(SOON, only="greedy")
    greedy.calls[1][0].clear()
    gate.set()
    trackers.close()
    assert slow.calls == [({"a": 1.0}, 1), ({"a": 1.0}, 2)]


def test_flush_waits_for_the_last_record_and_not_longer_than_it_may(gate: threading.Event) -> None:
    slow, quick = Recorder(on_log=waits(gate)), Recorder()
    trackers = Trackers({"slow": slow, "quick": quick})
    assert trackers.flush(0.0), "nothing was handed over"
    trackers.log({}, 1)
    assert not trackers.flush(0.05)
    assert not trackers.flush(0.05, only="slow"), "the record that is being written counts"
    assert trackers.flush(SOON, only="quick")
    gate.set()
    assert trackers.flush(SOON)
    assert slow.steps == quick.steps == [1]
    trackers.close()


def test_flush_does_not_wait_for_a_tracker_that_is_off(warned: Warned) -> None:
    trackers = Trackers({"broken": Recorder(on_log=raises(OSError("no")))})
    trackers.log({}, 1)
    assert trackers.flush(SOON)
    assert len(warned.texts) == 1
    trackers.log({}, 2)
    assert trackers.flush(SOON)
    trackers.close()


def test_a_checkpoint_is_in_use_until_it_was_read(tmp_path: Path, gate: threading.Event) -> None:
    read = threading.Event()
    uploader = Uploader(on_log=waits(gate, read))
    trackers = Trackers({"plain": Recorder(), "uploader": uploader})
    trackers.log_checkpoint(tmp_path / "step-1" / "sae", 1)
    trackers.log_checkpoint(tmp_path / "step-2", 2)
    assert read.wait(SOON)
    assert trackers.in_use(tmp_path / "step-1"), "the one that is being read"
    assert trackers.in_use(tmp_path / "step-1" / "sae")
    assert trackers.in_use(tmp_path / "step-2"), "one that waits"
    assert not trackers.in_use(tmp_path / "step-3")
    gate.set()
    assert trackers.flush(SOON)
    assert not trackers.in_use(tmp_path)
    trackers.close()


# ---- failures


class Unspeakable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("no network"), "OSError: no network"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3"),
        (Unspeakable(), "Unspeakable"),
    ],
)
def test_a_failure_is_reported_once_in_the_training_thread(error: BaseException, text: str, warned: Warned) -> None:
    broken = Recorder(on_log=lambda step: raises(error)() if step == 3 else None)
    working = Recorder()
    trackers = Trackers({"x:broken": broken, "working": working})
    for step in range(1, 6):
        trackers.log({}, step)
        trackers.flush(SOON)
    trackers.log_checkpoint(Path("sae"), 5)
    trackers.close()
    trackers.close()
    assert warned.texts == [f"tracker x:broken failed at step 3 and is off now: {text}"]
    assert warned.threads == {threading.get_ident()}
    assert broken.steps == [1, 2, 3], "it is left alone"
    assert broken.closed.is_set()
    assert working.steps == [1, 2, 3, 4, 5]
    assert trackers.failed == {"x:broken": warned.texts[0]}


def test_what_waits_for_a_tracker_that_fails_is_dropped(gate: threading.Event, warned: Warned) -> None:
    def fail_when_open(step: int) -> None:
        gate.wait(SOON)
        raise OSError("no")

    broken = Uploader(on_log=fail_when_open)
    trackers = Trackers({"broken": broken})
    trackers.log({}, 1)
    trackers.log({}, 2)
    trackers.log_checkpoint(Path("sae"), 2)
    gate.set()
    assert trackers.flush(SOON)
    trackers.close()
    assert broken.steps == [1]
    assert not trackers.in_use(Path("sae"))
    assert len(warned.texts) == 1


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt("full"), SystemExit("full")])
def test_failures_with_a_checkpoint_and_at_the_end(error: BaseException, warned: Warned) -> None:
    uploader = Uploader()
    uploader.log_checkpoint = raises(error)  # type: ignore[method-assign]
    last = Recorder(on_close=raises(error))
    trackers = Trackers({"up": uploader, "last": last, "good": (good := Recorder())})
    trackers.log_checkpoint(Path("sae"), 7)
    trackers.close()
    kind = type(error).__name__
    assert warned.texts == [
        f"tracker up failed at step 7 and is off now: {kind}: full",
        f"tracker last failed to close: {kind}: full",
    ]
    assert good.closed.is_set()


def test_one_that_fails_and_then_fails_to_close_is_reported_once(warned: Warned) -> None:
    trackers = Trackers({"bad": Recorder(on_log=raises(OSError("a")), on_close=raises(OSError("b")))})
    trackers.log({}, 1)
    trackers.close()
    assert warned.texts == ["tracker bad failed at step 1 and is off now: OSError: a"]


def test_a_tracker_that_is_too_slow_is_off(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event, warned: Warned
) -> None:
    monkeypatch.setattr(under_test, "WAITING_AT_MOST", 3)
    started = threading.Event()
    slow = Recorder(on_log=waits(gate, started))
    trackers = Trackers({"slow": slow, "quick": (quick := Recorder())})
    trackers.log({}, 1)
    assert started.wait(SOON)
    for step in range(2, 5):
        trackers.log({}, step)
        trackers.flush(SOON, only="quick")
    assert warned.texts == []
    for step in range(5, 9):
        trackers.log({}, step)
        trackers.flush(SOON, only="quick")
    assert warned.texts == ["tracker slow is too slow: 3 records waited at step 5; it is off now"]
    assert trackers.flush(SOON / 3), "and nobody waits for it"
    assert not gate.is_set()
    gate.set()
    trackers.close()
    assert slow.steps == [1]
    assert slow.closed.is_set(), "it may still save what it has"
    assert quick.steps == list(range(1, 9))
    assert len(warned.texts) == 1


def test_one_that_hangs_is_left_behind(gate: threading.Event, warned: Warned) -> None:
    trackers = Trackers(
        {
            "hangs": Recorder(on_close=waits(gate)),
            "busy": (busy := Recorder(on_log=waits(gate))),
            "good": (good := Recorder()),
        }
    )
    for step in range(1, 4):
        trackers.log({}, step)
    trackers.close(timeout=0.1)
    assert warned.texts == [
        "tracker hangs did not end within 0.1 s and is left behind",
        "tracker busy did not end within 0.1 s and is left behind with 3 records to write",
    ]
    assert good.steps == [1, 2, 3]
    assert good.closed.is_set()
    trackers.close(timeout=0.0)
    assert len(warned.texts) == 2
    gate.set()
    assert busy.closed.wait(SOON)
    assert busy.steps == [1, 2, 3], "it goes on for as long as it can"


def test_the_trackers_of_several_saes_end_at_the_same_time(warned: Warned) -> None:
    """Each waits for all the others' ends, so one after the other would hang."""
    together = threading.Barrier(3)
    groups = [Trackers({f"t{i}": Recorder(on_close=lambda: together.wait(SOON))}) for i in range(3)]
    close_all(groups, timeout=SOON)
    assert warned.texts == []


def test_the_trackers_of_several_saes_share_the_time(gate: threading.Event, warned: Warned) -> None:
    begun = time.monotonic()
    close_all([Trackers({f"t{i}": Recorder(on_close=waits(gate))}) for i in range(20)], timeout=0.5)
    assert time.monotonic() - begun < 5
    assert len(warned.texts) == 20


def test_threads_do_not_keep_a_process_alive(gate: threading.Event) -> None:
    trackers = Trackers({"a": Recorder(on_close=waits(gate))})
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "tracker a"]
    assert thread.daemon
    gate.set()
    trackers.close()
    assert not thread.is_alive()


def test_an_interrupt_while_closing_leaves_every_tracker_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Recorder(), Recorder()
    trackers = Trackers({"one": one, "two": two})
    trackers.log({}, 1)
    monkeypatch.setattr(under_test._Worker, "ended_by", raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trackers.close()
    for tracker in (one, two):
        assert tracker.closed.wait(SOON)
        assert tracker.steps == [1]


def test_after_the_end_nothing_is_taken() -> None:
    tracker = Recorder()
    trackers = Trackers({"a": tracker})
    trackers.close()
    trackers.log({}, 1)
    assert trackers.flush(0.0)
    assert tracker.calls == []


# ---- starting


def manager(**builds: Any) -> saekit.PluginManager:
    plugins = saekit.PluginManager()
    for name, build in builds.items():
        options = attrs.make_class(f"{name.title()}Config", {}, frozen=True)
        plugins.register(fake_plugin("trackers", name, build=build, config=options), name=name)
    return plugins


def start(folder: Path, plugins: saekit.PluginManager, *names: Any, **options: Any) -> Trackers:
    config = saekit.load_config({"trackers": list(names)}, plugins=plugins)
    return start_trackers(config, plugins, folder, **options)


def test_the_trackers_of_a_run(tmp_path: Path) -> None:
    runs: list[saekit.RunInfo] = []
    recorder = Recorder()

    def build(config: Any, *, run: saekit.RunInfo) -> Recorder:
        runs.append(run)
        return recorder

    plugins = manager(fake=build)
    trackers = start(tmp_path, plugins, "fake")
    trackers.log({"a": 1.0}, 1)
    trackers.close()
    assert recorder.calls == [({"a": 1.0}, 1)]
    assert '"step": 1' in (tmp_path / "metrics.jsonl").read_text(), "the one that is always there"
    assert (runs[0].name, runs[0].folder, runs[0].resumed_at) == (tmp_path.name, tmp_path, None)
    assert runs[0].config["trackers"] == ["local:fake"]
    start(tmp_path, plugins, "fake", resumed_at=5).close()
    assert runs[1].resumed_at == 5


@pytest.mark.parametrize("error", [OSError("no login"), SystemExit("no login")])
def test_a_tracker_that_cannot_start_is_left_out(tmp_path: Path, error: BaseException) -> None:
    good = Recorder()
    plugins = manager(bad=lambda config, run: raises(error)(), good=lambda config, run: good)
    text = (
        f"the tracker local:bad cannot start and is off: {type(error).__name__}: no login; the other trackers have the "
        "metrics"
    )
    with pytest.warns(RuntimeWarning) as found:
        trackers = start(tmp_path, plugins, "bad", "good")
    assert [str(warning.message) for warning in found] == [text]
    trackers.log({"a": 1.0}, 1)
    trackers.close()
    assert good.steps == [1]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MissingPackageError("pip install it"), PluginError("mine")])
def test_what_ends_the_start_closes_those_that_have(tmp_path: Path, error: BaseException) -> None:
    first = Recorder()
    plugins = manager(first=lambda config, run: first, bad=lambda config, run: raises(error)())
    with pytest.raises(type(error)):
        start(tmp_path, plugins, "first", "bad")
    assert first.closed.is_set()


def test_a_missing_package_is_an_error(tmp_path: Path) -> None:
    plugins = saekit.PluginManager()
    plugins.register(fake_plugin("trackers", requires=("no_such_package",)), name="p")
    with pytest.raises(MissingPackageError, match="pip install"):
        start(tmp_path, plugins, "fake")


def test_the_tracker_that_is_always_there_must_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match="the tracker saekit:jsonl cannot start: IsADirectoryError"):
        start(tmp_path, saekit.PluginManager())
