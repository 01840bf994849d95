"""The built-in trackers, by reading back what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from saekit_plugins.trackers.wandb import WandbConfig, WandbTracker
from support.tiny import run_config
from support.wandb_runs import fake_wandb, needs_wandb, read_back

import saekit
from saekit.errors import PluginFailedError
from saekit.protocols import Tracker
from saekit.runs.trackers import start_trackers
from saekit.values import Histogram, RunInfo

HISTOGRAM = Histogram((1, 5, 2), (-1.0, 0.0, 0.5, 2.0))

# ---- jsonl


def jsonl(folder: Path, resumed_at: int | None = None) -> Tracker:
    run = RunInfo("run", folder, {}, resumed_at)
    tracker: Tracker = saekit.default_manager().build("trackers", "jsonl", run=run)
    return tracker


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_jsonl_writes_histograms_as_counts_and_edges(tmp_path: Path) -> None:
    tracker = jsonl(tmp_path)
    tracker.log({"h": HISTOGRAM, "loss": 0.5, "bad": float("nan")}, 3)
    tracker.log({"h": Histogram((1,), (0.0, float("inf")))}, 4)
    tracker.close()
    first, second = records(tmp_path)
    assert first.pop("seconds") >= 0
    assert first == {"step": 3, "h": {"counts": [1, 5, 2], "edges": [-1.0, 0.0, 0.5, 2.0]}, "loss": 0.5, "bad": None}
    assert second["h"] == {"counts": [1], "edges": [0.0, None]}, "JSON has no infinity"


def test_jsonl_appends_when_nothing_was_resumed(tmp_path: Path) -> None:
    for step in (5, 1):
        tracker = jsonl(tmp_path)
        tracker.log({}, step)
        tracker.close()
    assert [record["step"] for record in records(tmp_path)] == [5, 1]


def test_jsonl_resumed_without_a_file(tmp_path: Path) -> None:
    tracker = jsonl(tmp_path, resumed_at=3)
    tracker.log({}, 4)
    tracker.close()
    assert [record["step"] for record in records(tmp_path)] == [4]


LINES = st.lists(
    st.tuples(st.integers(0, 20), st.floats(0, 1e6), st.dictionaries(st.text(), st.none() | st.floats(-9, 9))),
    max_size=8,
)
TORN = st.binary(max_size=30).map(lambda tail: tail.replace(b"\n", b"")) | st.sampled_from(
    [b'{"step": 1, "seconds": 0.0}', b'{"step": 1, "sec', b"{", b"\xff\xfe", b"\0\0\0"]
)
DAMAGED = st.sampled_from([b"", b"{", b"\xff\xfe", b"\0\0", b"3", b"null", b"[1]", b'{"a": 1}', b'{"step": null}'])


@given(lines=LINES, damaged=st.lists(st.tuples(st.integers(0, 8), DAMAGED), max_size=2), torn=TORN,
       resumed_at=st.integers(0, 21))  # fmt: skip
@example(lines=[(1, 2.0, {}), (2, 3.0, {})], damaged=[], torn=b'{"step": 1', resumed_at=1)
@example(lines=[(0, 2.0, {}), (2, 3.0, {})], damaged=[(1, b"null")], torn=b"", resumed_at=0)
def test_jsonl_goes_on_after_the_checkpoint(
    lines: list[tuple[int, float, dict[str, Any]]], damaged: list[tuple[int, bytes]], torn: bytes, resumed_at: int
) -> None:
    """A run that was killed leaves what came after its last checkpoint, and half a line, and a disk may do worse."""
    whole = [json.dumps({"step": step, "seconds": seconds, **rest}).encode() + b"\n" for step, seconds, rest in lines]
    kept = [line for line, (step, *_) in zip(whole, lines, strict=True) if resumed_at and step <= resumed_at]
    for place, line in damaged:
        whole.insert(place, line + b"\n")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "metrics.jsonl"
        file.write_bytes(b"".join(whole) + torn)
        tracker = jsonl(Path(name), resumed_at)
        assert file.read_bytes() == b"".join(kept)
        tracker.log({"a": 1.0}, resumed_at + 1)
        tracker.close()
        assert file.read_bytes().startswith(b"".join(kept))
        last = records(Path(name))[-1]
        before = json.loads(kept[-1])["seconds"] if kept else 0.0
        assert last["step"] == resumed_at + 1
        assert before - 0.001 <= last["seconds"] < before + 30, "the clock goes on"
        assert [path.name for path in Path(name).iterdir()] == ["metrics.jsonl"], "nothing is left beside it"


def test_jsonl_is_cut_back_at_one_stroke(tmp_path: Path) -> None:
    """The file is replaced, never half rewritten."""
    tracker = jsonl(tmp_path)
    tracker.log({}, 1)
    tracker.log({}, 2)
    tracker.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    os.link(tmp_path / "metrics.jsonl", tmp_path / "same")
    jsonl(tmp_path, resumed_at=1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() != before
    assert (tmp_path / "same").read_bytes() == before


def test_jsonl_that_cannot_be_cut_back_is_left_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = jsonl(tmp_path)
    for step in range(1, 5):
        tracker.log({}, step)
    tracker.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: exec("raise OSError('disk full')"))
    with pytest.raises(PluginFailedError, match="tracker 'saekit:jsonl' .* failed in build: OSError: disk full"):
        jsonl(tmp_path, resumed_at=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"metrics.jsonl": before}


# ---- wandb, without the package


def test_wandb_keeps_its_id_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_wandb(monkeypatch, starting_step=0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, resumed_at in [("a", None), ("b", None), ("a", 7), ("a", 9)]:
        WandbTracker(WandbConfig(), RunInfo(name, tmp_path / name, {}, resumed_at))
    first, other, *again = [options["id"] for options in fake.inits]
    assert again == [first, first]
    assert other != first
    assert all(options["resume"] == "allow" and options["reinit"] == "create_new" for options in fake.inits)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["wandb-run-id.txt"]
    (tmp_path / "a" / "wandb-run-id.txt").write_text("")  # as after a power cut
    WandbTracker(WandbConfig(), RunInfo("a", tmp_path / "a", {}, 9))
    assert fake.inits[-1]["id"] not in ("", first)


def test_wandb_is_not_sent_again_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would drop such steps, with a warning for each."""
    fake = fake_wandb(monkeypatch, starting_step=9)
    tracker = WandbTracker(WandbConfig(), RunInfo("a", tmp_path, {}, resumed_at=5))
    for step in range(6, 12):
        tracker.log({"loss": 1.0}, step)
    assert [step for _, step in fake.logged] == [9, 10, 11]


