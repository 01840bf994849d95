"""Pictures in run folders: drawn when a run ends, whole or not at all, and never a reason to lose a run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.runs import contents, fake_config, manager, poison, resume, stopped, train, without
from support.written import records, write_run, write_sweep

import saekit
from saekit.errors import ConfigError, DivergedError, PlaceError
from saekit.files.names import half_written
from saekit.reports import draw_pictures, figures, pictures
from saekit.runs.record import RunRecord

pytestmark = pytest.mark.usefixtures("one_thread")
ON = {"pictures": True}
PNG, HTML = b"\x89PNG\r\n\x1a\n", b"<!doctype html>"


def whole(folder: Path, stem: str = "curves") -> bool:
    png, page = folder / f"{stem}.png", folder / f"{stem}.html"
    return png.read_bytes().startswith(PNG) and page.read_bytes().startswith(HTML)


def test_every_run_leaves_pictures(tmp_path: Path) -> None:
    result = train(fake_config(tmp_path, reports=ON))
    assert result.pictures == (tmp_path / "run/curves.png", tmp_path / "run/curves.html")
    assert whole(tmp_path / "run")
    assert RunRecord.read(tmp_path / "run").end is not None


def test_an_option_turns_them_off(tmp_path: Path) -> None:
    result = train(fake_config(tmp_path, reports={"pictures": False}))
    assert result.pictures == ()
    assert not list(tmp_path.glob("run/curves*"))
    assert saekit.load_config({}).reports.pictures, "they are drawn by default"


def test_runs_that_end_early_have_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(fake_config(tmp_path / "a", reports=ON), 6)
    assert whole(tmp_path / "a/run")
    assert "interrupted" in (tmp_path / "a/run/curves.html").read_text()
    before = (tmp_path / "a/run/curves.html").read_bytes()
    resume(tmp_path / "a/run")
    assert whole(tmp_path / "a/run")
    assert (tmp_path / "a/run/curves.html").read_bytes() != before
    assert "interrupted" not in (tmp_path / "a/run/curves.html").read_text()
    poison(monkeypatch, "sae", 6)
    with pytest.raises(DivergedError):
        train(fake_config(tmp_path / "b", reports=ON))
    assert whole(tmp_path / "b/run")
    assert "diverged: the loss" in (tmp_path / "b/run/curves.html").read_text()


def test_a_sweep_and_its_saes_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "lr=0.5", 5)
    config = fake_config(tmp_path, reports=ON)
    configs = saekit.grid(config, {"training.lr": [0.001, 0.01, 0.5]}, plugins=manager())
    with pytest.warns(RuntimeWarning, match="is stopped"):
        result = train(configs)
    assert result.pictures == (tmp_path / "run/summary.png", tmp_path / "run/summary.html")
    assert whole(tmp_path / "run", "summary")
    for one in result.results.values():
        assert one.pictures == (one.folder / "curves.png", one.folder / "curves.html")
    assert all(whole(path.parent) for path in (tmp_path / "run").glob("*/config.toml")), "also of the one that diverged"
    assert len(list((tmp_path / "run").glob("*/config.toml"))) == 3
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["end"]["status"] == "finished"
    assert list(record["end"]["diverged"]) == ["2_lr=0.5"]


def test_pictures_are_no_part_of_a_run(tmp_path: Path) -> None:
    """With them or without, the same bytes; and they may be turned on and off from one part of a run to the next."""
    train(fake_config(tmp_path / "on", reports=ON))
    stopped(fake_config(tmp_path / "off", reports={"pictures": False}), 6)
    resume(tmp_path / "off/run", overrides=["reports.pictures=true"])
    assert whole(tmp_path / "off/run")
    left_out = ("run/curves", "run/config.toml", "run/checkpoints")
    assert without(contents(tmp_path / "on"), *left_out) == without(contents(tmp_path / "off"), *left_out)
    stopped(fake_config(tmp_path / "more", reports=ON), 6)
    with pytest.raises(ConfigError, match=r"allowed to change, but the same as before: reports\.nonsense"):
        resume(tmp_path / "more/run", overrides=["reports.pictures=false"], allow=["reports", "reports.nonsense"])
    resume(tmp_path / "more/run", overrides=["reports.pictures=false"], allow=["reports.pictures"])


def test_a_run_of_an_older_saekit_goes_on(tmp_path: Path) -> None:
    """Neither its record nor its checkpoint says anything of reports or of an end."""
    stopped(fake_config(tmp_path), 6)
    run = tmp_path / "run"
    config = (run / "config.toml").read_text()
    head, _, rest = config.partition("[reports]\n")
    (run / "config.toml").write_text(head + rest.partition("\n\n")[2])
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "end"}))
    for path in run.glob("checkpoints/*/checkpoint.json"):
        from saekit.runs.checkpoints import _manifest_text

        facts = json.loads(path.read_text())
        for about in facts["saes"].values():
            del about["config"]["reports"]
        path.write_text(_manifest_text(facts))
    result = resume(run)
    assert whole(run), "which are drawn by default"
    assert len(result.pictures) == 2


def test_saes_of_one_sweep_agree(tmp_path: Path) -> None:
    configs = saekit.grid(fake_config(tmp_path), {"reports.pictures": [True, False]}, plugins=manager())
    with pytest.raises(saekit.ConfigError, match=r"reports.pictures: differs between SAEs"):
        train(configs)


# ---- what goes wrong


def test_a_picture_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(figure: object) -> bytes:
        raise ZeroDivisionError("no axes")

    monkeypatch.setattr(figures, "as_png", broken)
    with pytest.warns(RuntimeWarning) as caught:
        result = train(fake_config(tmp_path, reports=ON))
    (told,) = [str(one.message) for one in caught if "worse than the mean" not in str(one.message)]
    assert told == (
        "a picture of the run was not drawn: curves.png: ZeroDivisionError: no axes. Nothing else is missing; "
        "`saekit show --draw` tries again, and reports.pictures=false leaves them out"
    )
    assert result.pictures == (tmp_path / "run/curves.html",), "the other one is there"
    assert saekit.SAE.load(tmp_path / "run").d_sae == result.sae.d_sae
    with pytest.raises(saekit.ConfigError, match="is finished"):
        resume(tmp_path / "run")


def test_a_run_whose_record_cannot_be_read_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: object) -> object:
        raise RuntimeError("gone")

    monkeypatch.setattr(pictures, "read_run", broken)
    with pytest.warns(RuntimeWarning, match="RuntimeError: gone"):
        result = train(fake_config(tmp_path, reports=ON))
    assert result.pictures == ()


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
    draw_pictures(folder)
    before = {path: path.read_bytes() for path in folder.glob("curves.*")}
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:5000])

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    drawn = draw_pictures(folder)
    assert drawn.all == ()
    assert drawn.problems == tuple(
        f"cannot write {folder / name}: No space left on device" for name in ("curves.png", "curves.html")
    )
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.glob("curves.*")} == before
    assert not [path for path in folder.iterdir() if half_written(path.name)]


KILLED = """
import os, signal, sys
from pathlib import Path
from saekit.reports import draw_pictures
where, folder = sys.argv[1:]
work = {"write": "write_bytes", "rename": "replace"}[where]
real = getattr(Path, work)

