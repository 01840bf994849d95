"""No tracker loses a record when a run is killed: what it has not taken is in the checkpoint, and comes again."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.runs import contents, fake_config, manager, resume, stopped, train
from support.trackers import SOON, Recorder, Uploader, raises, waits

import saekit
from saekit.errors import ConfigError
from saekit.runs import trackers as under_test
from saekit.runs.checkpoints import newest_checkpoint
from saekit.runs.tracker_files import TrackerFiles
from saekit.runs.trackers import Trackers, settle_all
from saekit.runs.waiting import Record, waiting_of, waiting_state
from saekit.testing import fake_plugin
from saekit.values import Histogram, RunInfo

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- a run that is killed


class Diary:
    """Takes its time for each record, and writes it into a file of its own when it has it."""

    def __init__(self, config: object, run: RunInfo) -> None:
        self._file = run.file("diary.txt").open("a")

    def log(self, metrics: Any, step: int) -> None:
        time.sleep(float(os.environ.get("DIARY_SECONDS", "0")))
        self._write(f"{step} {metrics.get('losses/mse_loss')} {'evals/l0' in metrics}")

    def log_checkpoint(self, folder: Path, step: int) -> None:
        assert (folder / "cfg.json").exists()
        self._write(f"{step} saved")

    def _write(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def plugins() -> saekit.PluginManager:
    return manager(None, fake_plugin("trackers", "diary", build=Diary))


def config(folder: Path, **checkpoints: Any) -> Any:
    return fake_config(folder, checkpoints={"name": "run", **checkpoints}) | {"trackers": ["diary"]}


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/runs"]
import test_trackers_killed as t
t.train(t.config(Path(sys.argv[2]), n_checkpoints=5), plugins=t.plugins())
"""


@pytest.mark.parametrize("kill_after", ["step-6", "step-11"])
def test_a_tracker_that_is_far_behind_when_the_run_is_killed(tmp_path: Path, kill_after: str) -> None:
    (tmp_path / "whole").mkdir()
    train(config(tmp_path / "whole", n_checkpoints=5), plugins=plugins())
    slow = os.environ | {"DIARY_SECONDS": "3"}
    process = warm.Popen("-c", PROGRAM, Path(__file__).parents[1], tmp_path, env=slow)
    run, deadline = tmp_path / "run", time.monotonic() + 120
    while not (run / "checkpoints" / kill_after).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    before = (run / "diary.txt").read_text().splitlines()
    newest = newest_checkpoint(run).facts["batches"]
    assert len(before) < newest, "it lost records, or this shows nothing"
    resume(run, plugins=plugins())
    ours, wanted = ((folder / "diary.txt").read_text().splitlines() for folder in (run, tmp_path / "whole/run"))
    assert len(wanted) == 12 + 6
    assert list(dict.fromkeys(ours)) == wanted, "all of it, in order; some twice"
    assert ours[: len(before)] == before
    assert contents(run)["metrics.jsonl"] == contents(tmp_path / "whole/run")["metrics.jsonl"]


def test_a_run_that_is_stopped_hands_nothing_over_twice(tmp_path: Path) -> None:
    """But for the SAE of the last checkpoint, which was written before anybody could be told."""
    stopped(config(tmp_path), 5, plugins=plugins())
    resume(tmp_path / "run", plugins=plugins())
    lines = (tmp_path / "run/diary.txt").read_text().splitlines()
    steps = [line.split()[0] for line in lines if not line.endswith("saved")]
    assert steps == [*(str(step) for step in range(1, 12)), "11"]
    assert [line for line in lines if line.endswith("saved")] == ["5 saved", "5 saved", "11 saved"]


def test_trackers_that_keep_up_leave_nothing_in_a_checkpoint(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 5)
    assert newest_checkpoint(tmp_path / "run").stream()["trackers"] == {"sae": {}}


