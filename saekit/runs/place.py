"""Whether a folder is that of a run, which to see needs no plugins and no configuration."""

from __future__ import annotations

import os
from pathlib import Path

from saekit.errors import PlaceError

__all__ = ["RECORD", "check_is_run"]

RECORD = "run.json"
"""The file in the folder of every run."""


def check_is_run(folder: Path) -> None:
    """:class:`PlaceError` when ``folder`` is not there, or not a run's."""
    try:
        there = (folder / RECORD).is_file()
    except (OSError, ValueError) as error:  # a name that is too long, no permission, a null character
        raise PlaceError(f"the run folder {str(folder)!r} cannot be read: {error}") from error
    if there:
        return
    if os.path.lexists(folder / RECORD):
        raise PlaceError(f"{folder / RECORD} is not a file, so {folder} is not a run folder that can be gone on with")
    if not folder.exists():
        raise PlaceError(f"there is no folder {folder}; a run prints the name of its folder when it ends")
    if (folder / "runner_cfg.json").is_file():
        raise PlaceError(
            f"{folder} is not a run folder, but a checkpoint of sae-lens, with its runner_cfg.json. Its run cannot go "
            "on here, but one can start from its SAE: set from_pretrained_path to this folder in a copy of it, and "
            "`saekit convert-config COPY.json run.toml` makes a configuration of it (training.from_pretrained_path)"
        )
    near = sorted(found.parent.name for found in folder.glob(f"*/{RECORD}")) if folder.is_dir() else []
    hint = f" It holds the runs {', '.join(near)}." if near else ""
    raise PlaceError(f"{folder} is not a run folder: there is no {RECORD} in it.{hint}")
