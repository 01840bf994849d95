"""Python in a process of its own that need not import everything again.

Importing torch, transformers and datasets takes seconds of a processor, and hundreds of tests run a command.  A
:class:`Server` is a process that has imported them, has started no thread of Python's, and forks for each command:
the fork has its own folder, variables, path, warnings, streams and seeds, and ends as any interpreter ends.

:func:`python` runs a command to its end; a :class:`Popen` can be sent signals meanwhile.

What a fork cannot show stays a process of its own (:mod:`subprocess`): what is imported in which order and how fast,
variables that a library reads while it is imported (those of the Hub), and whether two processes with different hash
seeds agree.  Commands end with whoever asked for them, however that ends.

Run as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TextIO

HEAVY = ("torch", "transformers", "datasets", "transformer_lens")
"""What takes seconds, and no command needs that finds a mistake."""
LIGHT = (
    "saekit.cli", "saekit.commands.preflight", "saekit.config", "saekit.plugins.listing", "saekit.plugins.manager",
    "yaml",
)  # fmt: skip
"""What the command line itself and mistakes on it import."""
JOBS = (
    "matplotlib.figure", "matplotlib.backends.backend_agg", "rich.progress", "rich.table", "saekit.commands.features",
    "saekit.commands.jobs", "saekit.commands.outcome", "saekit.evals.engine", "saekit.kernels.step",
    "saekit.planning.planner", "saekit.planning.rehearsal", "saekit.pretrained.load", "saekit.reports.curves",
    "saekit.runs.ending", "saekit.runs.run", "saekit.runs.supervised", "saekit.training.loop",
)  # fmt: skip
"""What training, planning and evaluating import."""

NOT_OF_THE_HUB = ("torch", "torch._dynamo", "pandas", "pyarrow.parquet", "safetensors.torch", "sympy", "attrs", "yaml")
"""What takes long and does not read the variables of the Hub while it is imported."""

ANEW = """
import sys
for name in [*sys.modules]:
    if name.partition(".")[0] in ("saekit", "saekit_plugins"):
        del sys.modules[name]
"""
"""Code after which saekit is imported once more, where it matters what that does or in which order."""

LONGEST = 300.0
"""Seconds after which a command hangs, however busy the machine is."""


class Server:
    """A process that forks for each command; ``imports`` names what it has imported by then."""

    def __init__(self, imports: tuple[str, ...]) -> None:
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno()), *imports]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        atexit.register(self.close)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()

    def start(self, words: list[str], cwd: Path | None, env: Mapping[str, str] | None, *streams: int) -> Command:
        """Fork; ``streams``: for what it prints, what it says of errors, and perhaps for which modules it imported."""
        environment = dict(os.environ if env is None else env)
        text = json.dumps({"words": words, "cwd": str(cwd or Path.cwd()), "env": environment}).encode()
        reply, theirs = socket.socketpair()
        with theirs:
            head = len(text).to_bytes(8, "big")
            socket.send_fds(self.socket, [head], [theirs.fileno(), *streams])
            self.socket.sendall(text)
        return Command(reply)


class Command:
    """A fork, which has a pid and an exit code."""

    def __init__(self, reply: socket.socket) -> None:
        self._socket, self._replies = reply, reply.makefile("rb", buffering=0)
        self.pid = self._read("pid")

    def _read(self, what: str) -> int:
        told, _, number = self._replies.readline().decode().partition(" ")
        assert told == what, f"no {what}: the process that forks has ended, see what it said above"
        return int(number)

    def ended(self, timeout: float | None) -> bool:
        """Whether it has ended before ``timeout``."""
        return bool(select.select([self._socket], [], [], timeout)[0])

    def close(self) -> int:
        """Its exit code, that of :attr:`subprocess.Popen.returncode`, for which this waits."""
        with self._socket, self._replies:
            return self._read("code")


@functools.cache
def server(imports: tuple[str, ...]) -> Server:
    """The one of this process that has imported these."""
    return Server(imports)


@functools.cache
def _imports(light: bool) -> tuple[str, ...]:
    """The light ones are neither torch nor what takes as long."""
    points = importlib.metadata.entry_points(group="saekit")
    own = (point.value for point in points if point.dist is not None and point.dist.name == "saekit")
    return LIGHT + (() if light else HEAVY + JOBS) + tuple(own)


def python(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    light: bool = False,
    watch: bool = False,
    imports: tuple[str, ...] = (),
    timeout: float = LONGEST,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env)``.

    ``arguments`` are those of Python: ``-W`` and what it shall do, then ``-c CODE``, ``-m MODULE`` or a file, and
    what follows is ``sys.argv``.  ``light``: begin without torch and the like; ``watch``: and fail if any is imported;
    ``imports``: begin with these alone.  What has not ended after ``timeout`` seconds is killed, with what it started:
    :class:`subprocess.TimeoutExpired`, with what it said so far.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as loaded:
        files = (out, said, loaded)
        warm = server(imports or _imports(light or watch))
        command = warm.start(words, cwd, env, *(file.fileno() for file in files))
        if late := not command.ended(timeout):
            os.killpg(command.pid, signal.SIGKILL)
        code = command.close()
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n"))
    if late:
        raise subprocess.TimeoutExpired([sys.executable, *words], timeout, *texts[:2])
    if watch:
        assert json.loads(texts[2] or "null") == [], f"imported: {texts[2] or 'it was killed'}"
    return subprocess.CompletedProcess([sys.executable, *words], code, *texts[:2])


class Popen:
    """As ``subprocess.Popen([sys.executable, *arguments], stdout=PIPE, stderr=PIPE, text=True, cwd=cwd, env=env)``.

    It leads a group of processes of its own, and SIGINT does what it does by default.
    """

    def __init__(
        self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, light: bool = False
    ) -> None:
        (out, their_out), (said, their_said) = os.pipe(), os.pipe()
        self.stdout, self.stderr = (os.fdopen(number, encoding="utf-8") for number in (out, said))
        self.args = [sys.executable, *map(str, arguments)]
        try:
            self._command = server(_imports(light)).start(self.args[1:], cwd, env, their_out, their_said)
        finally:
            os.close(their_out)
            os.close(their_said)
        self.pid, self.returncode = self._command.pid, None

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        if self.returncode is None and self._command.ended(0):
            self.returncode = self._command.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._command.ended(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._command.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed and what it said of errors; one that takes longer than ``timeout`` is killed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            reading = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
                left = None if deadline is None else max(deadline - time.monotonic(), 1)
                out, said = (future.result(left) for future in reading)
            except TimeoutError:
                os.killpg(self.pid, signal.SIGKILL)
                raise
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return out, said


# ---- the server


def _received(connection: socket.socket) -> tuple[Any, list[int]] | None:
    """A job and its streams, or None when nobody will send one any more."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 4)
    if not head:
        return None
    while len(head) < 8:
        head += connection.recv(8 - len(head))
    size, text = int.from_bytes(head, "big"), bytearray()
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), streams


