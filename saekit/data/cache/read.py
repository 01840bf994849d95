"""Reading a cache: memory-mapped rows in a seeded order over all of them."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.data.cache.manifest import DOCUMENTS, HEADER, POSITIONS, TOKENS, Manifest
from saekit.data.cache.order import RowOrder
from saekit.data.cache.watch import WatchedFile, check_files
from saekit.errors import DataError
from saekit.site import Site
from saekit.values import Batch

__all__ = ["CachedActivations", "CachedBatches", "available_memory"]

IntArray = npt.NDArray[np.int64]


class CachedActivations:
    """The rows of some sites of a cache, by number.

    Row ``c * context_size + p`` is position ``p`` of context ``c``, unless rows of tokens that do not count are left
    out.
    """

    def __init__(self, folder: Path, manifest: Manifest, sites: Sequence[Site]) -> None:
        self.manifest = manifest
        self._watched: list[list[WatchedFile]] = []  # of each shard
        size = manifest.context_size
        lengths = [shard.contexts * size if shard.rows is None else shard.rows for shard in manifest.shards]
        self._starts = np.cumsum([0, *lengths])
        wanted = {site: manifest.site(site) for site in sites}
        self._rows: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        self._tokens: list[Tensor] = []
        self._documents: list[Tensor] = []
        self._positions: list[Tensor] = []  # where they do not follow from the number of the row
        for number, (shard, rows) in enumerate(zip(manifest.shards, lengths, strict=True)):
            home = folder / manifest.shard_folder(number)
            names = [*(form.file for form in wanted.values()), *manifest.origins]
            self._watched.append([WatchedFile.of(home / name, shard.files.get(name)) for name in names])
            for site, form in wanted.items():
                self._rows[site].append(self._mapped(home / form.file, [rows, form.d_in], getattr(torch, form.dtype)))
            self._tokens.append(self._mapped(home / TOKENS, [rows], torch.int32))
            self._documents.append(self._mapped(home / DOCUMENTS, [rows], torch.int64))
            if shard.rows is not None:
                self._positions.append(self._mapped(home / POSITIONS, [rows], torch.int32))

    def _mapped(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = HEADER + math.prod(shape) * dtype.itemsize
        try:
            # torch keeps no file descriptor for a mapping, as Python's own would: there may be thousands of files.
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise DataError(f"{path} of the activation cache cannot be read: {error}") from error
        return mapped[HEADER:].view(dtype).view(*shape)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def digest(self, rows: int) -> str:
        """What tells the shards with the first ``rows`` rows from those of another cache: made of their checksums."""
        count = int(np.searchsorted(self._starts, rows))
        shards = self.manifest.shards[:count]
        sums = [sorted((name, entry["sha256"]) for name, entry in shard.files.items()) for shard in shards]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def _mappings(self) -> list[Tensor]:
        return [*itertools.chain.from_iterable(self._rows.values()), *self._tokens, *self._documents, *self._positions]

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are read."""
        return sum(mapping.nbytes for mapping in self._mappings())

    def advise(self, *, single_rows: bool) -> None:
        """Tell the system how rows will be read: all of them soon, if memory has room for that; else here and there."""
        if self.nbytes < 0.8 * available_memory():
            _advise(self._mappings(), "MADV_WILLNEED")
        elif single_rows:
            _advise(self._mappings(), "MADV_RANDOM")

    def take(self, rows: IntArray) -> Batch:
        """The rows with these numbers, which must rise.

        :class:`DataError` names a file that is not as it was when it was opened.  To read past the end of one that has
        shrunk would end the process, so every file that is about to be read is looked at first.
        """
        index = torch.from_numpy(rows)
        counts = np.diff(np.searchsorted(rows, self._starts))  # of the rows, in each shard
        used = counts.nonzero()[0].tolist()
        sizes = counts[used].tolist()
        check_files(list(itertools.chain.from_iterable(self._watched[number] for number in used)))
        # Once for all tensors: with thousands of shards, a batch has a row or two in each.
        local = (index - torch.from_numpy(np.repeat(self._starts[:-1], counts))).split(sizes)

        def gather(shards: Sequence[Tensor]) -> Tensor:
            out = torch.empty(len(rows), *shards[0].shape[1:], dtype=shards[0].dtype)
            for shard, part, target in zip(used, local, out.split(sizes), strict=True):
                torch.index_select(shards[shard], 0, part, out=target)
            return out

        return Batch(
            {site: gather(shards) for site, shards in self._rows.items()},
            tokens=gather(self._tokens).long(),
            documents=gather(self._documents),
            positions=gather(self._positions).long() if self._positions else index % self.manifest.context_size,
        )

    def close(self) -> None:
        """Forget the mappings; each ends with the last tensor that shows it."""
        self._rows, self._tokens, self._documents, self._positions, self._watched = {}, [], [], [], []


