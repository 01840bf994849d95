"""``saekit watch``: a run is followed from its first line to its end, whatever becomes of its files meanwhile."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.command import cli
from support.written import lines_of, record_of, records, write_record, write_run, write_sweep

import saekit
from saekit.commands import watch as watching
from saekit.commands.watch import Watched, line_of, picture, watch
from saekit.errors import PlaceError
from saekit.files.storage import locked
from saekit.reports.folder import SAERun


class Clock:
    """A clock that goes on when somebody sleeps, and lets the world go on with it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.world: dict[float, Callable[[], object]] = {}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 5000, "it watches for ever"
        for at in sorted(at for at in self.world if at <= self.now):
            self.world.pop(at)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watching.time, "monotonic", made)
    monkeypatch.setattr(watching.time, "sleep", made.sleep)
    monkeypatch.setattr(
        watching, "Watched", lambda folder: Watched(folder, clock=made)
    )  # whose default is the real one
    return made


def at_work(folder: Path, steps: int = 40) -> Path:
    return write_run(folder, records(steps, of=100, evals=-1), end=None, sae=False)


def screen(watched: Watched, width: int = 100, height: int = 30) -> str:
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(picture(watched, width, height))
    return console.export_text()


def said(folder: Path, every: float | None = None, *, terminal: bool = False) -> str:
    console = Console(width=120, height=40, file=io.StringIO(), record=True, force_terminal=terminal)
    watch(folder, console, every=every)
    return console.export_text()


def append(folder: Path, *made: Any, text: str = "") -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines_of(made) + text)


def lines(folder: Path, first: int, last: int) -> list[Any]:
    return [record_of(step, 1000 * step, 100_000) for step in range(first, last + 1)]


# ---- what is shown


def test_what_a_terminal_shows(tmp_path: Path) -> None:
    folder = at_work(tmp_path / "run")
    watched = Watched(folder)
    with locked(folder):
        watched.look()
        text = screen(watched)
        assert f"{folder}  running" in text
        assert "standard, 1,024 features on blocks.1.hook_resid_post of saekit/tiny-python" in text
        assert "40%  40k of 100k tokens  20,000 tokens/s  3.0 s left" in text
        rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
        assert rows["Explained variance"].split()[-2] == "0.856"
        assert rows["Explained variance"].rstrip().endswith("█" * 8) or "▇" in rows["Explained variance"]
        assert rows["Dead features, of 1,024"].split()[-2] == "20"
        assert "λ, l1_coefficient" in text
        assert "Ctrl-C ends the watching, not the run" in text
        for width in (40, 60, 200):
            assert max(map(len, screen(watched, width).splitlines())) <= width
        assert not watched.over


def test_a_run_in_a_line(tmp_path: Path) -> None:
    folder = at_work(tmp_path / "run")
    watched = Watched(folder)
    with locked(folder):
        watched.look()
        assert line_of(watched).split("  ") == [
            "40%", "40k of 100k tokens", "20,000 tokens/s", "3.0 s left", "loss 107.4", "EV 0.856", "L0 30.74",
            "dead 20",
        ]  # fmt: skip
    empty = write_run(tmp_path / "empty", [], end=None, sae=False)
    with locked(empty):
        fresh = Watched(empty)
        fresh.look()
        assert line_of(fresh) == "running, and nothing was logged yet"
        assert "nothing was logged yet: the model is loaded" in screen(fresh)


def test_several_saes(tmp_path: Path) -> None:
    points = {f"{n}_l1={n + 1}": {"sae": {"l1_coefficient": n + 1.0}} for n in range(30)}
    folder = write_sweep(tmp_path / "sweep", points, end=None, diverged={})
    with (folder / "3_l1=4/metrics.jsonl").open("w") as file:
        file.write(lines_of(lines(folder, 1, 10)))
    write_record(folder, {name: name for name in points}, "interrupted", diverged={"2_l1=3": "nan"})
    watched = Watched(folder)
    watched.look()
    text = screen(watched, 100, 20)
    assert "10%  10k of 100k tokens" in text, "that of the SAE that has the most before it"
    rows = [line for line in text.splitlines() if "_l1=" in line]
    assert len(rows) == 12
    assert "... and 18 more" in text
    assert rows[0].split()[:2] == ["0_l1=1", "60%"]
    assert rows[2].split()[:2] == ["2_l1=3", "diverged"]
    assert "EV 0.249 to 0.900" in line_of(watched)
    assert len(screen(watched, 100, 60).splitlines()) > 30


# ---- following