def _serve(connection: socket.socket) -> tuple[Any, list[int]]:
    """Fork for each job.  Returns in the forks alone, with the job.

    When nobody is there any more who could ask for one, it ends, and so does what still runs.
    """
    awake, woken = socket.socketpair()
    for end in (awake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, it is for the tests; a fork gets its own
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([connection, awake], [], [])
        if awake in ready:
            awake.recv(4096)
            _tell_of_ends(running)
        if connection not in ready:
            continue
        if (job := _received(connection)) is None:
            break
        child = os.fork()
        if not child:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for end in (connection, awake, woken):
                end.close()
            for reply in running.values():
                os.close(reply)
            return job
        running[child] = job[1][0]
        for stream in job[1][1:]:
            os.close(stream)
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    sys.exit()


def _tell_of_ends(running: dict[int, int]) -> None:
    for child in [*running]:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            reply = running.pop(child)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                os.write(reply, b"code %d\n" % os.waitstatus_to_exitcode(status))
            os.close(reply)


def _stream(number: int, environment: Mapping[str, str], errors: str, buffering: int) -> TextIO:
    assert sys.__stdin__ is not None
    encoding, _, named = environment.get("PYTHONIOENCODING", "").partition(":")
    return open(
        number, "w", buffering, encoding=encoding or sys.__stdin__.encoding, errors=named or errors, closefd=False
    )


def _filter(options: Iterable[str], n_own: int) -> None:
    """Take ``options`` for those of ``-W``: they go before Python's own, and behind what libraries add later."""
    place = len(warnings.filters) - n_own
    for option in options:
        warnings._setoption(option)  # type: ignore[attr-defined]
        warnings.filters.insert(place, warnings.filters.pop(0))  # type: ignore[attr-defined]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _become(job: Any, streams: list[int], own_path: list[str], n_filters: int) -> list[str]:
    """Make this process what a new interpreter with the job's folder, variables and options would be."""
    os.setpgid(0, 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = sys.__stdout__ = _stream(1, job["env"], "strict", -1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, job["env"], "backslashreplace", 1)  # type: ignore[misc]
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    words = list(job["words"])
    _filter(filter(None, job["env"].get("PYTHONWARNINGS", "").split(",")), n_filters)
    while words[0] == "-W":
        _filter([words[1]], n_filters)
        del words[:2]
    paths = [path for path in job["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    first = "" if words[0] == "-c" else job["cwd"] if words[0] == "-m" else str(Path(words[0]).resolve().parent)
    sys.path[:] = [first, *paths, *own_path]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    return words


def _tell_what_is_loaded(stream: int) -> None:
    os.write(stream, json.dumps(sorted({*HEAVY} & {*sys.modules})).encode())


def _run(words: list[str]) -> None:
    """What Python does with its arguments."""
    if words[0] == "-m" and words[1] == "saekit.cli":  # as the installed command
        sys.argv = ["saekit", *words[2:]]
        importlib.import_module("saekit.cli").main()
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        code = words[0] == "-c"
        sys.argv = ["-c", *words[2:]] if code else words
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        source = words[1] if code else Path(words[0]).read_text(encoding="utf-8")
        if not code:
            main.__file__ = words[0]
        exec(compile(source, "<string>" if code else words[0], "exec"), vars(main))


def main(number: int, imports: list[str]) -> NoReturn:
    n_filters = len(warnings.filters)
    inherited = {path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    own_path = [path for path in sys.path[1:] if path not in inherited]
    del sys.path[0]
    gc.disable()
    for name in imports:
        importlib.import_module(name)
    os.fsync = os.fstat  # type: ignore[assignment]  # as in :mod:`support.disk`, for the same reason
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()  # a fork would copy all of it to look through it
    gc.enable()
    job, (reply, out, said, *loaded) = _serve(socket.socket(fileno=number))
    words = _become(job, [out, said], own_path, n_filters)
    if loaded:
        atexit.register(_tell_what_is_loaded, loaded[0])  # the first that is registered is the last that runs
    os.write(reply, b"pid %d\n" % os.getpid())
    os.close(reply)
    _run(words)
    sys.exit()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
