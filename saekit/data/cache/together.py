"""Writing a cache by several processes: each writes every so many-th shard, and the cache is that of one.

All read the same text, and each runs the model on the contexts of its own shards alone.  As many shards as there are
processes are a round: at its end they get their names in their order, each before the next, and the first process
writes each into the manifest.  So what is there at any time is what one process would have left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from saekit.data.cache.left import LOCK
from saekit.data.cache.manifest import MANIFEST, Manifest, Shard
from saekit.data.cache.write import CacheWriter, as_storage_error, identity_of, with_shard
from saekit.distributed.world import World
from saekit.errors import DataError
from saekit.files.storage import sync_files

__all__ = ["CacheWriterOfMany"]


class CacheWriterOfMany(CacheWriter):
    """The writer of one of the processes of ``world``, all of which open one and hand over the same contexts."""

    def __init__(self, folder: Path, plan: Manifest, world: World) -> None:
        self._world = world
        self._round: list[Mapping[str, Any]] = []  # of the shards that are done and have no name yet: the text after it
        super().__init__(folder, plan)

    def _opened(self, plan: Manifest) -> Manifest:
        _check_alike([plan.identity], self._world, "model, text and tokens")
        manifest = self._world.all.once(lambda: self._opened_by_first(plan))
        if not self._world.main:
            with as_storage_error(self._folder):  # which is not there, if it is on a disk of one machine
                self._identity = identity_of((self._folder / LOCK).stat())
        return manifest

    def _opened_by_first(self, plan: Manifest) -> Manifest:
        manifest = super()._opened(plan)
        if not (self._folder / MANIFEST).exists():
            self._save_by_first(manifest)  # before any process writes there
        return manifest

    def check_space(self, contexts: int, rows: int | None = None) -> None:
        self._world.all.once(lambda: super(CacheWriterOfMany, self).check_space(contexts, rows))

    @property
    def mine(self) -> bool:
        return len(self._round) == self._world.rank

    def pass_over(self, position: Mapping[str, Any], contexts: int) -> None:
        self._count(position, contexts)

    @property
    def _number(self) -> int:
        return len(self.manifest.shards) + self._world.rank

    def _end_shard(self, position: Mapping[str, Any]) -> None:
        if self.mine:
            self._submit(self._complete_shard)
        self._round.append(position)
        self._in_shard = 0
        if len(self._round) == self._world.size:
            self._end_round()

    def _complete_shard(self) -> None:
        assert self._shard is not None
        with as_storage_error(self._folder):
            self._shard.complete()
            sync_files(self._shard.paths)  # now, by all at once, and not one after the other when they get their names

    def finish(self, *, ended: bool) -> None:
        if self._in_shard:
            self._end_shard(self._position)
        self._end_round()
        self._save(attrs.evolve(self.manifest, ended=ended))
        self._world.all.objects(None)  # none has ended before the cache is whole

    def _end_round(self) -> None:
        self._settle()
        for owner, position in enumerate(self._round):
            shard = self._named() if owner == self._world.rank else None
            shards = _check_alike([position], self._world, "text", shard)
            self._save(with_shard(self.manifest, shards[owner], position))
            self._world.all.objects(None)  # the next gets its name when this one is in the manifest
        self._round.clear()

    def _named(self) -> Shard:
        assert self._shard is not None
        with as_storage_error(self._folder):
            self._check_there()
            shard, self._shard = self._shard.close(), None
        return shard

    def _save(self, manifest: Manifest) -> None:
        if self._world.main:
            self._save_by_first(manifest)
        self.manifest = manifest

    def _save_by_first(self, manifest: Manifest) -> None:
        super()._save(manifest)


def _check_alike(own: list[Any], world: World, what: str, shard: Shard | None = None) -> list[Any]:
    """The ``shard`` of every process; :class:`DataError` in all where one has another ``what`` than the first."""
    every = world.all.objects((own, shard))
    for rank, (found, _) in enumerate(every):
        if found != every[0][0]:
            raise DataError(
                f"process {rank} has another {what} than process 0, so that they cannot write one activation cache: "
                f"{found[0]!r:.200}, not {every[0][0][0]!r:.200}. Give all the same model and dataset"
            )
    return [shard for _, shard in every]
