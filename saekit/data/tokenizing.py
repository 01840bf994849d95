"""Documents tokenized ahead, by processes of their own: the same ids in the same order, whatever their number.

A process is started with :mod:`saekit.data.tokenizing_process` as its program, so nothing of the caller's is forked or
imported anew, as scripts and notebooks without ``if __name__ == "__main__"`` need it.  It ends when the pipe that it
reads from is closed, which the system does however the caller ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from saekit.data.documents import Conversation, Document
from saekit.data.faults import TokenizingError
from saekit.data.reader import DocumentReader
from saekit.errors import ConfigError
from saekit.reasons import reason

__all__ = ["Ids", "ReadAhead", "TokenizingProcesses"]

_CHARACTERS = 1 << 16
"""In what is sent at once, or one document."""
_DOCUMENTS = 64

Found: TypeAlias = tuple[bool, Any]
"""Whether it went well, and the ids or the error."""


@attrs.frozen(eq=False)
class Ids:
    """The ids of a document that are made elsewhere, ``at`` which place of what was sent with it."""

    made: Future[Sequence[Found]]
    at: int

    def get(self) -> Any:
        """``[n]`` int64, as soon as they are there; what tokenizing raised is raised here."""
        good, found = self.made.result()[self.at]
        if not good:
            raise found
        return found


class TokenizingProcesses:
    """``count`` processes that each call ``tokenize``, which must be one that can be pickled.

    ``option`` is named where that fails.  They start at once; :meth:`close` ends them, and so does the end of this
    object or of the program.
    """

    def __init__(self, tokenize: Callable[[Any], Sequence[int]], count: int, option: str) -> None:
        try:
            told = pickle.dumps(tokenize)
        except Exception as error:  # pickling raises what the tokenizer's own code raises
            raise ConfigError(
                [(option, f"is {count}, but the tokenizer cannot be sent to another process: "
                  f"{reason(error)}. Set it to 0")]
            ) from error  # fmt: skip
        self.count = count
        self._workers = _started(told, count, option)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, "saekit-tokenize")  # each waits for a process
        self._end = weakref.finalize(self, _end, self._workers, self._threads)

    def send(self, documents: Sequence[str | Conversation]) -> Future[Sequence[Found]]:
        """To the first process that is free; what comes back is in their order."""
        return self._threads.submit(self._made, documents)

    def _made(self, documents: Sequence[str | Conversation]) -> Sequence[Found]:
        worker = self._idle.get()
        try:
            return worker.tokenized(documents)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; what was sent and is not there yet will not come."""
        self._end()


def _end(workers: Sequence[_Worker], threads: ThreadPoolExecutor) -> None:
    for worker in workers:
        worker.close()
    threads.shutdown(wait=False, cancel_futures=True)  # they wait for nothing any more


