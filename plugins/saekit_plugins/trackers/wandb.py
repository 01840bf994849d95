"""Tracker ``wandb``: Weights & Biases."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import attrs

from saekit import Entry, RunInfo, hookimpl
from saekit.config import check
from saekit.files import hidden_name
from saekit.values import Histogram, Metrics, RunEnd

ID_FILE = "wandb-run-id.txt"
"""Holds the W&B run's id, in the run folder: a run that is resumed goes on in the same W&B run."""
BINS_AT_MOST = 512  # W&B refuses a histogram with more
_EXIT_CODES = {"finished": 0, "interrupted": 255, "diverged": 1, "failed": 1}  # 255 is W&B's own of Ctrl-C


@attrs.frozen(kw_only=True)
class WandbConfig:
    """Sends metrics and the configuration to Weights & Biases.

    What is not set here is as W&B's environment variables say (`WANDB_PROJECT`, `WANDB_MODE`, ...).
    """

    project: str | None = attrs.field(
        default=None, validator=check(lambda value: bool(value.strip()), "a project name")
    )
    """The project.  None: `WANDB_PROJECT`, else `saekit`."""
    entity: str | None = None
    """The user or team.  None: `WANDB_ENTITY`, else the account's default."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes into the run folder, without login or network; `wandb sync` sends it later.  None:
    `WANDB_MODE`, which may also be `disabled`, else `online`."""
    tags: tuple[str, ...] | None = None
    """Tags of the run.  None: `WANDB_TAGS`, else none."""
    log_checkpoints: bool = False
    """Upload the SAE of each checkpoint as an artifact."""


class WandbTracker:
    """One W&B run per SAE, also when several are trained at once."""

    def __init__(self, config: WandbConfig, run: RunInfo) -> None:
        import wandb

        run.file("wandb")  # where W&B itself writes
        run_id = _run_id(run.file(ID_FILE))
        self._wandb = wandb
        self._log_checkpoints = config.log_checkpoints
        self._exit_code: int | None = None
        # With the id, since a name may be used again elsewhere in the project.
        self._artifact_name = f"{re.sub('[^A-Za-z0-9_.-]', '-', run.name)[:100]}-{run_id}"
        mode: Any = config.mode or _environment("MODE") or "online"
        self._run = wandb.init(
            project=config.project or _environment("PROJECT") or "saekit",
            entity=config.entity or _environment("ENTITY"),
            name=_environment("NAME") or run.name,
            dir=_environment("DIR") or str(run.folder),
            config=dict(run.config),
            mode=mode,
            tags=_tags() if config.tags is None else list(config.tags),
            id=run_id,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings() if _environment("SILENT") else wandb.Settings(silent=True),
        )

    def log(self, metrics: Metrics, step: int) -> None:
        if step < self._run.starting_step:
            return  # the run was resumed: W&B has this step, and would drop it with a warning for each
        self._run.log({name: self._value(value) for name, value in metrics.items()}, step=step)

    def _value(self, value: float | Histogram) -> object:
        if not isinstance(value, Histogram):
            return value
        import numpy as np

        counts, edges = _coarser(value)
        return self._wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Upload ``folder``; W&B takes copies at once, so it may go when this returns."""
        if not self._log_checkpoints:
            return
        artifact = self._wandb.Artifact(self._artifact_name, type="model", metadata={"step": step})
        for file in sorted(folder.rglob("*")):  # not add_dir, which prints, whatever the settings
            if file.is_file():
                artifact.add_file(str(file), name=file.relative_to(folder).as_posix())
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])  # W&B adds "latest"

    def conclude(self, end: RunEnd) -> None:
        self._exit_code = _EXIT_CODES[end.status]

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)


def _environment(name: str) -> str | None:
    """What W&B's environment variable says, if it says anything."""
    return os.environ.get(f"WANDB_{name}", "").strip() or None


def _tags() -> list[str]:
    return [tag.strip() for tag in (_environment("TAGS") or "").split(",") if tag.strip()]


def _run_id(file: Path) -> str:
    """The stored id, or a new one, which is stored."""
    stored = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
    if stored and not re.fullmatch(r"[\w-]{1,128}", stored, re.ASCII):
        raise ValueError(f"{file} holds no id of a W&B run; remove it to begin a new one")
    if not stored:
        stored = secrets.token_hex(4)
        temporary = file.with_name(hidden_name(file.name, "tmp"))
        temporary.write_text(stored + "\n", encoding="utf-8")
        temporary.replace(file)
    return stored


def _coarser(histogram: Histogram) -> tuple[list[int], list[float]]:
    """Counts and edges, with neighboring bins taken together if there are too many for W&B."""
    n = len(histogram.counts)
    width = max(1, -(-n // BINS_AT_MOST))
    starts = [*range(0, n, width), n]
    counts = [sum(histogram.counts[first:last]) for first, last in pairwise(starts)]
    return counts, [histogram.edges[i] for i in starts]


@hookimpl
def saekit_register_trackers() -> Iterable[Entry]:
    yield Entry("wandb", WandbConfig, _build, requires=("wandb",), extra="wandb", summary="Weights & Biases")


def _build(config: WandbConfig, *, run: RunInfo) -> WandbTracker:
    return WandbTracker(config, run)