def test_a_tracker_that_hangs_does_not_hold_training_up(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait, however many checkpoints; then all that it was given is in each."""
    monkeypatch.setattr("saekit.runs.saving._SECONDS_FOR_TRACKERS", 0.7)
    close = under_test.close_all
    monkeypatch.setattr("saekit.runs.run.close_all", lambda groups, timeout=0.1: close(groups, 0.1))
    slow = Recorder(on_log=waits(gate))
    own = manager(None, fake_plugin("trackers", "slow", build=lambda config, run: slow))
    settled: list[float] = []
    settle = settle_all

    def timed(*arguments: Any) -> None:
        begun = time.monotonic()
        settle(*arguments)
        settled.append(time.monotonic() - begun)

    monkeypatch.setattr("saekit.runs.saving.settle_all", timed)
    sections = fake_config(tmp_path, checkpoints={"name": "run", "every_minutes": 1e-9}) | {"trackers": ["slow"]}
    with pytest.warns(RuntimeWarning, match="tracker test:slow did not end within 0.1 s"):
        train(sections, plugins=own)
    assert len(settled) == 12
    assert 0.6 < sum(settled) < 1.2
    waiting = newest_checkpoint(tmp_path / "run").stream()["trackers"]["sae"]
    assert set(waiting) == {"test:slow"}
    assert [record["step"] for record in waiting["test:slow"]] == [*range(1, 12), 11]


# ---- what waits


def test_what_waits_is_what_was_not_taken(gate: threading.Event) -> None:
    begun = threading.Event()
    slow, quick, uploader = Recorder(on_log=waits(gate, begun)), Recorder(), Uploader()
    trackers = Trackers({"slow": slow, "quick": quick, "up": uploader})
    metrics = {"a": 1.0}
    for step in (1, 2, 3):
        trackers.log(metrics, step)
    metrics["a"] = 2.0
    assert begun.wait(SOON)
    settle_all([trackers], 0.05)
    wanted = [Record(step, {"a": 1.0}) for step in (1, 2, 3)]
    assert trackers.waiting() == {"slow": wanted, "quick": [], "up": []}, "one that is being taken is not taken"
    saved = Record(3, folder=Path("step-3/sae"))
    assert trackers.waiting(saved) == {"slow": wanted, "quick": [], "up": [saved]}
    gate.set()
    assert trackers.flush(SOON)
    assert trackers.waiting() == {"slow": [], "quick": [], "up": []}
    trackers.close()


def test_what_waited_comes_first_and_may_be_more_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "WAITING_AT_MOST", 3)
    tracker = Uploader()
    waiting = [Record(step, {"a": float(step)}) for step in range(1, 6)] + [Record(5, folder=Path("sae"))]
    trackers = Trackers({"a": tracker, "b": (other := Recorder())}, {"a": waiting, "gone": waiting})
    trackers.flush(SOON)
    trackers.log({"a": 6.0}, 6)
    trackers.close()
    assert tracker.calls == [*(({"a": float(n)}, n) for n in range(1, 6)), (Path("sae"), 5), ({"a": 6.0}, 6)]
    assert other.steps == [6]


def test_one_that_is_off_is_owed_what_it_has_not_taken() -> None:
    """It is handed over when the run goes on; SAE folders are not kept for it."""
    trackers = Trackers({"broken": Recorder(on_log=raises(OSError("no")))})
    trackers.log({}, 1)
    with pytest.warns(RuntimeWarning, match="broken failed"):
        trackers.flush(SOON)
    trackers.log({}, 2)
    trackers.log_checkpoint(Path("step-2"), 2)
    assert [record.step for record in trackers.waiting()["broken"]] == [1, 2]
    assert not trackers.in_use(Path("step-2"))
    trackers.close()


def test_one_that_cannot_be_started_is_owed_what_it_has_not_taken() -> None:
    trackers = Trackers({"jsonl": Recorder()}, {"wandb": [Record(1)]})
    trackers.log({}, 2)
    assert trackers.flush(SOON)
    assert [record.step for record in trackers.waiting()["wandb"]] == [1, 2]
    trackers.close()


def test_a_laggard_is_waited_for_again_once_it_has_caught_up(gate: threading.Event) -> None:
    trackers = Trackers({"slow": Recorder(on_log=waits(gate))})
    trackers.log({}, 1)
    for timeout, least, most in ((0.3, 0.25, 5.0), (30.0, 0.0, 0.2), (30.0, 0.0, 0.2)):
        begun = time.monotonic()
        settle_all([trackers], timeout)
        assert least <= time.monotonic() - begun < most
    gate.set()
    assert trackers.flush(SOON)
    settle_all([trackers], 0.0)
    trackers.log({}, 2)
    settle_all([trackers], SOON)
    assert trackers.waiting() == {"slow": []}
    trackers.close()


def test_waiting_records_as_plain_values(tmp_path: Path) -> None:
    (tmp_path / "step-3/sae").mkdir(parents=True)
    histogram = Histogram((1, 2), (0.0, 0.5, 1.0))
    records = [
        Record(3, {"a": 0.1, "h": histogram}),
        Record(3, folder=tmp_path / "step-3/sae"),
        Record(2, folder=tmp_path / "step-2/sae"),
    ]
    state = json.loads(json.dumps(waiting_state({"x": records, "y": []}, tmp_path)))
    assert set(state) == {"x"}
    assert waiting_of(state, tmp_path) == {"x": records[:2]}, "an SAE that is gone is of no use to anybody"
    moved = tmp_path / "moved"
    (moved / "step-2/sae").mkdir(parents=True)
    assert waiting_of(state, moved) == {"x": [records[0], Record(2, folder=moved / "step-2/sae")]}


# ---- jsonl


def jsonl(folder: Path, resumed_at: int | None = None, **options: Any) -> Any:
    plugins = saekit.default_manager()
    choice = saekit.load_config({"trackers": [{"name": "jsonl", **options}]}, plugins=plugins).trackers[0]
    return plugins.build("trackers", choice, run=RunInfo("run", folder, {}, resumed_at, TrackerFiles(folder).path))


def test_jsonl_keeps_no_record_twice(tmp_path: Path) -> None:
    """Whichever of those that come again were there already."""
    records = [
        ({"loss": 1 / step, "h": Histogram((1,), (0.0, 1.0)), "nan": float("nan")}, step) for step in range(1, 9)
    ]
    records.insert(4, ({"evals/l0": 3.0}, 4))
    tracker = jsonl(tmp_path)
    for metrics, step in records[:6]:
        tracker.log(metrics, step)
    tracker.close()
    whole = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tracker = jsonl(tmp_path, resumed_at=8)
    for metrics, step in records[2:]:
        tracker.log(metrics, step)
    tracker.log({"loss": 0.0}, 9)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert lines[:6] == whole


@pytest.mark.parametrize(
    "file",
    ["config.toml", "run.json", "sae", "checkpoints", "summary.csv", "summary.png", "wandb-run-id.txt", "wandb",
     ".hidden", "..", ".", "", "a/b", "/tmp/x", "a\\b", "Config.TOML", "a\nb", "x" * 300, "x" * 201],
)  # fmt: skip
def test_jsonl_takes_no_file_of_the_run(file: str) -> None:
    with pytest.raises(
        ConfigError, match=r"trackers\[0\].file: must be the name of a file without folders, which is no"
    ):
        saekit.load_config({"trackers": [{"name": "jsonl", "file": file}]})


def test_two_trackers_do_not_share_a_file(tmp_path: Path) -> None:
    run = RunInfo("run", tmp_path, {}, file=TrackerFiles(tmp_path).path)
    assert run.file("mine.txt") == tmp_path / "mine.txt"
    for name, told in (
        ("mine.txt", "is another tracker's; choose another name"), ("MINE.txt", "is another tracker's"),
        ("run.json", "is a file of the run itself"), (".x", "is a file of the run itself"), ("../x", "is a path"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"trackers: the file '{name}' in the run folder {told}"):
            run.file(name)

    def build(config: object, *, run: RunInfo) -> Recorder:
        run.file("Metrics.jsonl")
        return Recorder()

    with pytest.raises(ConfigError, match=r"the file 'Metrics.jsonl' in the run folder is another tracker's"):
        train(
            fake_config(tmp_path) | {"trackers": ["second"]},
            plugins=manager(None, fake_plugin("trackers", "second", build=build)),
        )


def test_jsonl_whose_file_is_removed_says_so(tmp_path: Path) -> None:
    tracker = jsonl(tmp_path)
    tracker.log({}, 1)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(OSError, match=r"metrics.jsonl was removed while the run was writing to it"):
        tracker.log({}, 2)
    tracker.close()


@pytest.mark.parametrize("room", [0, 10], ids=["none", "for a part"])
def test_a_line_that_does_not_fit_on_the_disk_can_come_again(tmp_path: Path, room: int) -> None:
    left = [10_000]

    class Disk(io.FileIO):
        def write(self, data: Any) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = super().write(bytes(data[: left[0]]))
            left[0] -= written
            return written

    tracker = jsonl(tmp_path)
    tracker._file.close()
    tracker._file = Disk(tmp_path / "metrics.jsonl", "ab")
    tracker.log({"loss": 0.5}, 1)
    left[0] = room
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            tracker.log({"loss": 0.25}, 2)
    left[0] = 10_000
    tracker.log({"loss": 0.25}, 2)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]


class OnADisk:
    """Takes nothing while its disk is full."""

    def __init__(self) -> None:
        self.full, self.taken = True, list[int]()

    def log(self, metrics: Any, step: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.taken.append(step)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("room", [True, False])
def test_records_wait_for_room_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    monkeypatch.setattr(under_test, "_AGAIN", 0.01)
    disk = OnADisk()
    trackers = Trackers({"own": disk})
    for step in (1, 2, 3):
        trackers.log({}, step)
    assert not trackers.flush(0.05)
    assert [record.step for record in trackers.waiting()["own"]] == [1, 2, 3]
    assert not trackers.failed
    if room:
        disk.full = False
        assert trackers.flush(SOON)
        assert under_test.close_all([trackers])
        assert disk.taken == [1, 2, 3]
        return
    with pytest.warns(RuntimeWarning, match="tracker own failed at step 1 and is off now: OSError: .*No space left"):
        assert not under_test.close_all([trackers])
    assert [record.step for record in trackers.waiting()["own"]] == [1, 2, 3], "for the run that goes on"


def test_jsonl_tidies_up_after_itself_alone(tmp_path: Path) -> None:
    for name in (".m.jsonl.0a1b2c3d.tmp", ".thesis.0a1b2c3d.tmp"):
        (tmp_path / name).write_text("half written")
    jsonl(tmp_path, file="m.jsonl").close()
    assert {path.name for path in tmp_path.iterdir()} == {"m.jsonl", ".thesis.0a1b2c3d.tmp"}


def test_a_run_is_finished_when_its_trackers_are(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is left behind is handed the rest when the run goes on, for which there is nothing else to do."""
    close = under_test.close_all
    monkeypatch.setattr("saekit.runs.run.close_all", lambda groups, timeout=0.1: close(groups, 0.1))
    monkeypatch.setattr("saekit.runs.saving._SECONDS_FOR_TRACKERS", 0.1)
    slow = [Recorder(on_log=waits(gate)), (second := Recorder())]
    own = manager(None, fake_plugin("trackers", "slow", build=lambda config, run: slow.pop(0)))
    with pytest.warns(RuntimeWarning, match=r"tracker test:slow did not end within 0.1 s and is left behind with 12"):
        train(fake_config(tmp_path) | {"trackers": ["slow"]}, plugins=own)
    assert not newest_checkpoint(tmp_path / "run").facts["finished"]
    before = contents(tmp_path / "run")
    monkeypatch.setattr("saekit.runs.run.close_all", close)
    resume(tmp_path / "run", plugins=own)
    assert second.steps == [*range(1, 12), 11, 11]
    assert newest_checkpoint(tmp_path / "run").facts["finished"]
    assert {path: summed for path, summed in contents(tmp_path / "run").items() if "checkpoint" not in path} == {
        path: summed for path, summed in before.items() if "checkpoint" not in path
    }
    with pytest.raises(ConfigError, match="is finished"):
        resume(tmp_path / "run", plugins=own)