@pytest.mark.parametrize("n", [1, 512, 513, 1025, 5000])
def test_wandb_gets_no_more_bins_than_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    fake = fake_wandb(monkeypatch, starting_step=0)
    tracker = WandbTracker(WandbConfig(), RunInfo("a", tmp_path, {}))
    tracker.log({"h": Histogram(tuple(range(n)), tuple(float(i) for i in range(n + 1)))}, 1)
    counts, edges = fake.logged[0][0]["h"]
    assert min(n, 256) <= len(counts) <= 512
    assert len(edges) == len(counts) + 1
    assert (edges[0], edges[-1]) == (0.0, n)
    whole = [sum(range(int(first), int(last))) for first, last in pairwise(edges)]
    assert list(counts) == whole, "every value is between its edges"


# ---- wandb


def offline(folder: Path, name: str = "run", resumed_at: int | None = None, **options: Any) -> WandbTracker:
    (folder / name).mkdir(exist_ok=True)
    run = RunInfo(name, folder / name, {"sae": {"d_sae": 64}}, resumed_at)
    return WandbTracker(WandbConfig(mode="offline", **options), run)


@needs_wandb
def test_wandb_offline(tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"log_frequency": 2}) | {
        "trackers": ["jsonl", {"name": "wandb", "mode": "offline", "project": "p", "tags": ["t"]}]
    }
    result = saekit.train(config)
    (written,) = read_back(result.folder)
    logged = [row for row in written.history if "losses/mse_loss" in row]
    assert len(logged) == 5  # steps 1, 2, 4, 6, 8
    assert logged[-1]["losses/mse_loss"] == pytest.approx(result.metrics["losses/mse_loss"])
    assert "evals/ce_recovered" in written.history[-1]
    assert '"d_sae"' in written.config["sae"]
    assert (written.runs[0].project, list(written.runs[0].tags)) == ("p", ["t"])


@needs_wandb
def test_wandb_through_the_threads(tmp_path: Path) -> None:
    choice = {"name": "wandb", "mode": "offline", "log_checkpoints": True}
    config = saekit.load_config({"trackers": [choice]})
    trackers = start_trackers(config, saekit.default_manager(), tmp_path)
    for step in range(1, 21):
        trackers.log({"loss": 1 / step, "h": HISTOGRAM}, step)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    trackers.log_checkpoint(tmp_path / "sae", 20)
    trackers.close()
    (written,) = read_back(tmp_path)
    assert [(row["_step"], row["loss"]) for row in written.history] == [(n, 1 / n) for n in range(1, 21)]
    assert len(written.artifacts) == 1
    assert trackers.failed == {}


