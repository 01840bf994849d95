"""``saekit push``: the SAEs of a run, or a saved one, go to the Hub as they lie on the disk.  Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.errors import PlaceError
from saekit.files.names import SAE_CONFIG
from saekit.files.paths import folder_of
from saekit.pretrained.card import CardSAE
from saekit.pretrained.copying import copy_saved, read_config
from saekit.pretrained.pushing import check_repository, push
from saekit.reports.folder import RunFolder, SAERun, read_run
from saekit.reports.sweep import flat_options, summary_of
from saekit.runs.from_memory import OPTIONS
from saekit.runs.place import RECORD

if TYPE_CHECKING:
    from saekit.runs.results import SweepResult, TrainResult

__all__ = ["push_to_hub"]

_PRIVATE = ("trackers", "checkpoints")  # sections that are about this machine and its user


def push_to_hub(
    path: str | Path | TrainResult | SweepResult,
    repo_id: str,
    *,
    folder: str = "",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    probe: bool = True,
    preview: str | Path | None = None,
) -> str:
    """Put what a run has trained into one repository of the Hub, with a model card; the address of the commit.

    ``path`` is that of a run's folder, of a sweep's, whose SAEs each get a folder of their own, or of a saved SAE's; or
    it is what :func:`saekit.train` returned.  An SAE in memory has :meth:`saekit.SAE.push_to_hub`.
    ``folder`` is one in the repository, and the other options are those of :meth:`saekit.SAE.push_to_hub`, too.  The
    card says what the run has measured and how it was set up, without paths of this machine.  What is pushed is a copy
    in a temporary folder, which is compared with the checksums of ``cfg.json``; a run may go on meanwhile.

    With ``preview``, a new folder, nothing is sent: what would be in a new repository, the card among it, is written
    there, and the folder is what is returned.

    :class:`PlaceError` where there is no saved SAE, and :class:`SAEFormatError` for one that is not as it was saved.
    """
    place, folder = folder_of(path), folder.strip("/")
    check_repository(repo_id, folder)
    with tempfile.TemporaryDirectory(prefix="saekit-") as temporary:
        copies = Path(temporary)
        is_run = (place / RECORD).exists() or (place / "config.toml").is_file()
        found, columns = _of_run(read_run(place), folder, copies) if is_run else ([_alone(place, folder, copies)], [])
        return push(
            repo_id,
            {card.folder: saved for card, saved in found},
            [card for card, _ in found],
            columns=columns,
            private=private,
            revision=revision,
            message=commit_message,
            token=token,
            probe=probe,
            preview=preview,
        )


def _alone(saved: Path, folder: str, copies: Path) -> tuple[CardSAE, Path]:
    """A saved SAE; of what it is a part of a run, that says more."""
    home = saved.parent
    if saved.name == "sae" and (home / "config.toml").is_file():
        return _of_run(read_run(home), folder, copies)[0][0]
    copy = copy_saved(saved, copies / "0")
    return CardSAE(folder=folder, config=read_config(copy)), copy


def _of_run(run: RunFolder, folder: str, copies: Path) -> tuple[list[tuple[CardSAE, Path]], list[str]]:
    """The SAEs of a run that are whole, and the options in which they differ."""
    there = [sae for sae in run.saes.values() if (sae.home / "sae" / SAE_CONFIG).is_file()]
    if not there:
        raise PlaceError(f"{run.folder} holds no saved SAE: {run.state.text}")
    columns = list(summary_of(run).options) if run.sweep else []
    found = []
    for number, sae in enumerate(there):
        inner = "/".join(part for part in (folder, sae.home.name if run.sweep else "") if part)
        copy = copy_saved(sae.home / "sae", copies / str(number))
        found.append((_card(sae, inner, read_config(copy)), copy))
    return found, columns


def _card(sae: SAERun, inner: str, config: Mapping[str, Any]) -> CardSAE:
    unnamed = [OPTIONS[kind] for kind in (() if sae.record is None else sae.record.in_memory)]
    options = {
        path: value
        for path, value in flat_options(sae.options.table).items()
        if path.partition(".")[0] not in _PRIVATE and not isinstance(value, list) and path not in unnamed
    }
    latest = sae.history.latest
    return CardSAE(folder=inner, config=config, metrics=latest, options=options, tokens=round(sae.tokens))
