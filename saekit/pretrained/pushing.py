"""SAEs go to the Hub: their files and a card, in one commit, so that all of it is there or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saekit._version import __version__
from saekit.cautions import warn
from saekit.errors import ConfigError, PlaceError, StorageError
from saekit.files.names import SAE_CONFIG, SAE_FILES, SAE_PROBE
from saekit.files.paths import as_path
from saekit.files.storage import new_folder
from saekit.hub_files import asked
from saekit.pretrained.card import MADE_BY_SAEKIT, CardSAE, model_card
from saekit.pretrained.copying import read_config

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["check_repository", "push", "push_sae"]

_R = TypeVar("_R")
_CARD = "README.md"


def check_repository(repo_id: str, folder: str = "") -> None:
    """:class:`ConfigError` for what cannot be a repository, or a folder in one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        fault = "" if "/" in repo_id else "it has no owner"
    except HFValidationError as error:
        fault = str(error).splitlines()[0]
    if fault:
        raise ConfigError([("repo_id", f"must be owner/name, found {repo_id!r}: {fault}")])
    parts = folder.split("/") if folder else []
    if any(part in ("", ".", "..") for part in parts) or "\\" in folder:
        raise ConfigError([("folder", f"must be a path in the repository, such as layer_8 or a/b, found {folder!r}")])


def push(
    repo_id: str,
    folders: Mapping[str, Path],
    saes: Sequence[CardSAE],
    *,
    columns: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
    probe: bool = True,
    preview: str | Path | None = None,
) -> str:
    """Put saved SAEs into a repository, which is made if there is none, with a card; the address of the commit.

    ``folders`` are those of the SAEs by their folders in the repository, and ``saes`` what the card says of them.
    ``revision`` is a branch, which is made if there is none.  Without ``probe``, ``probe.safetensors`` stays here.
    With ``preview``, nothing is sent: that new folder has what a new repository would, and is what is returned.
    """
    if preview is not None:
        return str(_previewed(as_path(preview), _of_new(repo_id, folders, saes, columns, probe)))
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, what = HfApi(token=token), f"cannot push to the Hub repository {repo_id!r}"

    def do(call: Callable[[], _R]) -> _R:
        return asked(call, what, repo_id, revision or "main", kind=StorageError)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between the library and its own dependencies
        do(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            do(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True))
        info = do(lambda: api.model_info(repo_id, revision=revision))
        there = {file.rfilename for file in info.siblings or ()}
        new, old = _files(folders, there, probe)
        for path in _cards(list(folders), there):
            if path not in there or do(lambda path=path: _is_ours(api, repo_id, path, info.sha)):  # type: ignore[misc]
                new[path] = model_card(repo_id, saes, columns).encode()
            else:
                warn(f"{path} of {repo_id} was not made by saekit, or is yours by now: it stays")
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in new.items()]
        operations += [CommitOperationDelete(name) for name in old]
        text = message or f"{len(saes)} SAE{'s' if len(saes) > 1 else ''}, saved by saekit {__version__}"
        what += ", and no file of it was changed"
        how: dict[str, Any] = {"revision": revision, "parent_commit": info.sha}  # if another is there, the Hub refuses
        done = do(lambda: api.create_commit(repo_id, operations, commit_message=text, **how))
    return str(done.commit_url)


def _of_new(
    repo_id: str, folders: Mapping[str, Path], saes: Sequence[CardSAE], columns: Sequence[str], probe: bool
) -> dict[str, str | bytes]:
    """All files of a repository in which nothing else is."""
    new, _ = _files(folders, (), probe)
    return new | {path: model_card(repo_id, saes, columns).encode() for path in _cards(list(folders), ())}


def _previewed(folder: Path, new: Mapping[str, str | bytes]) -> Path:
    if os.path.lexists(folder):
        raise PlaceError(f"there is something at {folder} already: a preview needs a new folder")
    with new_folder(folder, replace=False) as temporary:
        for name, data in new.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, str):
                shutil.copyfile(data, target)
            else:
                target.write_bytes(data)
    return folder


def _files(
    folders: Mapping[str, Path], there: Collection[str], probe: bool
) -> tuple[dict[str, str | bytes], list[str]]:
    """What is to be put into the repository, and what of SAEs that were there belongs to none of these."""
    new: dict[str, str | bytes] = {}
    old = []
    for inner, folder in folders.items():
        prefix = f"{inner}/" if inner else ""
        for name in SAE_FILES:
            if name == SAE_PROBE and not probe:
                old += [prefix + name] if prefix + name in there else []
            elif name == SAE_CONFIG and not probe:
                new[prefix + name] = _without_probe(folder)
            elif (folder / name).is_file():
                new[prefix + name] = str(folder / name)
            elif prefix + name in there:
                old.append(prefix + name)
    return new, old


def _without_probe(folder: Path) -> bytes:
    """The ``cfg.json`` of a saved SAE without the probe's checksum, which its seal leaves out."""
    table = read_config(folder)
    own = table.get("saekit")
    if isinstance(own, dict) and isinstance(own.get("sha256"), dict):
        own["sha256"].pop(SAE_PROBE, None)
    return (json.dumps(table, indent=2) + "\n").encode()


def _cards(inner: Sequence[str], there: Collection[str]) -> list[str]:
    """Where a card belongs: of one SAE among others in its folder, and as the repository's own if there is none."""
    if len(inner) > 1 or not inner[0]:
        return [_CARD]
    return [f"{inner[0]}/{_CARD}", *([] if _CARD in there else [_CARD])]


def _is_ours(api: Any, repo_id: str, path: str, revision: str | None) -> bool:
    """Whether saekit may write a card anew."""
    text = Path(api.hf_hub_download(repo_id, path, revision=revision)).read_text(encoding="utf-8", errors="replace")
    return MADE_BY_SAEKIT in text


def push_sae(
    sae: SAEModule, repo_id: str, *, folder: str = "", metrics: Mapping[str, Any] | None = None, **options: Any
) -> str:
    """:func:`push` of an SAE that is in memory."""
    from saekit.sae.folder import save_sae

    folder = folder.strip("/")
    check_repository(repo_id, folder)
    measured = _numbers({} if metrics is None else metrics)
    with tempfile.TemporaryDirectory(prefix="saekit-") as place:
        saved = save_sae(sae, Path(place) / "sae")
        card = CardSAE(folder=folder, config=read_config(saved), metrics=measured, shows_all=True)
        return push(repo_id, {folder: saved}, [card], **options)


def _numbers(metrics: object) -> dict[str, int | float]:
    """What a card shows of what somebody has measured; :class:`ConfigError` names what is no number."""
    if not isinstance(metrics, Mapping):
        raise ConfigError([("metrics", f"must be numbers by their names, such as {{'l0': 32}}, found {metrics!r}")])
    numbers: dict[str, int | float] = {}
    problems = []
    for name, value in metrics.items():
        if not isinstance(name, str) or not name.strip():
            problems.append(("metrics", f"must be numbers by their names, and {name!r} is no name"))
        elif isinstance(value, bool) or not isinstance(value, Real):
            problems.append((f"metrics.{name}", f"must be a number, found {value!r} ({type(value).__name__})"))
        else:
            numbers[name] = int(value) if isinstance(value, Integral) else float(value)
    if problems:
        raise ConfigError(problems)
    return numbers