@needs_wandb
def test_wandb_shows_histograms(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker.log({"h": HISTOGRAM, "loss": 1.0}, 4)
    tracker.close()
    (written,) = read_back(tmp_path / "run")
    (row,) = written.history
    assert (row["h/_type"], row["h/values"], row["h/bins"]) == ("histogram", [1, 5, 2], [-1.0, 0.0, 0.5, 2.0])
    assert (row["loss"], row["_step"]) == (1.0, 4)


@needs_wandb
def test_wandb_makes_an_artifact_of_a_checkpoint(tmp_path: Path, wandb_data: Path) -> None:
    tracker = offline(tmp_path, name="a run: ä_b" + "x" * 150, log_checkpoints=True)
    folder = tmp_path / "sae"
    (folder / "deep").mkdir(parents=True)
    (folder / "sae_weights.safetensors").write_bytes(b"weights")
    (folder / "deep" / "cfg.json").write_text("{}")
    tracker.log_checkpoint(folder, 500)
    for file in (folder / "sae_weights.safetensors", folder / "deep" / "cfg.json"):
        file.unlink()  # as old checkpoints are
    tracker.close()
    (written,) = read_back(next(path for path in tmp_path.iterdir() if path.name.startswith("a run")))
    (artifact,) = written.artifacts
    run_id = written.runs[0].run_id
    assert artifact.name == "a-run---_b" + "x" * 90 + "-" + run_id
    assert artifact.type == "model"
    assert json.loads(artifact.metadata) == {"step": 500}
    assert sorted(artifact.aliases) == ["latest", "step-500"]
    assert artifact.finalize
    contents = {entry.path: entry for entry in artifact.manifest.contents}
    assert sorted(contents) == ["deep/cfg.json", "sae_weights.safetensors"]
    copy = Path(contents["sae_weights.safetensors"].local_path)
    assert copy.read_bytes() == b"weights", "the copy that will be sent"
    assert copy.is_relative_to(wandb_data)


@needs_wandb
def test_wandb_gets_no_checkpoint_unless_asked_for(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    tracker.log_checkpoint(tmp_path / "sae", 500)
    tracker.close()
    (written,) = read_back(tmp_path / "run")
    assert written.artifacts == []


QUIET = """
import pathlib, sys
from saekit_plugins.trackers.wandb import WandbConfig, WandbTracker
from saekit import RunInfo
folder = pathlib.Path(sys.argv[1])
(folder / "sae").mkdir()
(folder / "sae" / "cfg.json").write_text("{}")
tracker = WandbTracker(WandbConfig(mode="offline", log_checkpoints=True), RunInfo("a", folder, {}))
for step in range(3):
    tracker.log({"loss": 1.0}, step)
    tracker.log_checkpoint(folder / "sae", step)
tracker.close()
"""


@needs_wandb
def test_wandb_prints_nothing_in_a_subprocess(tmp_path: Path) -> None:
    """Nothing but the progress belongs on the screen during training; W&B decides once per process what it says."""
    loud = {name: value for name, value in os.environ.items() if name != "WANDB_SILENT"}
    command = [sys.executable, "-c", QUIET, str(tmp_path)]
    done = subprocess.run(command, env=loud, capture_output=True, text=True, check=True)
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if "`resume` will be ignored" not in line] == []  # old versions say so, once
    (written,) = read_back(tmp_path)
    assert len(written.artifacts) == 3


@needs_wandb
def test_wandb_several_runs_at_once(tmp_path: Path) -> None:
    one, two = offline(tmp_path, "one"), offline(tmp_path, "two")
    for step in range(1, 6):
        one.log({"loss": 1.0}, step)
        two.log({"loss": 2.0}, 10 * step)
    one.close()
    two.log({"loss": 2.0}, 60)
    two.close()
    (first,), (second,) = read_back(tmp_path / "one"), read_back(tmp_path / "two")
    assert [(row["_step"], row["loss"]) for row in first.history] == [(step, 1.0) for step in range(1, 6)]
    assert [(row["_step"], row["loss"]) for row in second.history] == [(10 * step, 2.0) for step in range(1, 7)]
    assert [first.runs[0].display_name, second.runs[0].display_name] == ["one", "two"]
    assert first.runs[0].run_id != second.runs[0].run_id


@needs_wandb
def test_wandb_goes_on_in_the_same_run(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    for step in range(1, 6):
        tracker.log({"loss": 1 / step}, step)
    tracker.close()
    time.sleep(1.1)  # W&B names its folders by the second
    tracker = offline(tmp_path, resumed_at=3)
    for step in range(4, 8):
        tracker.log({"loss": 1 / step}, step)
    tracker.close()
    first, second = read_back(tmp_path / "run")
    assert first.runs[0].run_id == second.runs[0].run_id == (tmp_path / "run/wandb-run-id.txt").read_text().strip()
    assert [(row["_step"], row["loss"]) for row in first.history] == [(n, 1 / n) for n in range(1, 6)]
    assert [(row["_step"], row["loss"]) for row in second.history] == [(n, 1 / n) for n in range(4, 8)]
    assert getattr(second.runs[0], "resume", True), "so that `wandb sync` appends it; old versions need --append"