def killed(path, *arguments):
    if "curves.png" in path.name:
        if where == "write":
            real(path, arguments[0][:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *arguments)

setattr(Path, work, killed)
draw_pictures(folder)
"""


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_kill_in_the_middle_of_a_picture(tmp_path: Path, where: str) -> None:
    stopped(fake_config(tmp_path), 6)
    run = tmp_path / "run"
    (run / "curves.png").write_bytes(b"the one before")
    before = contents(tmp_path)
    found = warm.python("-c", KILLED, where, run)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert (run / "curves.png").read_bytes() == b"the one before"
    (left,) = [path for path in run.iterdir() if half_written(path.name)]
    assert half_written(left.name) == ("curves.png", "tmp")
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before, "nothing else was touched"
    result = resume(run, overrides=["reports.pictures=true"])
    assert not left.exists(), "which is tidied up"
    assert whole(run)
    assert len(result.pictures) == 2


def test_ctrl_c_while_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(figure: object) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("unreachable")

    monkeypatch.setattr(figures, "as_png", pressed)
    with pytest.raises(KeyboardInterrupt, match="the run in .*run is finished; its pictures were not drawn"):
        train(fake_config(tmp_path, reports=ON))
    assert saekit.SAE.load(tmp_path / "run").d_sae > 0
    with pytest.raises(saekit.ConfigError, match="is finished"):
        resume(tmp_path / "run")
    error = stopped(fake_config(tmp_path / "b", reports=ON), 6)  # and a second one, while it saves
    assert error.checkpoint is not None
    resume(tmp_path / "b/run", overrides=["reports.pictures=false"])


def test_a_folder_that_was_replaced_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose folder has become another one writes neither its end nor a picture into that."""
    from saekit.training.trainer import SAETrainer

    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        if trainer.step == 5:
            (tmp_path / "run").rename(tmp_path / "moved")
            write_run(tmp_path / "run", end=None)
        return work(trainer, *rest)

    monkeypatch.setattr(SAETrainer, "train_on", train_on)
    with pytest.raises(saekit.SaekitError, match="was removed, renamed or replaced"):
        train(fake_config(tmp_path, reports=ON))
    assert RunRecord.read(tmp_path / "run").end is None
    assert not list((tmp_path / "run").glob("curves*"))
    end = RunRecord.read(tmp_path / "run-rescued-1").end
    assert end is not None
    assert (end.status, end.reason) == ("failed", f"its folder {tmp_path / 'run'} was lost")


def test_drawing_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match="there is no folder"):
        draw_pictures(tmp_path / "nothing")
    assert draw_pictures(write_run(tmp_path / "empty", [])).all == (), "there is nothing to show"
    drawn = draw_pictures(write_run(tmp_path / "run", records(3), end=None))
    assert [path.name for path in drawn.all] == ["curves.png", "curves.html"]
    swept = draw_pictures(write_sweep(tmp_path / "sweep", {"a": {}, "b": {"training": {"lr": 0.5}}}))
    assert [path.name for path in swept.all[:2]] == ["summary.png", "summary.html"]
    assert list(swept.of_saes) == ["a", "b"]
