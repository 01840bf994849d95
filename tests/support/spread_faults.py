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
from pathlib import Path
from typing import Any

import torch
from support.processes import ended

from saekit.runs import run, saving
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


def _slow_disk(trainer: SAETrainer) -> None:
    """A state, and an SAE, take longer than ``distributed.timeout_s`` to be written."""

    def slowly(write: Callable[..., Any]) -> Callable[..., Any]:
        pauses = [5.0]

        def written(*rest: Any, **options: Any) -> Any:
            time.sleep(pauses.pop() if pauses else 0)
            return write(*rest, **options)

        return written

    for kind in (StateFiles, Contents):
        kind.write = slowly(kind.write)  # type: ignore[attr-defined]


def _slow_and_terminated(trainer: SAETrainer) -> None:
    _slow_disk(trainer)
    os.kill(os.getpid(), signal.SIGTERM)


def _raises_while_writing(trainer: SAETrainer) -> None:
    """In a step after it, while a checkpoint is still being written."""
    _slow_disk(trainer)
    begin = saving.Saving._begin

    def begun(*rest: Any, **options: Any) -> Any:
        found = begin(*rest, **options)
        SAETrainer.train_on = lambda *rest: _raises(trainer)  # type: ignore[method-assign, assignment, return-value]
        return found

    saving.Saving._begin = begun  # type: ignore[method-assign]


def _no_memory(trainer: SAETrainer) -> None:
    """For what is saved: other processes wait for this one's part of it then."""

    def folded(*rest: Any) -> Any:
        raise MemoryError("no room for the whole")

    SAETrainer.raw_sae = SAETrainer.raw_part = folded  # type: ignore[method-assign]


def _no_folder(trainer: SAETrainer) -> None:
    Path(os.environ["RUN"]).rename(os.environ["RUN"] + "-away")


def _terminated_in(name: str) -> Callable[[SAETrainer], None]:
    """A signal comes when ``saekit.runs.run`` does that."""

    def fault(trainer: SAETrainer) -> None:
        work = getattr(run, name)

        def interrupted(*rest: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return work(*rest)

        setattr(run, name, interrupted)

    return fault


def _odd_metrics(trainer: SAETrainer) -> None:
    """Of one process alone."""
    work = type(trainer.sae).training_step

    def step(sae: Any, *rest: Any) -> Any:
        return (found := work(sae, *rest))._replace(metrics={**found.metrics, "metrics/mine": found.loss})

    type(trainer.sae).training_step = step  # type: ignore[method-assign]


def _no_peek() -> None:
    """No activations to begin with."""

    def peek(source: Any) -> Any:
        raise ValueError("a fault of a source")

    from saekit.runs.supervised import SupervisedSource

    made = SupervisedSource.__init__

    def init(supervised: Any, source: Any, *rest: Any, **named: Any) -> None:
        type(source).peek = peek
        made(supervised, source, *rest, **named)

    SupervisedSource.__init__ = init  # type: ignore[method-assign]


TIMEOUT = 120  # seconds
TOY = """
site = {hook_name = "site_0"}
model = {backend = "none"}
evals = {run = [], held_out_every = 0}
activations = {source = {name = "toy", directions = "random"}}
sae = {name = "topk", k = 4, d_sae = 16, b_dec_init_method = "zeros"}
training = {training_tokens = 640, train_batch_size_tokens = 64, device = "cpu", verbose = false}
reports = {pictures = false}
checkpoints = {name = "run", n_checkpoints = 4}
"""


def _slow_to_tidy() -> None:
    """What is half written in the run folder stays for a while."""
    from saekit.runs import resuming

    work = resuming.tidy

    def tidy(*rest: Any) -> None:
        time.sleep(1)
        work(*rest)

    resuming.tidy = tidy


BEFORE: dict[str, Callable[[], None]] = {"no peek": _no_peek, "slow to tidy": _slow_to_tidy}
"""Those that come before all else."""

FAULTS: dict[str, Callable[[SAETrainer], None]] = {
    "raises": _raises,
    "nan": _not_a_number,
    "killed": _signal(signal.SIGKILL),
    "terminated": _signal(signal.SIGTERM),
    "terminated often": _signals,
    "interrupted": _signal(signal.SIGINT),
    "stopped": _signal(signal.SIGSTOP),
    "full": _full_disk,
    "slow": _slow_disk,
    "slow and terminated": _slow_and_terminated,
    "raises while writing": _raises_while_writing,
    "no memory": _no_memory,
    "no folder": _no_folder,
    "terminated in saving": _terminated_in("save_saes"),
    "terminated in evals": _terminated_in("evaluate"),
    "odd metrics": _odd_metrics,
    "none": lambda trainer: None,
}


def ends(
    folder: Path, fault: str, rank: int = 1, *words: str, step: int = 6, **environment: str
) -> list[tuple[int, str]]:
    """Exit code and output of both processes of ten steps, in the sixth of which the ``fault`` comes."""
    (folder / "run.toml").write_text(TOY)
    new = [str(folder / "run.toml"), f"checkpoints.folder={folder}"]
    command = [fault, str(rank), str(step), "train", *(() if "--resume" in words else new), *words]
    return ended(2, [__file__, *command], TIMEOUT, **{"TORCHRUN": "30", **environment})


def main(fault: str, rank: str, step: str, *words: str) -> None:
    own = os.environ["RANK"]
    if path := os.environ.get(f"PATH_{own}"):
        sys.path.insert(0, path)
    from saekit.cli import main

    torch.set_num_threads(1)
    if own == rank:
        BEFORE.get(fault, lambda: None)()
    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        if trainer.step + 1 == int(step) and int(os.environ["RANK"]) == int(rank):
            FAULTS.get(fault, lambda trainer: None)(trainer)
        return work(trainer, *rest)

    SAETrainer.train_on = train_on  # type: ignore[method-assign]
    sys.argv = ["saekit", *words, *os.environ.get(f"WORDS_{own}", "").split()]
    main()


if __name__ == "__main__":
    main(*sys.argv[1:])
