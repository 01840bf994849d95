"""What W&B's environment variables say, where the tracker's options say nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from saekit_plugins.trackers.wandb import WandbConfig, WandbTracker
from support.wandb_runs import fake_wandb, needs_wandb, read_back

import saekit
from saekit.values import RunInfo

GIVEN = {"project": "p", "entity": "e", "mode": "offline", "tags": ("t",)}
SET = {
    "WANDB_PROJECT": "its project", "WANDB_ENTITY": "its team", "WANDB_MODE": "disabled", "WANDB_TAGS": "one, two,,",
    "WANDB_NAME": "its name", "WANDB_DIR": "/its/folder",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)


def init(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    fake = fake_wandb(monkeypatch, starting_step=0)
    config = saekit.load_config({"trackers": [{"name": "wandb", **options}]}).trackers[0]
    config = config.options
    WandbTracker(config, RunInfo("run", folder, {}))
    found: dict[str, Any] = fake.inits[0]
    return found


def test_neither_says_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = init(tmp_path, monkeypatch)
    assert {key: found[key] for key in ("project", "entity", "mode", "tags", "name", "dir")} == {
        "project": "saekit", "entity": None, "mode": "online", "tags": [], "name": "run", "dir": str(tmp_path),
    }  # fmt: skip
    assert found["settings"] == {"silent": True} or os.environ.get("WANDB_SILENT")


def test_the_environment_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    found = init(tmp_path, monkeypatch)
    assert {key: found[key] for key in ("project", "entity", "mode", "tags", "name", "dir")} == {
        "project": "its project", "entity": "its team", "mode": "disabled", "tags": ["one", "two"],
        "name": "its name", "dir": "/its/folder",
    }  # fmt: skip


def test_options_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    found = init(tmp_path, monkeypatch, **GIVEN | {"tags": ["t"]})
    assert {key: found[key] for key in GIVEN} == GIVEN | {"tags": ["t"]}
    assert init(tmp_path / "..", monkeypatch, tags=[])["tags"] == [], "said to be none"


def test_a_variable_that_is_empty_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.setenv(name, " ")
    assert init(tmp_path, monkeypatch)["project"] == "saekit"
    assert init(tmp_path, monkeypatch)["mode"] == "online"


@pytest.mark.parametrize("text", ["../../x", "{", "a b", "x" * 200, "äö"])
def test_an_id_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "wandb-run-id.txt").write_text(text)
    with pytest.raises(ValueError, match=r"wandb-run-id.txt holds no id of a W&B run; remove it to begin a new one"):
        init(tmp_path, monkeypatch)
    assert (tmp_path / "wandb-run-id.txt").read_text() == text


@pytest.mark.parametrize("option", [{"project": " "}, {"mode": "dryrun"}])
def test_options_that_are_none(option: dict[str, str]) -> None:
    with pytest.raises(saekit.ConfigError):
        saekit.load_config({"trackers": [{"name": "wandb", **option}]})


def test_options_come_back() -> None:
    for options in ({}, {"project": "p"}, {"tags": []}, {"tags": ["a"]}, {"mode": "offline"}):
        config = saekit.load_config({"trackers": [{"name": "wandb", **options}]})
        assert saekit.load_config(saekit.load_config(config)) == config
        import tomllib

        assert saekit.load_config(tomllib.loads(saekit.dump_config(config))) == config


@needs_wandb
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_PROJECT", "from-outside")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    tracker = WandbTracker(WandbConfig(log_checkpoints=True), RunInfo("run", tmp_path, {}))
    tracker.log({"loss": 1.0}, 3)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae/cfg.json").write_text("{}")
    tracker.log_checkpoint(tmp_path / "sae", 3)
    tracker.close()
    if mode == "disabled":
        assert not list(tmp_path.glob("wandb/*-run-*"))
        return
    (written,) = read_back(tmp_path)
    assert (written.runs[0].project, list(written.runs[0].tags)) == ("from-outside", ["a", "b"])
    assert [row["loss"] for row in written.history] == [1.0]