class CachedBatches:
    """Batches of ``batch_size`` rows in a new order for each reading; a stage, whose state is a few numbers.

    Inside a batch the rows rise: their order means nothing to a training step, and neighbors are read together.
    """

    def __init__(
        self,
        cache: CachedActivations,
        batch_size: int,
        *,
        seed: int,
        repeat: bool,
        block: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """``part``: of each batch that of one process, and of how many."""
        self._cache, self._batch_size = cache, batch_size
        self._seed, self._repeat, self._block = seed, repeat, block
        self._part, self._rows = part, len(cache)
        self._digest = cache.digest(self._rows)
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def _order_of(self, epoch: int) -> RowOrder:
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        return RowOrder(self._rows, seed, self._block)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before = self._epoch, self._position, self._order
        try:
            return self._taken()
        except DataError:
            self._epoch, self._position, self._order = before  # the batch was not handed out
            raise

    def _taken(self) -> Batch:
        wanted = self._batch_size
        parts = []
        while wanted and self._rows:
            stop = min(self._position + wanted, len(self._order))
            parts.append(self._order.rows(self._position, stop))
            wanted -= stop - self._position
            self._position = stop
            if wanted:
                if not self._repeat:
                    break
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
        rows = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        number, of = self._part
        own = np.sort(rows)[number * len(rows) // of : (number + 1) * len(rows) // of]
        if not len(own):
            raise StopIteration
        return self._cache.take(own)

    def peek(self, n: int) -> Mapping[Site, Tensor]:
        """The next ``n`` rows, or those that are left in this reading, without using them up."""
        order, start = self._order, self._position
        if start == self._rows and self._repeat:
            order, start = self._order_of(self._epoch + 1), 0
        return self._cache.take(np.sort(order.rows(start, min(start + n, self._rows)))).activations

    def state_dict(self) -> dict[str, Any]:
        """The reading, the position in it, how many rows it is of, and what tells these rows from others."""
        return {
            "seed": self._seed,
            "block": self._block,
            "epoch": self._epoch,
            "position": self._position,
            "rows": self._rows,
            "contents": self._digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next batch, whether or not rows were added to the cache since."""
        numbers: list[Any] = [state.get(name) for name in ("epoch", "position", "rows")]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or numbers[1] > numbers[2]:
            raise DataError(
                f"the saved reading is damaged: its epoch, position and rows are {numbers}, expected whole numbers "
                "and the position within the rows. Go on from an older checkpoint"
            )
        if (state["seed"], state["block"]) != (self._seed, self._block):
            raise DataError(
                f"the saved reading had the seed {state['seed']} and block_rows {state['block']}, this run has "
                f"{self._seed} and {self._block}: go on with the options it was saved with"
            )
        if state["rows"] > len(self._cache):
            raise DataError(
                f"the activation cache has {len(self._cache):,} rows, and when the run was saved it had "
                f"{state['rows']:,}: restore it, or start anew"
            )
        digest = self._cache.digest(state["rows"])
        if state.get("contents", digest) != digest:  # a saekit before this one did not save it
            raise DataError(
                "the activation cache was written anew since the run was saved, and holds other rows: restore it, or "
                "start anew"
            )
        self._digest = digest
        self._epoch, self._position, self._rows = state["epoch"], state["position"], state["rows"]
        self._order = self._order_of(self._epoch)


def available_memory() -> int:
    """Bytes that the machine could give to the page cache, about; no more than this process's control group has."""
    try:
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        return available if limit == "max" else max(min(available, int(limit) - int(used)), 0)
    except (OSError, ValueError):
        return available


def _advise(mappings: Sequence[Tensor], advice: str) -> None:
    """``madvise``, where the system has it; it is advice, so a refusal changes nothing."""
    if not hasattr(mmap, advice):
        return
    madvise = ctypes.CDLL(None).madvise
    page = mmap.PAGESIZE
    for mapping in mappings:
        start = mapping.data_ptr() // page * page
        madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(mapping.data_ptr() + mapping.nbytes - start), getattr(mmap, advice)
        )
