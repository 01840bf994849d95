"""States that somebody has changed and sealed again, and processes that go elsewhere: nothing is lost or misread."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crafted import falls_back, seal, setting
from support.runs import contents, fake_config, manager, resume, stopped, train
from support.trackers import Uploader

from saekit.runs.checkpoints import newest_checkpoint
from saekit.runs.state_files import read_state, write_state
from saekit.testing import fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")

LANE = "lanes/0/source"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{LANE}/buffer/waiting", -7), (f"{LANE}/buffer/waiting", 2.5), (f"{LANE}/buffer/waiting", 10**6),
        (f"{LANE}/buffer/origins", torch.zeros(2, dtype=torch.long)), (f"{LANE}/contexts/at_once", "x"),
        (f"{LANE}/contexts/contexts/offset", "x"), (f"{LANE}/contexts/contexts/offset", None),
        (f"{LANE}/contexts/contexts/reader/next", -7), (f"{LANE}/contexts/contexts/epoch", "x"),
        (f"{LANE}/contexts/contexts/contexts_served", "x"), (f"{LANE}/contexts/contexts/ready", [[[1], [2]]]),
        (f"{LANE}/contexts/contexts/packer/tokens", ["x"]), ("latest/sae/metrics\\l0", "x"),
        ("trackers", {"sae": {"saekit:jsonl": [{"step": 1, "metrics": {"a": "x"}}]}}),
        ("trackers", {"sae": {"saekit:jsonl": [{"step": 1, "metrics": {"a": {"counts": ["x"], "edges": [0, 1]}}}]}}),
        ("lanes/0/untold", {"sae": {"losses/overall_loss": "x"}}),
    ],
)  # fmt: skip
def test_values_of_another_kind(tmp_path: Path, made: Path, path: str, value: Any) -> None:
    def change(checkpoint: Path) -> None:
        state = read_state(checkpoint, "stream")
        if path.startswith("latest"):
            state["latest"]["sae"]["metrics/l0"] = value
        else:
            setting(path, value)(state)
        for suffix in ("json", "safetensors"):
            (checkpoint / f"stream.{suffix}").unlink()
        write_state(checkpoint, "stream", state)
        seal(checkpoint)

    falls_back(tmp_path, made, change)


# ---- a process that goes elsewhere


@pytest.mark.parametrize("name", ["run", None])
def test_the_working_directory_may_change(tmp_path: Path, name: str | None) -> None:
    """The run is one, where it was begun, and so it is when it goes on."""

    def plugins(leave: bool) -> Any:
        def build(config: object, *, run: object) -> Any:
            def measure(sae: object, **services: object) -> dict[str, float]:
                if leave:
                    os.chdir(tmp_path / "elsewhere")
                return {}

            return measure

        told = Uploader()
        return told, manager(
            None, fake_plugin("evals", "nosy", build), fake_plugin("trackers", "mine", lambda config, run: told)
        )

    (tmp_path / "elsewhere").mkdir()
    found = []
    for leave in (True, False):
        folder = tmp_path / f"leave {leave}"
        folder.mkdir()
        checkpoints = {"n_checkpoints": 5, "keep_last": 2} | ({} if name is None else {"name": name})
        config = fake_config(Path("runs"), checkpoints=checkpoints, evals={"run": ["nosy"], "every_n_steps": 4})
        del config["checkpoints"]["name"]
        config["checkpoints"] |= checkpoints
        told, own = plugins(leave)
        with contextlib.chdir(folder):
            result = train(config | {"trackers": ["mine"]}, plugins=own)
            assert result.folder.is_absolute() == leave
        (run,) = (folder / "runs").iterdir()
        assert all(Path(place).is_absolute() for place, _ in told.calls if isinstance(place, Path))
        found.append(contents(run))
    assert found[0] == found[1]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_that_goes_on_may_leave_too(tmp_path: Path) -> None:
    def build(config: object, *, run: object) -> Any:
        def measure(sae: object, **services: object) -> dict[str, float]:
            os.chdir(tmp_path / "elsewhere")
            return {}

        return measure

    (tmp_path / "elsewhere").mkdir()
    own = manager(None, fake_plugin("evals", "nosy", build))
    with contextlib.chdir(tmp_path):
        stopped(fake_config(Path("runs"), evals={"run": ["nosy"], "every_n_steps": 6}), 3, plugins=own)
        resume(Path("runs/run"), plugins=own)
    assert newest_checkpoint(tmp_path / "runs/run").facts["finished"]
    assert not list((tmp_path / "elsewhere").iterdir())
