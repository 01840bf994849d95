"""Python in a process of its own that need not import everything again.

Importing torch, transformers and datasets takes seconds of a processor, and hundreds of tests run a command.  A
:class:`Server` is a process that has imported them, has started no thread of Python's, and forks for each command:
the fork has its own folder, variables, path, warnings, streams and seeds, and ends as any interpreter ends.

What a fork cannot show stays a process of its own (:mod:`subprocess`): what is imported in which order and how fast,
variables that a library reads while it is imported (those of the Hub), signals, and whether two processes with
different hash seeds agree.

Run as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterable, Mapping
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
    "matplotlib.figure", "matplotlib.backends.backend_agg", "rich.progress", "rich.table", "saekit.commands.jobs",
    "saekit.commands.outcome", "saekit.evals.engine", "saekit.kernels.step", "saekit.pretrained.load",
    "saekit.reports.curves", "saekit.runs.supervised",
)  # fmt: skip
"""What training and evaluating import."""


class Server:
    """A process that forks for each command; ``imports`` names what it has imported by then."""

    def __init__(self, imports: tuple[str, ...]) -> None:
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno()), *imports]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.replies = self.socket.makefile("rb")
        atexit.register(self.close)

    def close(self) -> None:
        self.replies.close()
        self.socket.close()
        self.process.wait()

    def run(self, job: Mapping[str, Any], streams: list[int]) -> int:
        """Run one command to its end and give its exit code, that of :attr:`subprocess.Popen.returncode`."""
        text = json.dumps(job).encode()
        socket.send_fds(self.socket, [len(text).to_bytes(8, "big")], streams)
        self.socket.sendall(text)
        reply = self.replies.readline()
        assert reply, "the process that forks has ended: see what it said above"
        return int(reply)


@functools.cache
def server(heavy: bool) -> Server:
    """The one of this process; the light one has not imported torch, nor what takes as long."""
    return Server(LIGHT + HEAVY + JOBS if heavy else LIGHT)


def python(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    light: bool = False,
    watch: bool = False,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env)``.

    ``arguments`` are those of Python: ``-W`` and what it shall do, then ``-c CODE``, ``-m MODULE`` or a file, and
    what follows is ``sys.argv``.  ``light``: begin without torch and the like; ``watch``: and fail if any is imported.
    """
    words = [str(word) for word in arguments]
    environment = dict(os.environ if env is None else env)
    job = {"words": words, "cwd": str(cwd or Path.cwd()), "env": environment}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as loaded:
        code = server(not light and not watch).run(job, [out.fileno(), said.fileno(), loaded.fileno()])
        texts = []
        for file in (out, said, loaded):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n"))
    if watch:
        assert json.loads(texts[2] or "null") == [], f"imported: {texts[2] or 'it was killed'}"
    return subprocess.CompletedProcess([sys.executable, *words], code, *texts[:2])


# ---- the server


def _received(connection: socket.socket) -> tuple[Any, list[int]] | None:
    """A job and its streams, or None when nobody will send one any more."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if not head:
        return None
    while len(head) < 8:
        head += connection.recv(8 - len(head))
    size, text = int.from_bytes(head, "big"), bytearray()
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), streams


def _serve(connection: socket.socket) -> tuple[Any, list[int]]:
    """Fork for each job.  Returns in the forks alone, with the job."""
    while (job := _received(connection)) is not None:
        child = os.fork()
        if not child:
            connection.close()
            return job
        for stream in job[1]:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    sys.exit()


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
    for number, stream in enumerate(streams[:2], 1):
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
    for name in imports:
        importlib.import_module(name)
    for point in importlib.metadata.entry_points(group="saekit"):
        if point.dist is not None and point.dist.name == "saekit":
            point.load()
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()  # a fork would copy all of it to look through it
    job, streams = _serve(socket.socket(fileno=number))
    words = _become(job, streams, own_path, n_filters)
    atexit.register(_tell_what_is_loaded, streams[2])  # the first that is registered is the last that runs
    _run(words)
    sys.exit()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
