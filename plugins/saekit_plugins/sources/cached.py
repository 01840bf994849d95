"""Activation source ``cached``: the rows that `saekit cache` wrote, in a random order over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from saekit import Batch, DataError, Entry, Site, hookimpl
from saekit.config import check, path_field

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import TrainConfig
    from saekit.data import StreamContext
    from saekit.data.cache import Manifest


@attrs.frozen(kw_only=True)
class CachedConfig:
    """Reads activations from disk, memory-mapped; the model does not run."""

    folder: str = path_field("activations", validator=check(lambda v: bool(v.strip()), "a folder"))
    """The folder that `saekit cache` wrote (its `activations.cache.folder`)."""
    verify: Literal["quick", "full"] = "quick"
    """What is compared with the checksums before the first row is used: sizes, the header and a sample of each file, or
    all of it."""
    block_rows: int = attrs.field(default=1, validator=check(lambda v: 1 <= v <= 65_536, "1 to 65536"))
    """Neighboring rows that are read together.  1 mixes best; for a cache larger than memory on a disk that is slow at
    small reads, 64 or 128 are many times faster."""
    prefetch: bool = True
    """Read in a background thread while the SAE trains.  The batches are the same."""


_SAMPLE_BYTES = 100_000_000  # for what is estimated on activations before training, such as their mean norm


class CachedSource:
    """Shuffled batches from disk."""

    shares_rows = True

    def __init__(self, config: CachedConfig, stream: StreamContext) -> None:
        from saekit.data import Prefetched
        from saekit.data.cache import CachedActivations, CachedBatches, Manifest, verify_cache

        self._stream = stream
        folder = Path(config.folder)
        manifest = Manifest.load(folder)
        manifest.check_fits(stream.identity, dict.fromkeys(stream.sites), folder)  # before the model runs
        _refuse_empty(manifest, config)
        manifest = verify_cache(folder, full=config.verify == "full", manifest=manifest)
        if stream.has_model:
            manifest.check_fits(stream.identity, stream.widths, folder)
        self._cache = CachedActivations(folder, manifest, stream.sites)
        self._cache.advise(single_rows=config.block_rows == 1)
        self._reader = CachedBatches(
            self._cache,
            stream.batch_size,
            seed=stream.seed,
            repeat=stream.repeat,
            block=config.block_rows,
            part=(stream.process, stream.processes),
        )
        self._prefetched = Prefetched(self._reader, depth=2) if config.prefetch else None
        self._batches: Any = self._prefetched or self._reader

    @property
    def widths(self) -> Mapping[Site, int]:
        """Those on disk."""
        return {rows.site: rows.d_in for rows in self._cache.manifest.sites}

    @property
    def rows(self) -> int:
        """Those of one reading."""
        return self._cache.manifest.rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._batches)
        return batch

    def peek(self) -> Mapping[Site, Tensor]:
        state = self.state_dict()
        self.load_state_dict(state)  # back to the last batch handed out, if the thread has gone on
        # As many rows of each site as if it were alone, so that what is estimated on them is the same then.
        most = {site: _SAMPLE_BYTES // self._cache.manifest.site(site).row_bytes for site in self._stream.sites}
        return {site: self._reader.peek(max(n, self._stream.batch_size))[site] for site, n in most.items()}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._batches.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches.load_state_dict(state)

    def recipe_size(self) -> tuple[int, int]:
        """The rows are on disk."""
        return 0, 0

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        # All are of whole batches, but one that had no row of the last need not have gone past it.
        self.load_state_dict(max(states, key=lambda state: (state["epoch"], state["position"])))

    def close(self) -> None:
        """End the background thread and forget the files."""
        if self._prefetched is not None:
            self._prefetched.close()
        self._cache.close()


def _precheck(config: CachedConfig, whole: TrainConfig) -> None:
    """What needs no model: that there is a cache.  What does not fit is told later, all at once."""
    from saekit.data.cache import Manifest

    _refuse_empty(Manifest.load(Path(config.folder)), config)


def _refuse_empty(manifest: Manifest, config: CachedConfig) -> None:
    if not manifest.contexts:
        raise DataError(f"the activation cache {config.folder!r} is empty: `saekit cache` found too little text")
    if not manifest.rows:
        raise DataError(f"the activation cache {config.folder!r} has no activations: no token of its text counts")


@hookimpl
def saekit_register_activation_sources() -> Iterable[Entry]:
    summary = "activations that `saekit cache` wrote, memory-mapped"
    yield Entry("cached", CachedConfig, CachedSource, summary=summary, precheck=_precheck, needs_text=False)
