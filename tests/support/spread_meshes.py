"""What the processes of :mod:`support.processes` do that is about going on with more of them, or fewer."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.caches import FAKE_RUN
from support.spread_runs import SeededSource, options
from support.spread_stops import quietly
from support.sweeps import DOCUMENTS
from support.sweeps import manager as plain_manager

import saekit
from saekit import Entry, SaekitError
from saekit.distributed import World
from saekit.errors import TrainingInterrupted
from saekit.runs.session import Session
from saekit.runs.staging import Staging
from saekit.testing import FakeConfig
from saekit.testing.fakes import plugin_of
from saekit.training.trainer import SAETrainer

ROWS, STEPS = 96, 16
"""Of a batch, and of a run on given rows."""
TEXT = DOCUMENTS[:12]


class Alike(SeededSource):
    """Draws every row in each process, and goes on where it was."""

    def __init__(self, config: Any, stream: Any) -> None:
        super().__init__(config, stream)
        self._left = STEPS

    def state_dict(self) -> dict[str, Any]:
        return {"left": self._left, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self._left = state["left"]
        self._generator.set_state(state["generator"])


class Apart(Alike):
    """Says that it gives each process rows of its own, and no more."""

    shares_rows = True

    def __init__(self, config: Any, stream: Any) -> None:
        super().__init__(config, stream.own)


@attrs.frozen(kw_only=True)
class ApartConfig:
    """No options."""


def manager() -> saekit.PluginManager:
    strangers = Entry("alike", FakeConfig, Alike), Entry("apart", ApartConfig, Apart)
    return plain_manager(None, plugin_of("activation_sources", *strangers))


def settings(folder: Path, source: str) -> dict[str, Any]:
    """A run whose every part changes from step to step; of ``live``, on all of a text, else on so many rows."""
    chosen: dict[str, Any] = {"name": source}
    sections: dict[str, Any] = {"evals": {"held_out_every": 0, "run": []}}
    tokens = ROWS * STEPS
    if source == "live":
        chosen |= {"store_batch_size_prompts": 4, "n_batches_in_buffer": 4, "prefetch": False}
        sections["dataset"] = {"on_exhausted": "stop"}
        tokens = 10**6
    elif source == "toy":
        chosen |= {"n_features": 9, "n_hidden": 8, "directions": "random"}
        sections["model"] = {"backend": "none"}
    elif source == "cached":
        chosen |= {"folder": str(folder / "cache")}
        sections |= {name: FAKE_RUN[name] for name in ("evals", "site")}
    return options(
        folder,
        activations={"source": chosen},
        sae={"name": "standard", "d_sae": 12, "dtype": "float64", "noise_scale": 0.1, "use_ghost_grads": True},
        training={
            "training_tokens": tokens, "train_batch_size_tokens": ROWS, "dead_feature_window": 2,
            "feature_sampling_window": 3, "lr_warm_up_steps": 3,
        },
        checkpoints={"name": source, "keep_last": 2},
        **sections,
    )  # fmt: skip


def leg(
    world: World, folder: str, source: str, stop: int | None = None, allow: Any = ("distributed",)
) -> dict[str, Any]:
    """Begin the run of a ``source``, or go on with it if there is one, to its end or until step ``stop``.

    What it has served on this process, and the state that it began with.
    """
    found: dict[str, Any] = {"served": Counter(), "state": None}
    work, load = SAETrainer.train_on, Session.load_state

    def train_on(trainer: SAETrainer, *rest: Any) -> Any:
        if trainer.step + 1 == stop and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        made, batch = work(trainer, *rest), rest[-1]
        if source == "live" and not world.features.rank:
            found["served"].update(zip(batch.documents.tolist(), batch.tokens.tolist(), strict=True))
        return made

    def load_state(session: Session, *rest: Any) -> None:
        load(session, *rest)
        found["state"] = Staging().held(session.members["sae"].trainer.state_dict())

    home = Path(folder) / source
    spread = [f"distributed.features={world.features.size}"]
    given: dict[str, Any] = {"plugins": manager()} | ({} if source == "toy" else {"dataset": TEXT})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAETrainer, "train_on", train_on)
        patch.setattr(Session, "load_state", load_state)
        try:
            if home.exists():
                result = quietly(lambda: saekit.resume(home, overrides=spread, allow=allow, **given))
            else:
                config = settings(Path(folder), source) | {"distributed": {"features": world.features.size}}
                result = quietly(lambda: saekit.train(config, **given))
        except TrainingInterrupted as end:
            return found | {"checkpoint": str(end.checkpoint)}
        except SaekitError as error:
            return found | {"error": str(error)}
    return found | {"weights": {name: value.detach().clone() for name, value in result.sae.state_dict().items()}}
