"""Writing a cache: shard by shard, each there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import math
import operator
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from saekit.cautions import warn
from saekit.data.cache.left import LOCK, check_target, remove_left
from saekit.data.cache.manifest import (
    DOCUMENTS,
    HEADER,
    MANIFEST,
    POSITIONS,
    TOKENS,
    Manifest,
    Shard,
    sample_sum,
    verify_cache,
)
from saekit.errors import DataError, PlaceError, StorageError
from saekit.files.storage import new_folder, sha256
from saekit.files.tensors import SummedFile, header
from saekit.values import Batch

__all__ = ["CacheWriter", "OpenShard", "as_storage_error", "identity_of", "with_shard"]

_AHEAD = 2  # batches that may wait for the disk


class CacheWriter:
    """Appends batches to the cache in ``folder``, in a thread of its own, so that the model need not wait for the disk.

    ``plan`` says what the cache is.  What is there already must be the same, and is gone on with: see ``manifest``.
    A context manager; an error of the disk is raised by the next call.
    """

    def __init__(self, folder: Path, plan: Manifest) -> None:
        self._folder = folder
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="saekit-cache")
        self._pending: deque[Future[None]] = deque()
        self._shard: OpenShard | None = None
        self._in_shard = 0  # contexts handed over for it
        self._position: Mapping[str, Any] = {}
        self._failure: BaseException | None = None
        self._resources = contextlib.ExitStack()
        self.manifest = self._opened(plan)
        """What is written and safe."""

    def _opened(self, plan: Manifest) -> Manifest:
        """Have the folder for this writer alone; what is there already."""
        with as_storage_error(self._folder), contextlib.ExitStack() as resources:
            self._folder.mkdir(parents=True, exist_ok=True)
            check_target(self._folder)
            resources.enter_context(self._locked())
            found = self._existing(plan)
            self._resources = resources.pop_all()
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; the lock goes with the process, however it ends."""
        with (self._folder / LOCK).open("a") as file:  # not "w", which would empty a file that is not the cache's
            self._identity = identity_of(os.fstat(file.fileno()))
            try:
                import fcntl  # POSIX has it

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"another process is writing the activation cache {str(self._folder)!r}") from error
            except (OSError, ImportError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                warn(
                    f"the system of {str(self._folder)!r} has no locks: see to it that nothing else writes there",
                    RuntimeWarning,
                )
            yield

    def _check_there(self) -> None:
        """The folder may have been moved or removed, and what is written then would be the half of a cache."""
        try:
            found = identity_of((self._folder / LOCK).stat())
        except FileNotFoundError:
            found = None
        if found != self._identity:
            raise StorageError("it was moved, removed or replaced while it was written. Leave it where it is")

    def _existing(self, plan: Manifest) -> Manifest:
        if not (self._folder / MANIFEST).exists():
            remove_left(self._folder, plan)
            return plan
        found = Manifest.load(self._folder)
        if not found.shards:  # the text was too short, and nothing keeps it from being another one
            remove_left(self._folder, found)
            return plan
        names = ("identity", "sites", "context_size")
        lines = [
            f"  - {path}: there {there!r}, wanted {wanted!r}"
            for name in names
            for path, there, wanted in _differences(name, getattr(found, name), getattr(plan, name))
        ]
        if lines:
            listed = "\n".join(lines)
            raise DataError(
                f"{str(self._folder)!r} holds another activation cache, so it cannot be gone on with:\n{listed}\n"
                "Remove it, or choose another folder (activations.cache.folder)"
            )
        verify_cache(self._folder, full=False, manifest=found)
        remove_left(self._folder, found)
        return attrs.evolve(found, contexts_per_shard=plan.contexts_per_shard)  # each shard knows its own

    def check_space(self, contexts: int, rows: int | None = None) -> None:
        """:class:`StorageError` when the disk has no room for the rest of ``contexts`` contexts, with ``rows`` in
        all."""
        there = self.manifest.bytes_for(self.manifest.contexts, self.manifest.rows)
        needed = self.manifest.bytes_for(contexts, rows) - there
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise PlaceError(
                f"the activation cache {str(self._folder)!r} needs {_size_text(needed)}, and the disk has "
                f"{_size_text(free)} free. Write fewer tokens (activations.cache.tokens), in a smaller type "
                "(activations.cache.dtype), or elsewhere (activations.cache.folder)"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            self._worker.shutdown(wait=True)
            if self._shard is not None:
                self._shard.abandon()

    @property
    def room(self) -> int:
        """Contexts that the shard being written has room for."""
        return self.manifest.contexts_per_shard - self._in_shard

    @property
    def mine(self) -> bool:
        """Whether it is this process that writes the next contexts: of one process, it is."""
        return True

    def pass_over(self, position: Mapping[str, Any], contexts: int) -> None:
        """Say that another process writes the next ``contexts``; ``position`` is as for :meth:`add`."""
        raise ValueError("one process writes all contexts")

    def add(self, batch: Batch, position: Mapping[str, Any], contexts: int | None = None) -> None:
        """Append whole contexts, at most :attr:`room`; ``position`` is the state of the text after them.

        How many they are, ``contexts``, must be said where rows are left out.
        """
        contexts = len(batch) // self.manifest.context_size if contexts is None else contexts
        self._submit(self._append, batch, contexts)
        self._count(position, contexts)

    def _count(self, position: Mapping[str, Any], contexts: int) -> None:
        self._in_shard += contexts
        if self.room <= 0:
            self._end_shard(position)
        self._position = position

    def _end_shard(self, position: Mapping[str, Any]) -> None:
        self._submit(self._close_shard, position)
        self._in_shard = 0

    def finish(self, *, ended: bool) -> None:
        """Write what there is as a last shard, which may be a short one, and wait for the disk."""
        if self._in_shard:
            self._end_shard(self._position)
        self._settle()
        self._save(attrs.evolve(self.manifest, ended=ended))

    def _settle(self) -> None:
        """Wait for what was handed over to be on the disk."""
        for pending in self._pending:
            pending.result()
        if self._failure is not None:
            raise self._failure

    def _save(self, manifest: Manifest) -> None:
        with as_storage_error(self._folder):
            self._check_there()
            manifest.save(self._folder)
        self.manifest = manifest

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        while len(self._pending) >= _AHEAD or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._worker.submit(self._after_success, work, *arguments))

    # ---- in the thread

    def _after_success(self, work: Callable[..., None], *arguments: Any) -> None:
        """``work``, unless something before it failed: rows after a gap, or a shard with one, must not be written."""
        if self._failure is not None:
            raise self._failure
        try:
            work(*arguments)
        except BaseException as error:
            self._failure = error
            raise

    def _append(self, batch: Batch, contexts: int) -> None:
        with as_storage_error(self._folder):
            self._check_there()
            if not (self._folder / MANIFEST).exists():
                self.manifest.save(self._folder)  # from now on whatever else comes to be here is the cache's
            if self._shard is None:
                self._shard = OpenShard(self._folder, self.manifest, self._number)
            self._shard.append(batch, contexts)

    @property
    def _number(self) -> int:
        """That of the shard being written."""
        return len(self.manifest.shards)

    def _close_shard(self, position: Mapping[str, Any]) -> None:
        assert self._shard is not None
        with as_storage_error(self._folder):
            shard, self._shard = self._shard.close(), None
        self._save(with_shard(self.manifest, shard, position))


def with_shard(manifest: Manifest, shard: Shard, position: Mapping[str, Any]) -> Manifest:
    """``manifest`` with one shard more, after which the text is at ``position``."""
    return attrs.evolve(manifest, shards=[*manifest.shards, shard], position=position)


class OpenShard:
    """A shard being written, under a temporary name."""

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.contexts = self.rows = 0
        self._complete: Shard | None = None
        self._chosen = manifest.rows_per_context is not None
        contexts, size = manifest.contexts_per_shard, manifest.context_size
        rows = contexts * (manifest.rows_per_context or size)
        origins = [rows] if self._chosen else [contexts, size]
        with contextlib.ExitStack() as stack:
            hasher = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="saekit-sha256"))
            home = stack.enter_context(new_folder(folder / manifest.shard_folder(number), replace=False))

            def opened(file: str, name: str, dtype: torch.dtype, planned: Sequence[int]) -> _TensorFile:
                return stack.enter_context(contextlib.closing(_TensorFile(home / file, name, dtype, planned, hasher)))

            self._origins = {
                TOKENS: opened(TOKENS, "token_ids", torch.int32, origins),
                DOCUMENTS: opened(DOCUMENTS, "document_ids", torch.int64, origins),
            }
            if self._chosen:
                self._origins[POSITIONS] = opened(POSITIONS, "positions", torch.int32, origins)
            self._rows = {
                form.site: opened(form.file, "activations", getattr(torch, form.dtype), [rows, form.d_in])
                for form in manifest.sites
            }
            self._stack = stack.pop_all()

    def append(self, batch: Batch, contexts: int) -> None:
        origins = {TOKENS: batch.tokens, DOCUMENTS: batch.documents, POSITIONS: batch.positions}
        for name, file in self._origins.items():
            origin = origins[name]
            assert origin is not None
            file.write(origin)
        for site, file in self._rows.items():
            file.write(batch.activations[site])
        self.contexts += contexts
        self.rows += len(batch)

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [file.path for file in (*self._origins.values(), *self._rows.values())]

    def complete(self) -> Shard:
        """Write the last of its files, which the disk has then; they stay under the temporary name."""
        if self._complete is None:
            files = {file.path.name: file.finish() for file in (*self._origins.values(), *self._rows.values())}
            self._complete = Shard(contexts=self.contexts, files=files, rows=self.rows if self._chosen else None)
        return self._complete

    def close(self) -> Shard:
        """Give the shard its name; the disk has it then."""
        with self._stack:  # its end syncs the files and renames their folder
            return self.complete()

    def abandon(self) -> None:
        """Remove what was written."""
        self._stack.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


