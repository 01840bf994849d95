"""The manifest of a cache, and the checks that need nothing else.

A cache is a folder::

    manifest.json
    shard-00000/
        tokens.safetensors                        token_ids [contexts, context_size], int32
        documents.safetensors                     document_ids [contexts, context_size], int64
        blocks.1.hook_resid_post.safetensors      activations [contexts * context_size, d_in]
        ...                                       one file per site
    shard-00001/ ...

Row ``c * context_size + p`` of a shard is position ``p`` of its context ``c``.  Every tensor starts at a page of its
file, so that rows can be memory-mapped.  A shard that the manifest does not name is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.errors import DataError
from saekit.site import Site
from saekit.storage import sha256, write_text

__all__ = [
    "DOCUMENTS",
    "HEADER",
    "MANIFEST",
    "TOKENS",
    "Manifest",
    "Shard",
    "SiteRows",
    "check_target",
    "sample_sum",
    "verify_cache",
]

MANIFEST, TOKENS, DOCUMENTS = "manifest.json", "tokens.safetensors", "documents.safetensors"
FORMAT = 1
MAY_BE_UNKNOWN = ("dataset.contents", "dataset.column")
"""What a run that reads a cache need not know: its text may not be there."""
HEADER = 4096
"""Bytes before the numbers of every file: its safetensors header, padded with blanks."""
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@attrs.frozen
class SiteRows:
    """A site and the form of its rows."""

    site: Site
    d_in: int
    dtype: str
    """As torch names it, such as ``float32``."""
    itemsize: int

    @property
    def file(self) -> str:
        """The name of its files."""
        return f"{self.site.name}.safetensors"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.d_in * self.itemsize


@attrs.frozen
class Shard:
    """A finished shard: its files by name, each with ``bytes``, ``sha256`` and ``sample``."""

    contexts: int
    files: Mapping[str, Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Manifest:
    """What a cache holds and how it was made."""

    identity: Mapping[str, Any]
    """What decides the activations: option paths to plain values."""
    sites: Sequence[SiteRows]
    context_size: int
    contexts_per_shard: int
    shards: Sequence[Shard] = ()
    ended: bool = False
    """Whether the data ended before as much was written as was asked for."""
    position: Mapping[str, Any] | None = None
    """Where in the text to go on."""
    saekit_version: str = ""

    @property
    def contexts(self) -> int:
        """Contexts that are written."""
        return sum(shard.contexts for shard in self.shards)

    @property
    def rows(self) -> int:
        """Activation vectors of each site."""
        return self.contexts * self.context_size

    @property
    def nbytes(self) -> int:
        """Bytes of every file but the manifest."""
        return sum(int(entry["bytes"]) for shard in self.shards for entry in shard.files.values())

    def shard_folder(self, number: int) -> str:
        """The folder's name."""
        return f"shard-{number:05d}"

    def bytes_for(self, contexts: int) -> int:
        """Bytes of the files when there are ``contexts`` contexts, exactly, but for the manifest itself."""
        shards = len(self.shards) + -(-(contexts - self.contexts) // self.contexts_per_shard)
        rows = contexts * self.context_size
        per_row = sum(site.row_bytes for site in self.sites) + 4 + 8
        return rows * per_row + shards * HEADER * (len(self.sites) + 2)

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, all or nothing."""
        table = {"format": FORMAT, **attrs.asdict(self), "contexts": self.contexts, "rows": self.rows}
        write_text(folder / MANIFEST, json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``; :class:`DataError` for what is not one."""
        file = folder / MANIFEST
        if not file.is_file():
            what = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
            raise DataError(f"the activation cache {str(folder)!r} {what}. `saekit cache run.toml` writes one")
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            if table["format"] != FORMAT:
                raise DataError(
                    f"{file} has format {table['format']!r}, and this saekit reads {FORMAT}: update saekit to read it"
                )
            sites = [SiteRows(**{**entry, "site": Site(**entry["site"])}) for entry in table["sites"]]
            shards = [Shard(**entry) for entry in table["shards"]]
            sum(entry["bytes"] for shard in shards for entry in shard.files.values())
            keys = {field.name for field in attrs.fields(cls)} - {"sites", "shards"}
            return cls(sites=sites, shards=shards, **{key: table[key] for key in keys})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}") from error

    def site(self, site: Site) -> SiteRows:
        """The rows of ``site``; :class:`DataError` says which sites there are."""
        for rows in self.sites:
            if rows.site == site:
                return rows
        names = ", ".join(rows.site.name for rows in self.sites)
        raise DataError(f"the activation cache has no site {site.name}; it has {names}")

    def check_fits(self, identity: Mapping[str, Any], widths: Mapping[Site, int | None], folder: Path) -> None:
        """:class:`DataError` naming every field in which the cache and a run differ.  A width may not be known yet."""
        lines = [
            f"{name}: the cache has {self.identity.get(name)!r}, the run {value!r}"
            for name, value in identity.items()
            if value != self.identity.get(name) and not (name in MAY_BE_UNKNOWN and value is None)
        ]
        cached = {rows.site: rows.d_in for rows in self.sites}
        for site, width in widths.items():
            if site not in cached:
                lines.append(f"site: the cache has {', '.join(s.name for s in cached)}, the run {site.name}")
            elif width not in (None, cached[site]):
                lines.append(f"d_in at {site.name}: the cache has {cached[site]}, the model {width}")
        if lines:
            listed = "\n".join(f"  - {line}" for line in lines)
            raise DataError(
                f"the activation cache {str(folder)!r} was not made for this run:\n{listed}\n"
                "Change the run to fit, or write another cache (activations.cache.folder)"
            )


