"""What a run folder says of its run: at work, at its end, killed, broken, of one SAE or of many."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
from support.written import records, write_home, write_record, write_run, write_sweep

from saekit.errors import ConfigError, PlaceError
from saekit.files.storage import is_locked, locked
from saekit.reports.folder import read_run
from saekit.runs.checks import alone_in
from saekit.runs.record import RunRecord
from saekit.values import RunEnd


def aged(folder: Path, seconds: float) -> Path:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (time.time() - seconds,) * 2)
    return folder


@pytest.mark.parametrize("end", ["finished", "interrupted", "diverged", "failed"])
def test_how_it_ended(tmp_path: Path, end: str) -> None:
    run = read_run(write_run(tmp_path / "run", end=end, reason="" if end == "finished" else "for a reason"))
    assert run.state.kind == end
    assert run.state.text == (end if end == "finished" else f"{end}: for a reason")
    assert not run.sweep
    assert not run.problems
    assert (run.alone.what, run.alone.where) == (
        "standard, 1,024 features", "blocks.1.hook_resid_post of saekit/tiny-python"
    )  # fmt: skip
    assert (run.alone.tokens, run.alone.history.step, run.alone.d_sae) == (100_000, 100, 1024)


def test_one_that_is_at_work(tmp_path: Path) -> None:
    folder = aged(write_run(tmp_path / "run", records(40, of=100, evals=-1), end=None, sae=False), 4000)
    with locked(folder):
        run = read_run(folder)
        assert (run.state.kind, run.state.at_work) == ("running", True)
        assert run.state.age > 3900
        write_record(folder, {"sae": "."}, "interrupted")
        assert read_run(folder).state.text == "interrupted (a process is at work in the folder)"


def test_one_that_was_killed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(40, of=100, evals=-1), end=None, sae=False)
    state = read_run(folder).state
    assert state.kind == "running", "it may be another machine that writes"
    assert state.text.endswith("s ago, and no process of this machine is in the folder")
    state = read_run(aged(folder, 7200)).state
    assert state.text == (
        "stopped: it has written 2 h 00 min ago, and no process of this machine is in the folder"
    )  # fmt: skip


def test_to_look_locks_nobody_out(tmp_path: Path) -> None:
    """Who looks holds the lock for an instant, which who wants it waits for."""
    import fcntl

    assert is_locked(tmp_path) is False
    assert is_locked(tmp_path / "nothing") is None
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    looks = [0]

    def sleep(_: float) -> None:
        looks[0] += 1
        fcntl.flock(handle, fcntl.LOCK_UN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        with alone_in(tmp_path):
            assert is_locked(tmp_path) is True
    assert looks == [1]
    with locked(tmp_path), pytest.raises(ConfigError, match="another process is still training"), alone_in(tmp_path):
        pass
    os.close(handle)


def test_the_record_says_how_a_run_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end=None)
    assert RunRecord.read(folder).end is None
    RunRecord.note_end(folder, RunEnd("diverged", "why"), {"sae": "why"})
    record = RunRecord.read(folder)
    assert (record.end, record.diverged) == (RunEnd("diverged", "why"), {"sae": "why"})
    RunRecord.note_checkpoint(folder)
    assert RunRecord.read(folder).end == RunEnd("diverged", "why")
    record.write({}, None)  # type: ignore[arg-type]  # of a run that goes on
    assert RunRecord.read(folder).end is None
    for strange in ({"status": "fine"}, 3, {"reason": "x"}, {"status": ["finished"]}):
        table = json.loads((folder / "run.json").read_text()) | {"end": strange}
        (folder / "run.json").write_text(json.dumps(table))
        assert RunRecord.read(folder).end is None, "which is no reason not to go on"


def test_a_sweep_and_one_sae_of_it(tmp_path: Path) -> None:
    points = {"0_a": {"sae": {"l1_coefficient": 1.0}}, "1_b": {"sae": {"l1_coefficient": 9.0}}}
    folder = write_sweep(tmp_path / "sweep", points, diverged={"1_b": "the loss is nan"})
    run = read_run(folder)
    assert run.sweep
    assert [sae.why_diverged for sae in run.saes.values()] == [None, "the loss is nan"]
    one = read_run(folder / "0_a")
    assert (one.sweep, one.alone.name, one.state.kind) == (False, "0_a", "finished")
    assert read_run(folder / "1_b").state.text == "diverged: the loss is nan"
    with contextlib.chdir(folder / "0_a"):
        assert read_run(Path()).alone.name == "0_a"
    alone = tmp_path / "copied"
    write_home(alone, records(5), {})
    assert read_run(alone).state.kind == "finished"


def test_what_is_broken_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end=None)
    (folder / "config.toml").write_text("[sae\n")
    (folder / "sae/cfg.json").write_text("{")
    run = read_run(folder)
    assert run.problems[0].startswith(f"{folder}/config.toml cannot be read: ")
    assert run.alone.what == "an SAE"
    assert (run.alone.d_sae, run.alone.tokens) == (None, 100_000)
    (folder / "config.toml").unlink()
    assert read_run(folder).problems == (f"{folder}/config.toml is not there",)
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).alone.history.records == 0
    (folder / "run.json").write_text("{")
    with pytest.raises(PlaceError, match=r"run.json cannot be read"):
        read_run(folder)
    with pytest.raises(PlaceError, match="there is no folder"):
        read_run(tmp_path / "nothing")
    (folder / "run.json").write_text(json.dumps({"format": 1, "saes": {"x": "../../elsewhere"}, "in_memory": []}))
    with pytest.raises(PlaceError, match="is a path, not the name of one folder"):
        read_run(folder)


def test_metrics_under_another_name(tmp_path: Path) -> None:
    options = {"trackers": ["saekit:wandb", {"name": "saekit:jsonl", "file": "lines.jsonl"}]}
    folder = write_run(tmp_path / "run", options=options)
    (folder / "metrics.jsonl").rename(folder / "lines.jsonl")
    assert read_run(folder).alone.history.step == 100
    options = {"trackers": [{"name": "saekit:jsonl", "file": "../../out.jsonl"}]}
    assert read_run(write_run(tmp_path / "other", options=options)).alone.metrics == tmp_path / "other/metrics.jsonl"


def test_a_folder_of_a_model_is_told_by_its_name(tmp_path: Path) -> None:
    for name, shown in (
        ("gpt2-small", "gpt2-small"), ("google/gemma-2-2b", "google/gemma-2-2b"), ("/data/models/mine/", "mine"),
        ("./here", "here"), ("", ""),
    ):  # fmt: skip
        run = read_run(write_run(tmp_path / "run", options={"model": {"name": name}}))
        assert run.alone.where == "blocks.1.hook_resid_post" + (f" of {shown}" if shown else "")


def test_what_came_from_memory_is_told_as_it_is(tmp_path: Path) -> None:
    """A configuration names a model and a text then, too, which are not those of the run."""
    folder = write_run(tmp_path / "run")
    assert read_run(folder).alone.text == "saekit/python-stdlib"
    table = json.loads((folder / "run.json").read_text()) | {"in_memory": ["model", "dataset"], "model": "my-own"}
    (folder / "run.json").write_text(json.dumps(table))
    sae = read_run(folder).alone
    assert (sae.where, sae.text) == ("blocks.1.hook_resid_post of my-own", "a dataset from memory")
    RunRecord.note_end(folder, RunEnd("finished"), {})
    assert RunRecord.read(folder).model == "my-own"
    (folder / "run.json").write_text(json.dumps(table | {"in_memory": [], "model": ""}))
    sae = read_run(folder).alone
    assert (sae.where, sae.text) == ("blocks.1.hook_resid_post", ""), "there is no model"