class _TensorFile:
    """A safetensors file with one tensor, written row by row."""

    def __init__(
        self, path: Path, name: str, dtype: torch.dtype, planned: Sequence[int], hasher: ThreadPoolExecutor
    ) -> None:
        self.path = path
        self._name, self._dtype = name, dtype
        self._planned = [*planned]
        self._bytes = 0
        self._file = SummedFile(path, hasher)
        try:
            self._file.put(self._header(planned[0]))
        except BaseException:
            self._file.close()
            raise

    def _header(self, length: int) -> bytes:
        return header({self._name: (self._dtype, [length, *self._planned[1:]])}, HEADER)

    def write(self, values: Tensor) -> None:
        """Append rows."""
        kept = values.detach().to("cpu", self._dtype).contiguous()
        if self._dtype == torch.float16 and kept.isinf().any() and not values.isinf().any():
            raise DataError(
                f"{self.path.stem} has activations as large as {values.abs().max():,.0f}, which float16 cannot hold: "
                "choose activations.cache.dtype=bfloat16"
            )
        self._file.put_tensor(kept)
        self._bytes += kept.nbytes

    def finish(self) -> dict[str, Any]:
        """Write the last of it; the file's entry in the manifest."""
        row = math.prod(self._planned[1:]) * self._dtype.itemsize
        length, digest = self._bytes // row, self._file.sha256()
        if short := length != self._planned[0]:  # the data ended: the header must say so
            self._file.rewrite_start(self._header(length))
        self._file.close()
        return {
            "bytes": HEADER + self._bytes,
            "sha256": sha256(self.path) if short else digest,
            "sample": sample_sum(self.path),
        }

    def close(self) -> None:
        self._file.close()


def identity_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def as_storage_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = getattr(cause, "strerror", None) or error
        raise StorageError(
            f"cannot write the activation cache {str(folder)!r}: {reason}. Finished shards are kept, and `saekit "
            "cache` goes on after them"
        ) from error


def _differences(name: str, there: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of the manifest's field ``name`` differ, field by field where they are mappings."""
    if isinstance(there, Mapping) and isinstance(wanted, Mapping):
        for key in dict.fromkeys([*there, *wanted]):
            if there.get(key) != wanted.get(key):
                yield key, there.get(key), wanted.get(key)
    elif name == "sites":
        for label in ("site.name", "d_in", "dtype"):
            has, asked = ([operator.attrgetter(label)(rows) for rows in side] for side in (there, wanted))
            if has != asked:
                yield f"sites' {label.removeprefix('site.')}", has, asked
    elif there != wanted:
        yield name, there, wanted


def _size_text(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
