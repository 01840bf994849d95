"""The command line in one of several processes, in which a fault comes: ``FAULT RANK STEP train RUN.toml ...``.

``FAULT`` is one of :data:`FAULTS`, which comes in process ``RANK`` alone, in the middle of step ``STEP``.  Before all
else, the variables ``PATH_0`` and ``WORDS_0`` give process 0 packages and words of its own, and so on.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from saekit.runs.state_files import StateFiles
from saekit.sae.folder import Contents
from saekit.training.trainer import SAETrainer


def _raises(trainer: SAETrainer) -> None:
    raise ValueError("a fault of an architecture")


def _not_a_number(trainer: SAETrainer) -> None:
    with torch.no_grad():
        next(iter(trainer.sae.parameters())).view(-1)[0] = float("nan")


def _signal(number: int) -> Callable[[SAETrainer], None]:
    return lambda trainer: os.kill(os.getpid(), number)


def _signals(trainer: SAETrainer) -> None:
    """One that its starter passes on, and that comes a second time."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def _full_disk(trainer: SAETrainer) -> None:
    """From now on, for all that this process writes of an SAE or a state."""

    def no_space(*rest: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for kind in (StateFiles, Contents):
        kind.write = no_space  # type: ignore[attr-defined]


FAULTS: dict[str, Callable[[SAETrainer], None]] = {
    "raises": _raises,
    "nan": _not_a_number,
    "killed": _signal(signal.SIGKILL),
    "terminated": _signal(signal.SIGTERM),
    "terminated often": _signals,
    "interrupted": _signal(signal.SIGINT),
    "stopped": _signal(signal.SIGSTOP),
    "full": _full_disk,
    "none": lambda trainer: None,
}


def main(fault: str, rank: str, step: str, *words: str) -> None:
    own = os.environ["RANK"]
    if path := os.environ.get(f"PATH_{own}"):
        sys.path.insert(0, path)
    from saekit.cli import main

    torch.set_num_threads(1)
    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        if trainer.step + 1 == int(step) and int(os.environ["RANK"]) == int(rank):
            FAULTS[fault](trainer)
        return work(trainer, *rest)

    SAETrainer.train_on = train_on  # type: ignore[method-assign]
    sys.argv = ["saekit", *words, *os.environ.get(f"WORDS_{own}", "").split()]
    main()


if __name__ == "__main__":
    main(*sys.argv[1:])
