"""The cache that a configuration describes: its sites, its size and its form, before anything is written."""

from __future__ import annotations

import torch

from saekit._version import __version__
from saekit.config import TrainConfig
from saekit.data.cache.manifest import Manifest, SiteRows
from saekit.data.cache.table import why_no_file
from saekit.data.stream import StreamContext
from saekit.errors import DataError
from saekit.site import Site

__all__ = ["cache_sites", "cached_contexts", "cached_rows", "plan_cache"]


def cache_sites(config: TrainConfig) -> list[Site]:
    """The sites that are written, each once."""
    return list(dict.fromkeys([*config.sites.all, *config.activations.cache.sites]))


def cached_rows(config: TrainConfig) -> int:
    """The activations that are asked for."""
    return config.activations.cache.tokens or config.training.training_tokens


def cached_contexts(config: TrainConfig, rows_per_context: float) -> int:
    """The contexts that are asked for, each of which has so many rows."""
    return int(-(-cached_rows(config) // rows_per_context))


def plan_cache(config: TrainConfig, stream: StreamContext, context_size: int) -> Manifest:
    """The empty cache that a configuration describes."""
    cache = config.activations.cache
    forms = []
    for site, held in stream.dtypes.items():
        dtype = held if cache.dtype is None else getattr(torch, cache.dtype)
        name = str(dtype).removeprefix("torch.")
        if (reason := why_no_file(site.name, name)) is not None:
            raise DataError(f"the site {site.name!r} cannot be cached: {reason}")
        forms.append(SiteRows(site, stream.widths[site], name, dtype.itemsize))
    if len({form.file for form in forms}) < len(forms):
        raise DataError(
            f"two of the sites {', '.join(form.site.name for form in forms)} would share a file: cache them apart"
        )
    rows = None if stream.counts_all else stream.rows_per_context(context_size)
    largest = max(form.row_bytes for form in forms) * (rows or context_size)
    return Manifest(
        identity=stream.identity,
        sites=forms,
        context_size=context_size,
        contexts_per_shard=max(cache.shard_megabytes * 1_000_000 // largest, 1),
        saekit_version=__version__,
        rows_per_context=rows,
    )
