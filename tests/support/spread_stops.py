"""What the processes of :mod:`support.processes` do that is about checkpoints: runs that are stopped, and go on.

Run as a script (``FOLDER HOW RANK STEP``), it is one process of a run in which that of number ``RANK`` ends in the
middle of a step: ``killed`` by SIGKILL, or ``fails``.  With ``goes on``, it ends as it likes, and a run that is there
already is gone on with.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import sweeps
from support.recipes import Mixing
from support.spread_runs import manager, options
from support.sweeps import DOCUMENTS

import saekit
from saekit import SaekitError
from saekit.distributed import World
from saekit.errors import StorageError, TrainingInterrupted
from saekit.runs.state_files import StateFiles
from saekit.training.trainer import SAETrainer

CHANGES: dict[str, Any] = {
    "sae": {"name": "topk", "k": 3, "d_sae": 12, "dtype": "float64"},
    "training": {"dead_feature_window": 2, "feature_sampling_window": 3, "lr_warm_up_steps": 3},
    "checkpoints": {"name": "run", "keep_last": 2, "n_checkpoints": 4},
}


def settings(world: World, folder: str, **sections: Any) -> dict[str, Any]:
    sections = {**CHANGES, **sections, "distributed": {"features": world.features.size}}
    return options(Path(folder), **sections)


def quietly(work: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def weights(result: Any) -> dict[str, Any]:
    saved = saekit.SAE.load(result.folder / "sae")
    found = {name: value.detach().clone() for name, value in saved.state_dict().items()}
    return {"folder": str(result.folder), "weights": found, "metrics": dict(result.metrics)}


def whole(world: World, folder: str) -> dict[str, Any]:
    """A run that nobody stops."""
    return weights(quietly(lambda: saekit.train(settings(world, folder), plugins=manager(), dataset=DOCUMENTS)))


def stopped(world: World, folder: str, rank: int, at: int, **checkpoints: Any) -> dict[str, Any]:
    """A run whose process ``rank`` gets a SIGTERM in the middle of step ``at``; what each says of its end."""
    own = {"checkpoints": {**CHANGES["checkpoints"], **checkpoints}}
    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        if trainer.step + 1 == at and world.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(SAETrainer, "train_on", train_on)
        quietly(lambda: saekit.train(settings(world, folder, **own), plugins=manager(), dataset=DOCUMENTS))
    return {"text": str(caught.value), "signal": int(caught.value.signal), "run": str(caught.value.run)}


def by_recipe(world: World, folder: str) -> dict[str, Any]:
    """A run whose checkpoints hold a recipe, stopped and gone on with; then with another model on one process."""
    stopped(world, folder, 1, 5, buffer="recipe")
    run, own = f"{folder}/run", world.rank
    other = sweeps.manager(Mixing(factor=own))
    try:
        quietly(lambda: saekit.resume(run, plugins=other, dataset=DOCUMENTS))
        told = ""
    except SaekitError as error:
        told = str(error)
    return resumed(world, run) | {"told": told}


def resumed(world: World, run: str, *allow: str) -> dict[str, Any]:
    """The same run, gone on with on this arrangement of processes."""
    override = [f"distributed.features={world.features.size}"] if allow else []
    try:
        return weights(
            quietly(lambda: saekit.resume(run, overrides=override, allow=allow, plugins=manager(), dataset=DOCUMENTS))
        )
    except SaekitError as error:
        return {"error": str(error)}


def falls_back(world: World, run: str) -> dict[str, Any]:
    """The same run, gone on with, where the second process cannot use its part of the newest checkpoint."""
    work, newest = SAETrainer.load_state_dict, 5

    def load(trainer: SAETrainer, state: Any) -> None:
        if world.rank == 1 and state["step"] == newest:
            raise ValueError("not what it wrote")
        work(trainer, state)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(SAETrainer, "load_state_dict", load)
        found = weights(saekit.resume(run, plugins=manager(), dataset=DOCUMENTS))
    return found | {"told": [str(one.message) for one in caught]}


def full(world: World, folder: str) -> dict[str, Any]:
    """A run that the second process ends twice: its disk is full at its second checkpoint, and then a state is odd."""
    write, made, seen = StateFiles.write, StateFiles.of, Counter[str]()

    def comes(stem: str, number: int) -> bool:
        if world.rank == 1 and stem.startswith("stream"):
            seen["stream"] += 1
            return seen["stream"] == number
        return False

    def no_space(files: StateFiles, *rest: Any) -> Any:
        if comes(files.stem, 2):
            raise OSError(28, "No space left on device")
        return write(files, *rest)

    def odd(stem: str, state: Any) -> StateFiles:
        return made(stem, {"odd": object()} if comes(stem, 1) else state)

    def begin() -> Any:
        return saekit.train(settings(world, folder), plugins=manager(), dataset=DOCUMENTS)

    def go_on() -> Any:
        return saekit.resume(f"{folder}/run", plugins=manager(), dataset=DOCUMENTS)

    told = []
    for name, fault, work in (("write", no_space, begin), ("of", odd, go_on)):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError) as caught:
            patch.setattr(StateFiles, name, fault)
            quietly(work)
        told.append([str(caught.value), *caught.value.__notes__])
    return weights(quietly(go_on)) | {"told": told}


def other_text(world: World, folder: str) -> str:
    """What is said where processes read another text under the same name."""
    own = DOCUMENTS if not world.rank else [*DOCUMENTS[1:], DOCUMENTS[0]]
    try:
        quietly(lambda: saekit.train(settings(world, folder), plugins=manager(), dataset=own))
    except SaekitError as error:
        return str(error)
    return "nothing"


def unlike(world: World, folder: str) -> str:
    """What is said where processes have other configurations."""
    try:
        quietly(
            lambda: saekit.train(
                settings(world, folder, lr_schedule={"name": "cosine" if world.rank else "constant"}),
                plugins=manager(),
                dataset=DOCUMENTS,
            )
        )
    except SaekitError as error:
        return str(error)
    return "nothing"


def ends_at(rank: int, step: int, end: Any) -> Any:
    """Have process ``rank`` come to its ``end`` in the middle of a step."""
    work = SAETrainer.train_on

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        if trainer.step + 1 == step and int(os.environ["RANK"]) == rank:
            end()
        return work(trainer, *rest)

    SAETrainer.train_on = train_on  # type: ignore[method-assign]


def fails() -> None:
    raise ValueError("a fault of an architecture")


def trains(folder: Path, **sections: Any) -> None:
    saekit.train(options(folder, **CHANGES, **sections), plugins=manager(), dataset=DOCUMENTS)


def goes_on(folder: Path) -> None:
    """A longer run, as whoever finds it stopped starts it again."""
    if (folder / "run/run.json").exists():
        saekit.resume(folder / "run", plugins=manager(), dataset=DOCUMENTS)
        return
    many = {"training_tokens": 8000, "dead_feature_window": 2, "feature_sampling_window": 3}
    changes = {**CHANGES, "training": {**CHANGES["training"], **many}, "distributed": {"timeout_s": 60}}
    changes["checkpoints"] = {**CHANGES["checkpoints"], "n_checkpoints": 15}
    saekit.train(options(folder, **changes), plugins=manager(), dataset=DOCUMENTS)


def main(folder: str, how: str, rank: str, step: str) -> None:
    import torch

    torch.set_num_threads(1)
    ends = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "fails": fails}
    if how in ends:
        ends_at(int(rank), int(step), ends[how])
    begun = time.monotonic()
    try:
        quietly(lambda: goes_on(Path(folder)) if how == "goes on" else trains(Path(folder)))
    except Exception as error:
        print(error, *getattr(error, "__notes__", ()), f"{time.monotonic() - begun:.0f} s", sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