def _started(tokenize: bytes, count: int, option: str) -> list[_Worker]:
    """All of them, or none and :class:`ConfigError`."""
    workers: list[_Worker] = []
    try:
        while len(workers) < count:
            workers.append(_Worker(tokenize, option))
    except BaseException as error:
        for worker in workers:
            worker.close()
        if isinstance(error, OSError):
            raise ConfigError(
                [(option, f"is {count}, but process {len(workers) + 1} of them could not be started: {reason(error)}. "
                  "Lower it, or set it to 0")]
            ) from error  # fmt: skip
        raise
    return workers


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started here is not ended by the signals that end a run, before it ignores them itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process."""

    def __init__(self, tokenize: bytes, option: str) -> None:
        own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with _signals_blocked():
            self._process = subprocess.Popen(
                # -P: what lies in the working folder is imported only where the caller imports it
                [sys.executable, "-P", "-m", "saekit.data.tokenizing_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                start_new_session=True,  # a Ctrl-C in the terminal is for the run, which ends it
            )
        # To be sent before anything else; bytes within, so that one that cannot be read leaves the rest readable.
        self._tokenize: bytes | None = pickle.dumps((tokenize, option))
        self._closed, self._option = False, option

    def tokenized(self, documents: Sequence[str | Conversation]) -> Sequence[Found]:
        """What became of each; :class:`TokenizingError` when the process is gone."""
        given, made = self._process.stdin, self._process.stdout
        assert given is not None
        assert made is not None
        try:
            if self._tokenize is not None:
                given.write(self._tokenize)
                self._tokenize = None
            given.write(pickle.dumps(documents))
            given.flush()
            found: Sequence[Found] = pickle.load(made)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            if self._closed:
                return [(False, TokenizingError("tokenizing was ended"))] * len(documents)
            raise TokenizingError(self._end()) from error
        return found

    def _end(self) -> str:
        try:
            what = f"has ended ({_how(self._process.wait(timeout=5))})"
        except subprocess.TimeoutExpired:
            self._process.kill()
            what = "answered with something that is not token ids, and was ended"
        return (
            f"process {self._process.pid}, which tokenized the text, {what}. Go on from the last checkpoint with fewer "
            f"of them or none: saekit train --resume FOLDER {self._option}=0 --allow {self._option}"
        )

    def close(self) -> None:
        self._closed = True
        self._process.kill()  # it ignores what is gentler
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not sent yet cannot be
                pipe.close()


def _how(code: int) -> str:
    """In words, how a process ended with ``code``."""
    if code >= 0:
        return f"exit status {code}"
    killed = code == -getattr(signal, "SIGKILL", 0)  # Windows has none
    memory = "; a system that is out of memory ends processes so" if killed else ""
    return f"signal {-code}, {signal.strsignal(-code)}{memory}"


class ReadAhead:
    """The documents of ``reader`` in order, with :class:`Ids` in the place of each that is to be tokenized.

    Its state is that of ``reader`` as of the last document that was handed out, however far it has read.
    """

    def __init__(self, reader: DocumentReader, processes: TokenizingProcesses) -> None:
        self._reader, self._processes = reader, processes
        self._read: deque[tuple[int, Any, Mapping[str, Any], int]] = deque()  # with the state after each, and its piece
        self._pieces = 0  # that were read
        self._failure: Exception | None = None  # StopIteration too; comes when all before it is handed out
        self._state: Mapping[str, Any] | None = None  # None: that of the reader

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        if self._state is None:
            self._state = self._reader.state_dict()
        while self._failure is None and self._wants_more:
            try:
                self._read_some()
            except BaseException:  # Ctrl-C, say, at any place: what was read is read again
                self.load_state_dict(self._state)
                raise
        if not self._read:
            assert self._failure is not None
            failure, self._failure = self._failure, None  # asked again, the reader says what it says then
            self._state = None
            raise failure
        number, document, self._state, _ = self._read.popleft()
        return number, document

    @property
    def _wants_more(self) -> bool:
        """Beside the piece that is handed out, two for each process: one at work, and one to come."""
        return not self._read or self._pieces - self._read[0][3] <= 2 * self._processes.count

    def _read_some(self) -> None:
        """A few documents, sent off as one piece."""
        found: list[tuple[int, Document, Mapping[str, Any]]] = []
        texts: list[str | Conversation] = []
        size = 0
        while len(found) < _DOCUMENTS and size < _CHARACTERS:
            try:
                number, document = next(self._reader)
            except MemoryError:  # of now, and of no document
                raise
            except Exception as error:  # for the caller, when it comes to it
                self._failure = error
                break
            found.append((number, document, self._reader.state_dict()))
            if isinstance(document, (str, Conversation)):
                texts.append(document)
            size += len(document) if isinstance(document, str) else _CHARACTERS // _DOCUMENTS
        made = self._processes.send(texts) if texts else None
        place = iter(range(len(texts)))
        for number, document, state in found:
            if made is not None and isinstance(document, (str, Conversation)):
                self._read.append((number, Ids(made, next(place)), state, self._pieces))
            else:
                self._read.append((number, document, state, self._pieces))
        self._pieces += 1

    def state_dict(self) -> dict[str, Any]:
        """The position of the next document that will be handed out."""
        return dict(self._reader.state_dict() if self._state is None else self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next document."""
        self._read.clear()
        self._failure, self._state = None, None
        self._reader.load_state_dict(state)