def check_target(folder: Path) -> None:
    """What a writer goes on with must be a cache; a folder without a manifest must be empty, but for what a writer that
    was killed at once has left."""
    if (folder / MANIFEST).exists():
        Manifest.load(folder)
        return
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    if names := [name for name in names if name != ".lock" and not name.startswith(f".{MANIFEST}.")]:
        raise DataError(
            f"the folder {str(folder)!r} is no activation cache and holds {', '.join(names[:5])}; choose "
            "another (activations.cache.folder)"
        )


def sample_sum(path: Path) -> str:
    """A checksum of 16 pages spread over the file: what can be looked at each time a cache is opened."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def verify_cache(folder: Path, *, full: bool = True, report: Callable[[int], None] = lambda done: None) -> Manifest:
    """Compare every file with the manifest; :class:`DataError` names each that is missing or damaged.

    ``full`` reads all of it; otherwise sizes and a sample of each file.

    ``report`` is told the bytes that are done, of :attr:`Manifest.nbytes`.
    """
    manifest = Manifest.load(folder)
    found = list(_faults(folder, manifest, full, report))
    if found:
        listed = "\n".join(f"  - {fault}" for fault in found)
        raise DataError(
            f"the activation cache {str(folder)!r} is damaged:\n{listed}\n"
            "Remove it and run `saekit cache` again, or restore the files"
        )
    return manifest


def _faults(folder: Path, manifest: Manifest, full: bool, report: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for number, shard in enumerate(manifest.shards):
        for name, expected in shard.files.items():
            path = folder / manifest.shard_folder(number) / name
            shown = path.relative_to(folder)
            if not path.is_file():
                yield f"{shown} is missing"
            elif path.stat().st_size != expected["bytes"]:
                yield f"{shown} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
            else:
                key, found = ("sha256", sha256(path)) if full else ("sample", sample_sum(path))
                if found != expected[key]:
                    wanted = str(expected[key])
                    yield f"{shown} has other contents than were written ({key} {found[:12]}, expected {wanted[:12]})"
            done += int(expected["bytes"])
            report(done)
