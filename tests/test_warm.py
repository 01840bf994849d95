"""Forks of a process that has imported much end as new interpreters do, and know nothing of each other."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from support import warm

PROGRAMS = {
    "streams": "import sys; print('out'); print('said', file=sys.stderr); print(repr(sys.stdin.read()))",
    "code": "import sys; sys.exit(7)",
    "text": "import sys; sys.exit('a message')",
    "kill": "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "atexit": "import atexit; atexit.register(print, 'at the end'); print('first')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
    "arguments": "import sys; print(sys.argv, sys.path[0], __name__)",
    "folder": "import os; print(os.getcwd(), os.environ.get('ONLY_HERE'), os.environ.get('NOT_HERE'))",
    "import": "import beside; print(beside.VALUE)",
    "encoding": "import sys; print('\\u2713', sys.stdout.encoding, sys.stdout.isatty())",
    "processes": "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: print(p.map(abs, [-1, -2, 3]))",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_as_a_new_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NOT_HERE", "x")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/beside.py").write_text("VALUE = 5")
    environment = {key: value for key, value in os.environ.items() if key != "NOT_HERE"} | {"ONLY_HERE": "y"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "beside"), environment.get("PYTHONPATH", "")])
    words = ["-c", PROGRAMS[name], "one", "two"]
    found = warm.python(*words, cwd=tmp_path, env=environment, light=True)
    expected = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (found.returncode, found.stdout, found.stderr) == (expected.returncode, expected.stdout, expected.stderr)
    assert name != "kill" or found.returncode == -signal.SIGKILL


def test_errors_and_warnings() -> None:
    warns = "import warnings; warnings.warn('careful', UserWarning); print('on')"
    assert warm.python("-c", warns, light=True).stdout == "on\n"
    found = warm.python("-W", "error::UserWarning", "-c", warns, light=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.endswith("UserWarning: careful\n")
    ignored = warm.python("-c", warns, env=os.environ | {"PYTHONWARNINGS": "ignore:careful"}, light=True)
    assert (ignored.stdout, ignored.stderr) == ("on\n", "")


def test_one_leaves_nothing_to_the_next() -> None:
    changes = (
        "import builtins, os, random, sys, warnings\nprint(random.random())\nbuiltins.left = os.environ['LEFT'] = '1'\n"
    )
    changes += "os.chdir('/')\nsys.path.append('/left')\nwarnings.simplefilter('error')"
    first = warm.python("-c", changes, light=True)
    look = "import builtins, json, os, random, sys, warnings\nprint(random.random())\nprint(json.dumps([os.getcwd(), "
    look += "hasattr(builtins, 'left'), 'LEFT' in os.environ, '/left' in sys.path, warnings.filters[0][0] == 'error']))"
    random, found = warm.python("-c", look, light=True).stdout.splitlines()
    assert json.loads(found) == [str(Path.cwd()), False, False, False, False]
    assert random != first.stdout.strip(), "each draws other random numbers"


def test_what_is_imported_is_seen() -> None:
    assert warm.python("-c", "print(1)", watch=True).stdout == "1\n"
    with pytest.raises(AssertionError, match=r'imported: \["torch"\]'):
        warm.python("-c", "import sys, types; sys.modules['torch'] = types.ModuleType('torch')", watch=True)


WAITING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
try:
    print("waiting", flush=True)
    time.sleep(100)
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 9, ""), (signal.SIGKILL, -signal.SIGKILL, "")],
)
def test_a_process_that_is_sent_signals(tmp_path: Path, number: int, code: int, said: str) -> None:
    """Several at once, and each is one of its own."""
    other = warm.Popen("-c", "print('x' * 200_000)", light=True)
    process = warm.Popen("-c", WAITING, cwd=tmp_path, light=True)
    assert process.stdout.readline() == "waiting\n"
    assert process.poll() is None
    assert len({process.pid, other.pid, os.getpid()}) == 3
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", said)
    assert process.poll() == process.wait() == process.returncode == code
    assert other.communicate(timeout=60) == ("x" * 200_000 + "\n", "")
    assert other.returncode == 0


def test_a_process_that_takes_too_long_is_killed() -> None:
    process = warm.Popen("-c", WAITING, light=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.2)
    assert process.wait(60) == -signal.SIGKILL


HOLDING = """
import fcntl, pathlib, sys, time
file = open("held")
fcntl.flock(file, fcntl.LOCK_SH)
pathlib.Path(sys.argv[1]).touch()
time.sleep(1000)
"""
ASKING = f"""
from support import warm
process = warm.Popen("-c", {HOLDING!r}, "one", light=True)
warm.python("-c", {HOLDING!r}, "two", light=True)
"""


def test_what_hangs_is_killed_and_the_next_command_runs(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as late:
        warm.python("-c", "import time; print('so far', flush=True); time.sleep(1000)", light=True, timeout=0.5)
    assert late.value.output == "so far\n"
    assert warm.python("-c", "print('next')", light=True).stdout == "next\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whoever_is_killed_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    """Neither what forks, which holds the pipe that is read here, nor its forks, which hold a lock."""
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with (
        (tmp_path / "held").open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", ASKING], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": places}, start_new_session=True,
        ) as asking,
    ):  # fmt: skip
        wait_until(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists())
        assert not free(file)
        if number == signal.SIGINT:  # as a terminal does
            os.killpg(asking.pid, number)
        else:
            asking.send_signal(number)
        _, said = asking.communicate(timeout=60)
        assert asking.returncode == -number, said
        wait_until(lambda: free(file))


def free(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)
