"""The sha256 of files, computed beside what else is done with them, and compared with what it should be."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from saekit.files.names import SAE_CONFIG, SAE_WEIGHTS
from saekit.files.storage import check_file, read_json

__all__ = ["Checksums", "seal", "stated_weights"]

_PIECE = 1 << 20  # which stays in the cache
_SETTLED = 2_000_000_000  # nanoseconds; clocks of file systems are coarse, so what is younger may change unseen
_MOST_KNOWN = 256
_known: dict[tuple[int, ...], str] = {}  # of files that this process has summed, and that have not changed since
_lock = threading.Lock()  # of these: every load has threads


class Checksums:
    """Checksums that are begun early and asked for late.  A context manager: its end gives up what nobody asked for."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="saekit-sha256")
        self._sums: dict[Path, Future[str]] = {}
        self._expected: list[tuple[Path, str, Callable[[str], Exception]]] = []
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._threads.shutdown()

    def begin(self, path: Path) -> None:
        """Read the file, unless that has begun."""
        if path not in self._sums:
            self._sums[path] = self._threads.submit(self._sum, path)

    def of(self, path: Path) -> str:
        """The file's sha256, in hexadecimal; :class:`OSError` where it cannot be read."""
        self.begin(path)
        return self._sums[path].result()

    def expect(self, path: Path, sha256: str, fault: Callable[[str], Exception]) -> None:
        """Have :meth:`verify` raise ``fault(found)`` if the file's is another."""
        self.begin(path)
        self._expected.append((path, sha256, fault))

    def verify(self) -> None:
        """Wait for those that are expected, and compare."""
        for path, sha256, fault in self._expected:
            if (found := self.of(path)) != sha256:
                raise fault(found)

    def _sum(self, path: Path) -> str:
        check_file(path)
        found, piece = hashlib.sha256(), bytearray(_PIECE)
        with path.open("rb", buffering=0) as file:
            before = _state(file.fileno())
            with _lock:
                if before in _known:
                    return _known[before]
            began = time.time_ns()
            while (count := file.readinto(piece)) and not self._ended.is_set():
                found.update(memoryview(piece)[:count])
            if _state(file.fileno()) == before and began - before[-1] > _SETTLED and not self._ended.is_set():
                with _lock:
                    while len(_known) >= _MOST_KNOWN:
                        del _known[next(iter(_known))]
                    _known[before] = found.hexdigest()
        return found.hexdigest()


def _state(file: int) -> tuple[int, ...]:
    """What changes when a file does: which it is, its size, and when it was last written to, or renamed."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def seal(table: Mapping[str, Any]) -> str:
    """The checksum of all of ``cfg.json``, however it is spaced and ordered.

    The files' checksums are not in it: each says itself when it does not fit.
    """
    own = {name: value for name, value in table["saekit"].items() if name not in ("seal", "sha256")}
    content = {**table, "saekit": own}
    plain = json.loads(json.dumps(content))  # as it will be read: keys are texts, and sorted as such
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def stated_weights(folder: Path) -> str | None:
    """The sha256 of the weights in an SAE's folder, as its configuration states it; None where it does not."""
    try:
        found = read_json(folder / SAE_CONFIG)["saekit"]["sha256"][SAE_WEIGHTS]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