def test_from_before_the_folder_is_there_to_the_end(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "runs/run"
    clock.world = {
        40: lambda: at_work(folder, 10),
        70: lambda: append(folder, *lines(folder, 11, 50)),
        100: lambda: append(folder, *lines(folder, 51, 100), *records(100)[-1:]),
        102: lambda: write_record(folder, {"sae": "."}, "finished"),
    }
    text = said(folder)
    told = text.splitlines()
    assert told[0] == f"waiting for {folder} to appear"
    assert told[1].startswith("10%  10k of 100k tokens")
    assert told[2].startswith("50%  50k of 100k tokens")
    assert f"{folder}: finished" in told
    assert "CE recovered" in text
    assert 102 <= clock.now < 110
    assert sum(line.startswith("waiting") for line in told) == 1


@pytest.mark.parametrize("end", ["finished", "interrupted", "diverged", "failed"])
def test_a_run_that_has_ended_is_not_waited_for(tmp_path: Path, clock: Clock, end: str) -> None:
    folder = write_run(tmp_path / "run", end=end, reason="why")
    assert f"{folder}: {end}" in said(folder)
    assert clock.now == 0


def test_a_file_that_is_cut_back_and_goes_on(tmp_path: Path) -> None:
    """As when a run was killed and goes on from its checkpoint, with the watching going on."""
    folder = at_work(tmp_path / "run", 60)
    watched = Watched(folder)
    watched.look()
    assert watched.run is not None
    history = watched.run.alone.history
    assert history.step == 60
    shorter = folder / "new"
    shorter.write_text(lines_of(lines(folder, 1, 30)))
    shorter.replace(folder / "metrics.jsonl")
    watched.look()
    assert (history.step, len(history.series["metrics/l0"])) == (30, 30)
    append(folder, *lines(folder, 31, 45), text='{"step": 46, "metrics/l')
    watched.look()
    assert (history.step, history.damaged) == (45, 0)
    append(folder, text='0": 3.0}\n')
    watched.look()
    assert history.latest["metrics/l0"] == 3.0
    assert line_of(watched).startswith("46%")


def test_the_same_history_through_all_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is read again every few seconds, the metrics only once."""
    folder = at_work(tmp_path / "run")
    clock = Clock()
    watched = Watched(folder, clock=clock)
    read: list[Path] = []
    whole = SAERun.history.func

    def history(sae: SAERun) -> Any:
        read.append(sae.home)
        return whole(sae)

    monkeypatch.setattr(SAERun.history, "func", history)
    for _ in range(10):
        watched.look()
        screen(watched)
        clock.sleep(2)
    assert read == [], "of the whole file"


def test_a_sweep_to_its_end(tmp_path: Path, clock: Clock) -> None:
    points = {"0_l1=1": {"sae": {"l1_coefficient": 1.0}}, "1_l1=9": {"sae": {"l1_coefficient": 9.0}}}
    folder = write_sweep(tmp_path / "sweep", points, end=None)
    homes = {name: name for name in points}
    clock.world = {50: lambda: write_record(folder, homes, "finished", diverged={"1_l1=9": "nan"})}
    text = said(folder)
    assert text.startswith("60%  60k of 100k tokens")
    assert "diverged" in text
    assert f"{folder}: finished" in text


def test_a_process_that_is_killed(tmp_path: Path, clock: Clock) -> None:
    folder = at_work(tmp_path / "run")
    stack = contextlib.ExitStack()
    stack.enter_context(locked(folder))
    clock.world = {20: stack.close}
    text = said(folder)
    assert 20 <= clock.now < 40, "its lock is gone, so it is"
    assert f"{folder}: stopped: its process is gone, and did not say why" in text
    assert f"go on with it  saekit train --resume {folder}" in text


def test_silence_on_a_disk_without_locks(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains on another machine is known by what it writes alone."""
    monkeypatch.setattr("saekit.reports.folder.is_locked", lambda folder: None)
    folder = at_work(tmp_path / "run")

    def old(seconds: float) -> None:
        for path in folder.iterdir():
            os.utime(path, (time.time() - seconds,) * 2)

    clock.world = {100: lambda: append(folder, *lines(folder, 41, 42)), 101: lambda: old(200), 350: lambda: old(400)}
    said(folder)
    assert 400 <= clock.now < 450, "300 seconds after the last line"
    clock.now, clock.world = 0, {}
    old(1000)
    said(folder)
    assert 10 <= clock.now < 20, "it might be a clock that is wrong"
    clock.now = 0
    old(20_000)
    said(folder)
    assert clock.now < 3


def test_pictures_may_be_drawn_before_the_end_is_shown(tmp_path: Path, clock: Clock) -> None:
    folder = write_run(tmp_path / "run", end="finished")
    stack = contextlib.ExitStack()
    stack.enter_context(locked(folder))
    clock.world = {4: stack.close}
    said(folder)
    assert 4 <= clock.now < 9
    clock.now = 0
    stack.enter_context(locked(folder))
    clock.world = {
        15: lambda: write_record(folder, {"sae": "."}, None),
        30: lambda: write_record(folder, {"sae": "."}, "finished"),
        31: stack.close,
    }
    said(folder)
    assert clock.now >= 31, "it was gone on with"


def test_a_folder_that_goes_and_comes_back(tmp_path: Path, clock: Clock) -> None:
    folder = at_work(tmp_path / "run")
    clock.world = {
        31: lambda: folder.rename(tmp_path / "away"),
        70: lambda: write_run(folder, end="finished"),
    }
    told = said(folder).splitlines()
    assert told[0].startswith("40%")
    assert f"waiting for {folder} to appear" in told
    assert f"{folder}: finished" in told


def test_what_cannot_be_read_for_now(tmp_path: Path) -> None:
    folder = at_work(tmp_path / "run")
    clock = Clock()
    watched = Watched(folder, clock=clock)
    watched.look()
    (folder / "metrics.jsonl").rename(folder / "aside")
    (folder / "metrics.jsonl").mkdir()
    watched.look()
    assert line_of(watched) == f"{folder}/metrics.jsonl cannot be read: it is a folder, not a file"
    assert watched.problem in " ".join(screen(watched, 300).split())
    (folder / "metrics.jsonl").rmdir()
    (folder / "aside").rename(folder / "metrics.jsonl")
    (folder / "run.json").write_text("{")
    clock.sleep(10)
    watched.look()
    assert "run.json cannot be read" in watched.problem
    write_record(folder, {"sae": "."}, None)
    watched.look()
    assert line_of(watched).startswith("40%")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda place: place.write_text(""), "is a file, not a run folder"),
        (lambda place: (place.mkdir(), (place / "cfg.json").write_text("{}")), "is the folder of a saved SAE"),
        (lambda place: write_run(place / "first"), "is not a run folder, but holds the runs first; name one of them"),
        (lambda place: (write_run(place), (place / "run.json").write_text("{")), "run.json cannot be read"),
    ],
)
def test_where_no_run_will_appear(tmp_path: Path, clock: Clock, make: Callable[[Path], object], told: str) -> None:
    make(tmp_path / "place")
    with pytest.raises(PlaceError, match=told):
        said(tmp_path / "place")


