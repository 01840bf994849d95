"""A run that is killed again and again, at any moment at all, ends as one that nobody touched.

``SAEKIT_RESUME_TRIALS=200 pytest tests/runs/test_resume_killed.py -s`` kills far more often.  Run as a program, this
file is the process that runs are forked from, itself a fork of one that has imported what takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import caches, warm
from support.runs import EVERYTHING, HOOKS, SOURCES, contents, fake_config, manager, resume, train
from support.tiny import run_config

import saekit

TRIALS = int(os.environ.get("SAEKIT_RESUME_TRIALS", "24"))
SERVER = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}

# Many checkpoints: at every step, by the clock, or every few, so that more is done again.
ALWAYS = {"n_checkpoints": 2, "every_minutes": 1e-9}
SELDOM = {"n_checkpoints": 3, "every_minutes": 0.0}


def setup(name: str, cache: str) -> Any:
    """The configuration of a kind of run, or a list of them, in the folder that is the current one."""
    source, checkpoints = {
        "live, ahead, always": (SOURCES["live, ahead"], ALWAYS),
        "live, always": (SOURCES["live"], ALWAYS),
        "live, ahead, seldom": (SOURCES["live, ahead"], SELDOM),
        "cached, always": (SOURCES["cached, ahead"], ALWAYS),
        "cached, seldom": (SOURCES["cached"], SELDOM),
        "unnamed, always": (SOURCES["live, ahead"], ALWAYS),
        "recipe, always": (SOURCES["live, ahead"], ALWAYS | {"buffer": "recipe"}),
        "recipe sweep, seldom": (SOURCES["live, ahead"], SELDOM | {"buffer": "recipe"}),
        "sweep, always": (SOURCES["live, ahead"], ALWAYS),
        "sweep, seldom": (SOURCES["live, ahead"], SELDOM),
        "warm-up sweep": (SOURCES["live"], SELDOM),
    }[name]
    if name.startswith("cached"):
        source = source | {"folder": cache}
    config = fake_config(Path("runs"), source, checkpoints={"name": "run"} | checkpoints)
    if name.startswith("unnamed"):
        del config["checkpoints"]["name"]
    if "sweep" not in name:
        return config
    # One of each seed and site beside one that shares its text, and one that shares its site.
    return saekit.grid(config, {"training.seed": [1, 2], "site.hook_name": HOOKS}, plugins=manager())[:3]


def run_in(folder: Path) -> Path:
    """The run folder, whatever its name."""
    return next((found for found in (folder / "runs").glob("[!.]*") if found.is_dir()), folder / "runs/run")


# ---- the process that is forked


def serve() -> None:
    """For each line of the pipe, a run in a child that is killed in time; its end is a line of the output."""
    pipe, said = sys.argv[1:]
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)  # others would not be in the forks
    warnings.filterwarnings("ignore", message=".*wrong site, scale or model")  # after these few steps
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # whatever is loaded late is loaded now
        train(setup("warm-up sweep", ""))
    assert threading.active_count() == 1
    for line in Path(pipe).open(encoding="utf-8"):  # noqa: SIM115
        order = json.loads(line)
        child = os.fork()
        if not child:
            run(order)
        code = wait(child, order["kill_after"])
        sys.stdout.write(json.dumps({"killed": code == -signal.SIGKILL, "code": code}) + "\n")
        sys.stdout.flush()


def wait(child: int, kill_after: float | None) -> int:
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(order: dict[str, Any]) -> None:
    """Train or resume, in a child; never returns."""
    code = 1
    try:
        os.chdir(order["folder"])
        left = order["kill_at"] or 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            touched = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
            if left and touched and "runs" in str(arguments[0]):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        if left:
            sys.addaudithook(count)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the run in runs/.* was stopped before its first checkpoint")
        warnings.filterwarnings("ignore", message=".*wrong site, scale or model")  # after these few steps
        if order["resume"]:
            resume(run_in(Path()))
        else:
            train(setup(order["setup"], order["cache"]))
        code = 0
        Path("operations.txt").write_text(str(NEVER - left))
    except BaseException as error:
        if isinstance(error, saekit.ConfigError) and "is finished. To train it longer, raise" in str(error):
            Path("finished").touch()
            os._exit(0)
        Path("failure.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


# ---- the tests


class Server:
    """The process, and what is asked of it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        places = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._cache, self._said = str(cache), folder / "said.txt"
        os.mkfifo(folder / "orders")
        environment = os.environ | SERVER | {"PYTHONPATH": places}
        self._process = warm.Popen("-W", "error", __file__, folder / "orders", self._said, env=environment)
        # Not only for writing: that would wait for a reader for ever where it fails before it is one.
        self._orders = os.fdopen(os.open(folder / "orders", os.O_RDWR), "w", encoding="utf-8")

    def __call__(
        self, folder: Path, setup: str, *, resume: bool, kill_after: float | None = None, kill_at: int | None = None
    ) -> bool:
        """Whether the run was killed; that it failed in any other way is an error."""
        order = {"folder": str(folder), "setup": setup, "resume": resume, "kill_after": kill_after, "kill_at": kill_at}
        self._orders.write(json.dumps(order | {"cache": self._cache}) + "\n")
        self._orders.flush()
        line = self._process.stdout.readline()
        assert line, self._said.read_text()
        answer = json.loads(line)
        failure = folder / "failure.txt"
        assert answer["killed"] or not answer["code"], failure.read_text() if failure.exists() else answer
        return bool(answer["killed"])

    def close(self) -> None:
        self._orders.close()
        self._process.communicate(timeout=60)
        assert not self._process.returncode, self._said.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("cache")
    run = caches.config(folder)
    caches.cache(run, sites=[{"hook_name": HOOKS[1]}])
    running = Server(folder, folder / "cache")
    yield running
    running.close()


