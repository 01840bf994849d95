"""Activations on disk: what a cache is (manifest), how it is written, and how it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports

if TYPE_CHECKING:
    from saekit.data.cache.manifest import Manifest, verify_cache
    from saekit.data.cache.order import RowOrder
    from saekit.data.cache.read import CachedActivations, CachedBatches
    from saekit.data.cache.write import CacheWriter

__all__ = ["CacheWriter", "CachedActivations", "CachedBatches", "Manifest", "RowOrder", "verify_cache"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Manifest": "saekit.data.cache.manifest",
        "verify_cache": "saekit.data.cache.manifest",
        "CacheWriter": "saekit.data.cache.write",
        "CachedActivations": "saekit.data.cache.read",
        "CachedBatches": "saekit.data.cache.read",
        "RowOrder": "saekit.data.cache.order",
    },
)
