"""The manifest of a cache, and the checks that need nothing else.

A cache is a folder::

    manifest.json
    shard-00000/
        tokens.safetensors                        token_ids [contexts, context_size], int32
        documents.safetensors                     document_ids [contexts, context_size], int64
        blocks.1.hook_resid_post.safetensors      activations [contexts * context_size, d_in]
        ...                                       one file per site
    shard-00001/ ...

Row ``c * context_size + p`` of a shard is position ``p`` of its context ``c``.  Where some tokens do not count, their
rows are left out, and ``tokens``, ``documents`` and ``positions.safetensors`` (``positions``, int32) have one number
for each row.  Every tensor starts at a page of its file, so that rows can be memory-mapped.  A shard that the manifest
does not name is not there.

The manifest is sealed: see :mod:`saekit.data.cache.table`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.cautions import warn
from saekit.data.cache.table import (
    CHOSEN_FORMAT,
    DOCUMENTS,
    FORMAT,
    HEADER,
    POSITIONS,
    SEAL,
    TOKENS,
    Contents,
    contents,
    read_table,
    sealed,
)
from saekit.errors import DataError
from saekit.files.storage import parse_json, sha256, write_text
from saekit.site import Site

__all__ = [
    "DOCUMENTS",
    "HEADER",
    "MANIFEST",
    "POSITIONS",
    "TOKENS",
    "Manifest",
    "Shard",
    "SiteRows",
    "sample_sum",
    "verify_cache",
]

MANIFEST = "manifest.json"
MAY_BE_UNKNOWN = ("dataset.contents", "dataset.column")
"""What a run that reads a cache need not know: its text may not be there."""
WHERE_CHOSEN = ("tokens.", "dataset.chat_template", "dataset.disable_concat_sequences")
"""What is there only where it is chosen; a run that lacks it has not chosen it."""
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
    rows: int | None = None
    """Those of tokens that count, where others are left out."""


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
    rows_per_context: int | None = None
    """The most that a context has, where rows of tokens that do not count are left out; None: all have theirs."""

    @property
    def contexts(self) -> int:
        """Contexts that are written."""
        return sum(shard.contexts for shard in self.shards)

    @property
    def rows(self) -> int:
        """Activation vectors of each site."""
        return sum(shard.contexts * self.context_size if shard.rows is None else shard.rows for shard in self.shards)

    @property
    def origins(self) -> tuple[str, ...]:
        """The files that say where rows are from."""
        return (TOKENS, DOCUMENTS) if self.rows_per_context is None else (TOKENS, DOCUMENTS, POSITIONS)

    @property
    def nbytes(self) -> int:
        """Bytes of every file but the manifest."""
        return sum(int(entry["bytes"]) for shard in self.shards for entry in shard.files.values())

    def shard_folder(self, number: int) -> str:
        """The folder's name."""
        return f"shard-{number:05d}"

    def bytes_for(self, contexts: int, rows: int | None = None) -> int:
        """Bytes of the files when there are ``contexts`` contexts, exactly, but for the manifest itself.

        ``rows`` are theirs, where not all have the most.
        """
        shards = len(self.shards) + -(-(contexts - self.contexts) // self.contexts_per_shard)
        rows = contexts * (self.rows_per_context or self.context_size) if rows is None else rows
        per_row = sum(site.row_bytes for site in self.sites) + 4 + 8 + 4 * (self.rows_per_context is not None)
        return rows * per_row + shards * HEADER * (len(self.sites) + len(self.origins))

    def contents(self, shard: Shard) -> dict[str, Contents]:
        """What is in each file of ``shard``."""
        forms = {rows.file: (rows.dtype, rows.d_in) for rows in self.sites}
        return contents(forms, self.context_size, shard.contexts, shard.rows)

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, all or nothing, and sealed."""
        chosen = self.rows_per_context is not None
        table = {"format": CHOSEN_FORMAT if chosen else FORMAT, **attrs.asdict(self)}
        if not chosen:  # as it was before anything could be left out
            table.pop("rows_per_context")
            for shard in table["shards"]:
                shard.pop("rows")
        table = sealed({**table, "contexts": self.contexts, "rows": self.rows})
        write_text(folder / MANIFEST, json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``; :class:`DataError` for what is not one, or not as it was written."""
        file = folder / MANIFEST
        if not file.is_file():
            what = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
            raise DataError(f"the activation cache {str(folder)!r} {what}. `saekit cache run.toml` writes one")
        table = read_table(file)
        if SEAL not in table:
            warn(
                f"{file} was written by a saekit that did not seal manifests, so that damage to it is only found where "
                f"it contradicts the files. `saekit cache verify {folder}` compares all of them; the `saekit cache` "
                "that wrote it, run again, keeps what is there and seals it",
                RuntimeWarning,
            )
        sites = [SiteRows(**{**entry, "site": Site(**entry["site"])}) for entry in table["sites"]]
        shards = [Shard(**entry) for entry in table["shards"]]
        keys = {field.name for field in attrs.fields(cls)} - {"sites", "shards", "rows_per_context"}
        most = table.get("rows_per_context")
        return cls(sites=sites, shards=shards, rows_per_context=most, **{key: table[key] for key in keys})

    def site(self, site: Site) -> SiteRows:
        """The rows of ``site``; :class:`DataError` says which sites there are."""
        for rows in self.sites:
            if rows.site == site:
                return rows
        names = ", ".join(rows.site.name for rows in self.sites)
        raise DataError(f"the activation cache has no site {site.name}; it has {names}")

    def check_fits(self, identity: Mapping[str, Any], widths: Mapping[Site, int | None], folder: Path) -> None:
        """:class:`DataError` naming every field in which the cache and a run differ.  A width may not be known yet."""
        chosen = [name for name in self.identity if name.startswith(WHERE_CHOSEN)] if identity else []
        lines = [
            f"{name}: the cache has {self.identity.get(name)!r}, the run {value!r}"
            for name, value in {**dict.fromkeys(chosen), **identity}.items()
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


def sample_sum(path: Path) -> str:
    """A checksum of 16 pages spread over the file: what can be looked at each time a cache is opened."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def verify_cache(
    folder: Path,
    *,
    full: bool = True,
    report: Callable[[int], None] = lambda done: None,
    manifest: Manifest | None = None,
) -> Manifest:
    """Compare every file with the manifest; :class:`DataError` names each that is missing or damaged.

    ``full`` reads all of it; otherwise sizes, the file's own header and a sample.  ``manifest`` is that of ``folder``,
    where it has been read.

    ``report`` is told the bytes that are done, of :attr:`Manifest.nbytes`.
    """
    manifest = manifest or Manifest.load(folder)
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
        expected = manifest.contents(shard)
        for name, entry in shard.files.items():
            path = folder / manifest.shard_folder(number) / name
            try:
                fault = _fault(path, entry, expected[name], full)
            except OSError as error:
                fault = f"cannot be read: {error.strerror}"
            if fault is not None:
                yield f"{path.relative_to(folder)} {fault}"
            done += int(entry["bytes"])
            report(done)


def _fault(path: Path, entry: Mapping[str, Any], expected: Contents, full: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"has {size:,} bytes, expected {entry['bytes']:,}"
    key, found = ("sha256", sha256(path)) if full else ("sample", sample_sum(path))
    if found != entry[key]:
        return f"has other contents than were written ({key} {found[:12]}, expected {entry[key][:12]})"
    if (said := _own_header(path)) != expected.header:
        return f"is not what {MANIFEST} says: its own header has {said}, expected {expected.header}"
    return None


def _own_header(path: Path) -> Any:
    """What a file says of its tensors; None where that is not to be read."""
    with path.open("rb") as file:
        start = file.read(HEADER)
    try:
        return parse_json(start[8:]) if int.from_bytes(start[:8], "little") == HEADER - 8 else None
    except ValueError:
        return None