SETUPS = [
    "live, ahead, always",
    "live, always",
    "live, ahead, seldom",
    "cached, always",
    "cached, seldom",
    "unnamed, always",
    "recipe, always",
    "recipe sweep, seldom",
    "sweep, always",
    "sweep, seldom",
]
NEVER = 10**9  # operations on files


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 for none."""
    return max([0, *(int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/checkpoint.json"))])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path, server: Server, name: str) -> None:
    chance = random.Random(f"{name} {TRIALS}")
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    assert not server(tmp_path / "whole", name, resume=False, kill_at=NEVER)
    took, touched = time.monotonic() - started, int((tmp_path / "whole/operations.txt").read_text())
    wanted = contents(run_in(tmp_path / "whole"))
    assert not [path for path in wanted if "/." in f"/{path}"]
    kills, trials, steps = 0, 0, list[int]()
    while kills < max(TRIALS // len(SETUPS), 1):
        folder = tmp_path / str(trials)
        folder.mkdir()
        trials += 1
        resume = False
        for attempt in range(4):
            killed = False
            if attempt < 3 and (attempt == 0 or chance.random() < 0.6):
                how: dict[str, Any] = (
                    {"kill_after": chance.random() * took}
                    if chance.random() < 0.5
                    else {"kill_at": chance.randint(1, touched)}
                )
            else:
                how = {}
            killed = server(folder, name, resume=resume, **how)
            if not killed:
                break
            kills += 1
            steps.append(newest(run_in(folder)))
            resume = (run_in(folder) / "run.json").exists()
            if not resume:  # killed before there was anything: the name is free once the folder is removed
                shutil.rmtree(folder / "runs", ignore_errors=True)
        found = contents(run_in(folder))
        if (folder / "finished").exists():  # it was killed after the very last file, when old ones were being removed
            found = {
                path: summed for path, summed in found.items() if path in wanted or not path.startswith("checkpoints/")
            }
            record, whole = (json.loads((run_in(one) / "run.json").read_text()) for one in (folder, tmp_path / "whole"))
            if "end" not in record:  # nor had it said yet that it was finished
                assert record == {key: value for key, value in whole.items() if key != "end"}
                found["run.json"] = wanted["run.json"]
        assert found == wanted, f"trial {trials}, killed with checkpoints at {steps}"
        shutil.rmtree(folder)
    print(f"\n{name}: {trials} runs killed {kills} times, all identical; the newest checkpoints then: {sorted(steps)}")


@pytest.mark.slow
def test_the_command_that_is_killed_and_resumed(tmp_path: Path) -> None:
    """As a user runs it: the embedded model, its text, every step saved; killed twice.

    The second time it is a process with a seed of hashes of its own, so that each begins with another than the one
    before.
    """
    sections = EVERYTHING | {
        "checkpoints": {"name": "run"} | ALWAYS,
        "training": EVERYTHING["training"] | {"training_tokens": 3000},
    }
    text = saekit.dump_config(saekit.load_config(run_config(Path("runs"), **sections)))
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.toml").write_text(text)

    def start(folder: str, *command: str, cold: bool = False) -> subprocess.Popen[str] | warm.Popen:
        if not cold:
            return warm.Popen("-m", "saekit.cli", "train", *command, cwd=tmp_path / folder, env=os.environ | SERVER)
        return subprocess.Popen(
            [sys.executable, "-m", "saekit.cli", "train", *command], cwd=tmp_path / folder, text=True,
            env=os.environ | SERVER, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    whole, chance, at = start("whole", "run.toml"), random.Random(7), list[int]()
    command, run = ["run.toml"], tmp_path / "killed/runs/run"
    for kill in range(2):
        process = start("killed", *command, cold=kill == 1)
        deadline, goal = time.monotonic() + 60, 7 * kill + chance.randint(1, 4)
        while time.monotonic() < deadline and process.poll() is None and newest(run) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        at.append(newest(run))
        command = ["--resume", "runs/run"]
    assert at[0] < at[1]
    last = start("killed", *command)
    for process in (whole, last):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "run folder: runs/run" in out
        assert not err, err
    assert contents(run) == contents(tmp_path / "whole/runs/run")
    print(f"\nthe command: 1 run killed twice, identical; the newest checkpoints then: {at}")


if __name__ == "__main__":
    serve()