def test_in_a_terminal_it_is_drawn_again_and_again(tmp_path: Path, clock: Clock) -> None:
    folder = at_work(tmp_path / "run")
    clock.world = {5: lambda: write_run(folder, end="finished")}
    text = said(folder, terminal=True)
    assert "40%" in text
    assert "100%" in text
    assert f"{folder}: finished" in text


# ---- the command


WATCH = [sys.executable, "-m", "saekit.cli", "watch"]


@contextlib.contextmanager
def watcher(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*WATCH, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    folder = at_work(tmp_path / "run")
    with locked(folder), watcher(folder, "--every", 0.2) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("40%")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "")


def test_it_imports_no_torch_and_says_how_it_ended(tmp_path: Path) -> None:
    found = cli("watch", write_run(tmp_path / "run"), watch=True)
    assert "run: finished" in found.stdout
    wrong = cli("watch", tmp_path / "run/sae", check=2, watch=True)
    assert wrong.stderr.startswith("error: ")


@pytest.mark.slow
def test_a_real_run_in_another_process(tmp_path: Path) -> None:
    config = {
        "dataset": {"context_size": 32},
        "sae": {"name": "standard", "d_sae": 64},
        "training": {"training_tokens": 20_000, "train_batch_size_tokens": 500, "log_frequency": 1},
        "evals": {"n_contexts": 2},
        "checkpoints": {"folder": str(tmp_path), "name": "run"},
    }
    (tmp_path / "run.json5.json").write_text(json.dumps(config))
    with watcher(tmp_path / "run", "--every", 0.1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"waiting for {tmp_path / 'run'} to appear\n"
        cli("train", tmp_path / "run.json5.json")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"{tmp_path / 'run'}: finished" in out
    assert "curves.html (" in out, "the pictures were waited for"
    assert "% " in out
    assert saekit.SAE.load(tmp_path / "run").d_sae == 64
