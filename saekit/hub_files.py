"""A repository of the Hugging Face Hub: one listing, then the files that are wanted, checked; errors that say what to
do.

Everything goes through huggingface_hub, and into its cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import attrs

from saekit.errors import SAEFormatError, SaekitError, StorageError
from saekit.files.checksums import Checksums
from saekit.files.paths import leads_out
from saekit.files.storage import write_text
from saekit.hub import within_reach
from saekit.reasons import reason

__all__ = ["HubRepository", "asked", "why"]

_R = TypeVar("_R")
_AT_ONCE = 4
_LONGEST_WAIT = 60  # seconds, that the Hub asks for and are waited
_TRIES = 3
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@attrs.frozen
class HubRepository:
    """A repository at one commit."""

    repo_id: str
    revision: str
    """As it was asked for: a branch, a tag or a commit."""
    commit: str
    names: frozenset[str]
    """All of its files; of a Hub that cannot be reached, those that the cache has."""
    cached: bool
    """Whether the cache alone was asked."""
    token: str | bool | None = attrs.field(repr=False)

    @classmethod
    def listed(cls, repo_id: str, revision: str | None = None, token: str | bool | None = None) -> HubRepository:
        """Ask for the names of all files, once.  :class:`SAEFormatError` says why there is no answer."""
        from huggingface_hub import HfApi, constants

        wanted = revision or "main"
        if leads_out(wanted):  # it becomes the path of a file in the cache
            raise SAEFormatError(
                f"{wanted!r} is no revision of the Hub repository {repo_id!r}: expected a branch, a tag or a commit, "
                "without a leading / and without .."
            )
        with within_reach():
            if constants.HF_HUB_OFFLINE:
                return cls._in_cache(repo_id, wanted, token)
            info: Any = asked(
                lambda: HfApi(token=token).model_info(repo_id, revision=revision),
                f"cannot list the Hub repository {repo_id!r}",
                repo_id,
                wanted,
            )
        names = frozenset(file.rfilename for file in info.siblings or ())
        return cls(repo_id, wanted, info.sha or wanted, names, False, token)

    @classmethod
    def _in_cache(cls, repo_id: str, revision: str, token: str | bool | None) -> HubRepository:
        folder, commit = _cache(repo_id), revision
        try:
            if (ref := folder / "refs" / revision).is_file():
                commit = ref.read_text(encoding="utf-8").strip()
            snapshot = folder / "snapshots" / commit
            names = frozenset(p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())
        except OSError as error:
            raise SAEFormatError(f"the cache of the Hub in {folder} cannot be read: {reason(error)}") from error
        if not names:
            raise SAEFormatError(
                f"cannot list the Hub repository {repo_id!r}: the Hub is not asked (offline mode), and its cache "
                f"({folder.parent}) does not hold revision {revision!r} of it"
            )
        return cls(repo_id, revision, commit, names, True, token)

    def get(self, names: Collection[str]) -> dict[str, Path]:
        """The local paths of files, which are downloaded side by side where the cache has them not."""
        with within_reach():
            if len(names) == 1:
                return {name: self._download(name) for name in names}
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="saekit-hub") as threads:
                found = dict(zip(names, threads.map(self._download, names), strict=True))
        return found

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        path = asked(
            lambda: Path(hf_hub_download(self.repo_id, name, revision=self.commit, token=self.token)),
            f"cannot download {name} of {self.repo_id!r}",
            self.repo_id,
            self.revision,
            tries=1,  # the library waits itself
        )
        self._keep_revision()
        self._check_small(name, path)
        return path

    def _keep_revision(self) -> None:
        """Which commit a branch is, for when the Hub cannot be reached: the library writes it where it is asked for."""
        ref = _cache(self.repo_id) / "refs" / self.revision
        if self.cached or self.commit == self.revision or not _GIT.fullmatch(self.commit):
            return
        try:
            if not ref.is_file() or ref.read_text(encoding="utf-8") != self.commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_text(ref, self.commit)
        except (OSError, StorageError):  # a cache that cannot be written to is one all the same
            pass

    def _check_small(self, name: str, path: Path) -> None:
        """A file that git holds itself has the checksum of its contents as its name in the cache."""
        blob = Path(os.path.realpath(path))
        if blob == path or not _GIT.fullmatch(blob.name):
            return
        data = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != blob.name:
            raise self._other(name, path, found, blob.name)

    def expect(self, name: str, path: Path, sums: Checksums) -> None:
        """Have the checksum of a large file compared with the Hub's, which is its name in the cache."""
        blob = os.path.realpath(path)
        if _SHA256.fullmatch(sha256 := os.path.basename(blob)):  # noqa: PTH119 - a text
            sums.expect(path, sha256, lambda found: self._other(name, path, found, sha256))

    def _other(self, name: str, path: Path, found: str, expected: str) -> SAEFormatError:
        """The cache shall not give it again."""
        try:
            Path(os.path.realpath(path)).unlink()
            path.unlink()
            done = "It was removed from the cache: load the SAE again"
        except OSError:
            done = f"Remove {os.path.realpath(path)}, and load the SAE again"
        return SAEFormatError(
            f"{name} of {self.repo_id!r} is not the file that the Hub has: its checksum is {found[:12]}..., expected "
            f"{expected[:12]}... {done}"
        )


