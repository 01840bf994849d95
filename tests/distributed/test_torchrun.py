"""The command line under torchrun itself: stopped, and gone on with by as many processes, or by one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import cli
from support.crafted import seal

import saekit
from saekit.runs.checkpoints import all_checkpoints, newest_checkpoint

TRAIN = [sys.executable, "-m", "saekit.cli", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
STEPS, ROWS = 300, 64


def config(folder: Path) -> dict[str, Any]:
    source = {"name": "toy", "n_features": 9, "n_hidden": 8, "directions": "random"}
    return {
        "model": {"backend": "none"}, "site": {"hook_name": "hidden"}, "evals": {"run": [], "held_out_every": 0},
        "activations": {"source": source}, "sae": {"name": "topk", "k": 3, "d_sae": 12, "dtype": "float64"},
        "training": {
            "training_tokens": STEPS * ROWS, "train_batch_size_tokens": ROWS, "device": "cpu", "verbose": False,
        },
        "checkpoints": {"folder": str(folder), "name": "run", "keep_last": 2, "n_checkpoints": 9},
        "reports": {"pictures": False},
    }  # fmt: skip


def under_torchrun(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*TORCHRUN, *TRAIN, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_goes_on_under_torchrun_or_without(tmp_path: Path) -> None:
    place = tmp_path / "run.json"
    place.write_text(json.dumps(config(tmp_path)))
    run, again = tmp_path / "run", tmp_path / "again"
    begun = under_torchrun(place)
    deadline = time.monotonic() + 240
    while len(list(all_checkpoints(run))) < 2 and begun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.terminate()
    said = begun.communicate(timeout=120)[1]
    newest, before = list(all_checkpoints(run))
    assert newest_checkpoint(run).mesh == (2, 1), said
    assert int(newest.name.removeprefix("step-")) < STEPS

    shutil.copytree(run, again)  # there, one process cannot use its part: all go on from the checkpoint before
    part = again / "checkpoints" / newest.name / "stream-1.json"
    state = json.loads(part.read_text())
    state["lanes"][0]["source"]["generator"] = None
    part.write_text(json.dumps(state))
    seal(part.parent)
    resumed = under_torchrun("--resume", again)
    told = resumed.communicate(timeout=240)[1]
    assert resumed.returncode == 0, told
    assert f"a newer checkpoint is not used: of process 1: {part.parent} does not fit the run as it is now" in told
    assert f"Going on from {before.name} instead" in told

    refused = cli("train", "--resume", run, check=2).stderr
    assert "distributed.data: was 2 when the run was saved, and is 1 now; 2 processes wrote the checkpoint" in refused
    assert "--allow distributed.data" in refused
    cli("train", "--resume", run, "--allow", "distributed.data")
    saekit.train(config(tmp_path / "whole"))
    whole = saekit.SAE.load(tmp_path / "whole/run/sae")
    for folder in (run, again):
        sae = saekit.SAE.load(folder / "sae")
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(sae.state_dict()[name], value, rtol=0, atol=1e-10)
        assert newest_checkpoint(folder).facts["batches"] == STEPS
