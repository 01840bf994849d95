"""The sha256 of files, computed beside what else is done with them, and compared with what it should be."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from saekit.files.storage import check_file

__all__ = ["Checksums"]

_PIECE = 1 << 18  # which stays in the cache


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
            while (count := file.readinto(piece)) and not self._ended.is_set():
                found.update(memoryview(piece)[:count])
        return found.hexdigest()
