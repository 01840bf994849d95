"""Where an SAE was read from, as plain data that is saved with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from saekit.errors import SAEFormatError
from saekit.files.checksums import Checksums
from saekit.reasons import reason
from saekit.saved import PretrainedSAE, SAEFiles, revision_of

__all__ = ["OWN", "checksums", "provenance", "verify"]

OWN = "saekit"
"""What stands for a loader where the folder is saekit's own."""


def checksums(files: SAEFiles, sums: Checksums) -> dict[str, str]:
    """The sha256 of every file that was opened, in hexadecimal, by name; none is another than it should be."""
    verify(files, sums)
    with _readable(files):
        return {name: sums.of(path) for name, path in sorted(files.opened.items())}


def verify(files: SAEFiles, sums: Checksums) -> None:
    """:class:`SAEFormatError` if a file is another than it should be."""
    with _readable(files):
        sums.verify()


@contextmanager
def _readable(files: SAEFiles) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SAEFormatError(f"{files.place} cannot be read any more: {reason(error)}") from error


def provenance(
    read: PretrainedSAE, loader: str, files: SAEFiles, sums: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What :attr:`saekit.SAEInfo.provenance` says of ``read``, of which an SAE with ``options`` was made."""
    revisions = [revision for path in files.opened.values() if (revision := revision_of(path)) is not None]
    folder = files.address.removeprefix(f"{files.repo}").strip("/") if files.repo is not None else ""
    derived = {*read.options, "dtype", "expansion_factor"}
    known = {
        "loader": loader,
        "repo": files.repo,
        "revision": revisions[0] if revisions else None,
        "folder": folder,
        "files": dict(sums),
        "defaulted": list(read.defaulted) or list(read.metadata.get("defaulted", ())),
        # of saekit's own folders, the options are those of its training
        "not_stated": None if loader == OWN else [name for name in options if name not in derived],
        "renamed": {theirs: ours for theirs, ours in read.renamed.items() if theirs != ours},
    }
    # that nothing was left open is said, too: where nobody says it, a saekit saved it that did not tell them apart
    found = {name: value for name, value in known.items() if value not in (None, "", [], {})}
    return found | ({"not_stated": []} if known["not_stated"] == [] else {})
