"""A checkpoint as it waits for the disk: a copy of all that changes, so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.config.files import plain_config
from saekit.distributed.world import World
from saekit.errors import LostProcessError
from saekit.runs.checkpoints import MOMENTS, STREAM, TRAINING, versions
from saekit.runs.session import Session
from saekit.runs.spread_saes import contents_in
from saekit.runs.state_files import StateFiles, UnsavableError
from saekit.runs.supervised import SupervisedSource
from saekit.sae.folder import Contents
from saekit.sae.part_folder import PartContents
from saekit.training.loop import Lane
from saekit.training.trainer import SAETrainer

__all__ = ["Staging", "facts_of"]


class Staging:
    """Copies states into memory of the CPU that nobody else writes to.

    From a GPU they come by pinned memory and without waiting: :meth:`arrived` waits for them, before they are read.
    """

    def __init__(self, *, changes: bool = True) -> None:
        """``changes`` off: the states stay as they are until they are on the disk, and are not copied on the CPU."""
        self._devices: set[torch.device] = set()
        self._changes = changes

    def saes(self, worth: Mapping[str, SAETrainer]) -> dict[str, Contents | PartContents]:
        """What the folders of these SAEs will hold, as far as it is for this process to write or to hand over.

        :class:`SAEFormatError` for one that could not be loaded again.
        """
        found: dict[str, Contents | PartContents] = {}
        failure: Exception | None = None
        for name, trainer in worth.items():
            try:
                contents = contents_in(trainer)
            except LostProcessError:
                raise
            except Exception as error:  # told when the others need no more of this process
                failure = error
                continue
            if contents is not None:
                found[name] = self._kept(contents, trainer)
        if failure is not None:
            raise failure
        return found

    def _kept(self, contents: Contents | PartContents, trainer: SAETrainer) -> Contents | PartContents:
        """``contents`` with copies of what is the trained SAE's own."""
        by_parts = isinstance(contents, PartContents)
        copied = not trainer.as_saved or (trainer.sae.share.parts > 1 and not by_parts)
        if copied or torch.device(trainer.device).type != "cpu":
            return contents
        return attrs.evolve(contents, tensors=self.held(contents.tensors))

    def trainings(self, session: Session) -> dict[str, StateFiles]:
        """Of each SAE the training state, as far as it is for this process to write.

        It is without the weights where the SAE as it is saved has the very same.  Of processes with the same features
        the first writes it, and the others what they alone keep of the optimizer.  :class:`StorageError` for what
        cannot be saved.
        """
        world = session.world.column
        stem = TRAINING if world.size == 1 else f"{TRAINING}-{world.features.rank}"
        found = {}
        for name, member in session.members.items():
            if not member.here:
                continue
            trainer = member.trainer
            if world.data.rank:
                if trainer.diverged is None and (moments := trainer.optimizer.parted_state()):
                    place = f"{MOMENTS}-{world.features.rank}-{world.data.rank}"
                    found[name] = StateFiles.of(place, self.held({"optimizer": moments}))
                continue
            state = trainer.state_dict()
            if world.size == 1 and trainer.as_saved and trainer.sae.saved_as_it_is and not list(trainer.sae.buffers()):
                state.pop("weights", None)
            found[name] = StateFiles.of(stem, self.held(state))
        return found

    def stream(self, state: Mapping[str, Any], world: World, lanes: Sequence[Lane] = ()) -> StateFiles:
        """The ``state`` of this process's batches, whose tensors are copies already; ``world`` reads them with it.

        What of it a source of the ``lanes`` has given and cannot be saved is its plugin's fault.
        """
        stem = STREAM if world.size == 1 else f"{STREAM}-{world.rank}"
        try:
            return StateFiles.of(stem, state)
        except UnsavableError as error:
            for number, lane in enumerate(lanes):
                own = getattr(lane.source, "own", lane.source)
                if isinstance(own, SupervisedSource):
                    fault = own.blamed_for(error, f"{stem}/lanes/{number}/source")
                    if fault is not error:
                        raise fault from error
            raise

    def held(self, state: Any) -> Any:
        """``state`` with copies of its tensors; whatever cannot be saved stays what it is, and is refused later."""
        if isinstance(state, Tensor):
            return self._copy(state)
        if isinstance(state, Mapping):
            return {key: self.held(value) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return [self.held(value) for value in state]
        return state

    def _copy(self, value: Tensor) -> Tensor:
        value = value.detach()
        if value.is_meta or value.layout != torch.strided:
            return value
        value = value.resolve_conj().resolve_neg()
        if value.device.type == "cpu":
            return value.clone() if self._changes else value
        if value.device.type != "cuda":
            return value.cpu()
        self._devices.add(value.device)
        # In the order of memory that it has there, so that nothing is turned on the way.
        target = torch.empty_like(value, device="cpu", pin_memory=True)
        return target.copy_(value, non_blocking=True)

    def arrived(self) -> Callable[[], None]:
        """All that is copied from here on comes too late; what is returned waits until the copies are there."""
        events = []
        for device in self._devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait


def facts_of(session: Session, *, spaced: bool) -> dict[str, object]:
    """What the manifest of a checkpoint says of ``session`` as it is now."""
    about = {
        name: {
            "step": member.trainer.step,
            "tokens": member.trainer.tokens,
            "diverged": member.trainer.diverged,
            "d_sae": member.trainer.d_sae,
            "config": _config(member.config, session),
        }
        for name, member in session.members.items()
    }
    world = session.world.column
    mesh = {"mesh": [world.data.size, world.features.size]} if world.size > 1 else {}
    return {
        "batches": session.batches,
        "finished": False,
        "spaced": spaced,
        **mesh,
        "saes": about,
        "identity": dict(session.identity),
        "versions": versions(),
    }


def _config(config: TrainConfig, session: Session) -> dict[str, object]:
    """The configuration as plain data, without where the run lies: it may be moved."""
    table = plain_config(config, session.plugins)
    for option in ("folder", "name"):
        table["checkpoints"].pop(option)
    return table
