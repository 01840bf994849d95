"""What the processes of :mod:`support.processes` do that is about sweeps whose SAEs are laid out over them.

Run as a script, it is one process of the command line (``saekit ...``), or of a sweep whose process 1 is ``killed``.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import spread_runs, sweeps
from support.spread_stops import ends_at, quietly
from support.sweeps import DOCUMENTS

import saekit
from saekit import SaekitError
from saekit.distributed import World
from saekit.errors import TrainingInterrupted
from saekit.training.trainer import SAETrainer

MEMBERS: list[dict[str, Any]] = [
    {"sae": {"name": "topk", "k": 3, "d_sae": 12, "b_dec_init_method": "zeros"}},
    {"sae": {"d_sae": 20, "b_dec_init_method": "mean"},
     "activations": {"normalize_activations": "expected_average_only_in"}},
    {"sae": {"d_sae": 16}, "training": {"lr": 1e30}},  # diverges
    {"sae": {"d_sae": 10, "noise_scale": 0.1}, "training": {"train_batch_size_tokens": 100, "seed": 3}},
]  # fmt: skip
"""Of one lane but the last."""
SOURCE = {"name": "live", "store_batch_size_prompts": 3, "n_batches_in_buffer": 6}


def configs(
    folder: str, saes: int, members: list[dict[str, Any]] | None = None, **sections: Any
) -> list[dict[str, Any]]:
    common: dict[str, Any] = {
        "distributed": {"saes": saes},
        "checkpoints": {"name": "run", "keep_last": 2, "n_checkpoints": 2},
        "evals": {"every_n_steps": 3},
        "training": {"training_tokens": 1000},
    }
    found = []
    for member in MEMBERS if members is None else members:
        base = sweeps.fake(Path(folder), **sweeps.changed(common, {"activations": {"source": SOURCE}, **sections}))
        one = sweeps.changed(base, member)
        found.append(one)
    return found


def weights(sae: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in sae.state_dict().items()}


def told(result: Any) -> dict[str, Any]:
    """What a sweep leaves its caller."""
    return {
        "folder": str(result.folder),
        "saes": {
            name: {
                "weights": weights(one.sae),
                "saved": weights(saekit.SAE.load(one.folder / "sae")),
                "metrics": dict(one.metrics),
            }
            for name, one in result.results.items()
        },
        "diverged": dict(result.diverged),
        "summary": [dict(row) for row in result.summary],
    }


def alone(folder: str, **sections: Any) -> dict[str, Any]:
    """The same sweep, by one process."""
    return told(quietly(lambda: sweeps.train(configs(folder, 1, **sections), spread_runs.manager())))


def swept(world: World, folder: str, sections: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A sweep that nobody stops, laid out over all processes with the same rows, with the forwards that each made."""
    backend = sweeps.CountingBackend()
    try:
        result = quietly(lambda: sweeps.train(configs(folder, world.saes.size, **(sections or {})),
                                              sweeps.manager(backend)))  # fmt: skip
    except SaekitError as error:
        return {"error": str(error)}
    return told(result) | {"forwards": len(backend.seen)}


def stopped(world: World, folder: str, rank: int, at: int) -> dict[str, Any]:
    """A sweep whose process ``rank`` gets a SIGTERM in the middle of its step ``at``; what each says of its end."""
    work, made = SAETrainer.train_on, [0]

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        made[0] += 1
        if made[0] == at and world.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(SAETrainer, "train_on", train_on)
        quietly(lambda: sweeps.train(configs(folder, world.saes.size)))
    return {"text": str(caught.value), "signal": int(caught.value.signal)}


def resumed(world: World, run: str, *allow: str) -> dict[str, Any]:
    """The same sweep, gone on with as it was, or laid out over these processes."""
    override = [f"distributed.saes={world.saes.size}"] if allow else []
    return told(
        quietly(lambda: saekit.resume(run, overrides=override, allow=allow, plugins=sweeps.manager(),
                                      dataset=DOCUMENTS))
    )  # fmt: skip


def given(world: World, folder: str, source: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    """A sweep on a source of :mod:`support.spread_runs`, in float64."""
    sections = on(source)
    try:
        return told(
            quietly(lambda: sweeps.train(configs(folder, world.saes.size, members, **sections), spread_runs.manager()))
        )
    except SaekitError as error:
        return {"error": str(error)}


def on(source: str) -> dict[str, Any]:
    """Five batches of it."""
    return {
        "activations": {"source": {"name": source}},
        "evals": {"run": [], "every_n_steps": 0},
        "sae": {"dtype": "float64"},
        "dataset": {"on_exhausted": "stop"},
    }


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    if words[0] == "killed":
        ends_at(1, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            quietly(lambda: sweeps.train(configs(words[1], 2, MEMBERS[:2], checkpoints={"n_checkpoints": 6})))
        except SaekitError as error:
            print(error, *getattr(error, "__notes__", ()), sep="\n")
            sys.exit(1)
        return
    from saekit.cli import main as command

    sys.argv = ["saekit", *words]
    warnings.simplefilter("ignore")
    command()


if __name__ == "__main__":
    main(sys.argv[1:])