def _cache(repo_id: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def asked(
    ask: Callable[[], _R],
    what: str,
    repo_id: str,
    revision: str = "main",
    *,
    tries: int = _TRIES,
    kind: type[SaekitError] = SAEFormatError,
) -> _R:
    """What the Hub answers; where it asks to wait for some seconds, after these.

    An error of this ``kind`` says ``what`` cannot be done, why, and what to do.
    """
    for left in reversed(range(tries)):
        try:
            return ask()
        except Exception as error:  # of the library, of the one below it, or of the network
            wait = _seconds_to_wait(error)
            if not left or wait is None or wait > _LONGEST_WAIT:
                raise kind(f"{what}: {why(error, repo_id, revision, writing=kind is StorageError)}") from error
            time.sleep(wait)
    raise AssertionError("there is a last try")


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> tuple[int | None, Any]:
    """The status and the headers of the answer that led to an error."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if response is not None and getattr(response, "status_code", None):
            return response.status_code, response.headers
    return None, {}


def _seconds_to_wait(error: BaseException) -> int | None:
    """Of an answer that there were too many requests."""
    status, headers = _status(error)
    if status != 429:
        return None
    said = str(headers.get("Retry-After", "")) or "".join(re.findall(r"Retry after (\d+) second", str(error))[:1])
    return int(said) if said.isdecimal() else None


def why(error: Exception, repo_id: str, revision: str = "main", *, writing: bool = False) -> str:
    """What went wrong on the Hub, and what to do about it."""
    from huggingface_hub import constants, get_token

    page, kinds = f"{constants.ENDPOINT}/{repo_id}", {type(one).__name__ for one in _chain(error)}
    known = get_token() is not None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    status, headers = _status(error)
    if "GatedRepoError" in kinds:
        return f"it is gated: ask for access at {page}" + ("" if known else f", and {log_in}")
    if "RevisionNotFoundError" in kinds:
        return f"it has no revision {revision!r}; its branches and commits are at {page}/tree/main"
    if "EntryNotFoundError" in kinds or "RemoteEntryNotFoundError" in kinds:
        return f"there is no such file in revision {revision!r}"
    if status == 401 and headers.get("X-Error-Message") == "Invalid credentials in Authorization header":
        return f"the Hub does not know the token (401): {log_in} anew"
    if writing and status in (401, 404):
        return f"nobody may write there who asks like this ({status}): {log_in}, with a token that may"
    if writing and status in (409, 412):
        return f"somebody else has changed it meanwhile ({status}): push again, which builds on what is there now"
    if "RepositoryNotFoundError" in kinds or status == 401:
        hidden = "the token may not see it" if known else f"it is private: {log_in}"
        return f"there is no such repository ({status}), or {hidden}. Look at the name: owner/repository"
    if status == 403:
        return f"the Hub forbids it (403): {headers.get('X-Error-Message') or 'the token has no right to'}"
    if status == 429:
        wait = _seconds_to_wait(error)
        when = "later" if wait is None else f"in {wait} seconds"
        return f"the Hub has had too many requests (429): try again {when}" + ("" if known else f"; or {log_in}")
    if status is not None and status >= 500:
        return f"the Hub has trouble ({status}): try again later, or take what is in the cache with HF_HUB_OFFLINE=1"
    if "Consistency check failed" in str(error):
        sizes = re.findall(r"of size (\d+) but has size (\d+)", str(error))
        found = "".join(f" after {int(has):,} of {int(of):,} bytes" for of, has in sizes[:1])
        return f"it was cut off{found}, and nothing of it is kept: try again"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror or error} (the cache is {constants.HF_HUB_CACHE})"
    return reason(error)
