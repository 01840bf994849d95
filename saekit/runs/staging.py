"""A checkpoint as it waits for the disk: a copy of all that changes, so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.runs.checkpoints import STREAM, TRAINING
from saekit.runs.state_files import StateFiles
from saekit.sae.folder import Contents, contents_of
from saekit.training.trainer import SAETrainer

__all__ = ["Staging"]


class Staging:
    """Copies states into memory of the CPU that nobody else writes to.

    From a GPU they come by pinned memory and without waiting: :meth:`arrived` waits for them, before they are read.
    """

    def __init__(self) -> None:
        self._devices: set[torch.device] = set()

    def sae(self, trainer: SAETrainer) -> Contents:
        """What the folder of the SAE will hold; :class:`SAEFormatError` for one that could not be loaded again."""
        contents = contents_of(trainer.raw_sae())
        if not trainer.as_saved or torch.device(trainer.device).type != "cpu":  # a copy already
            return contents
        return attrs.evolve(contents, tensors=self.held(contents.tensors))

    def training(self, trainer: SAETrainer) -> StateFiles:
        """The training state, without the weights where the SAE as it is saved has the very same.

        :class:`StorageError` for what cannot be saved.
        """
        state = trainer.state_dict()
        if trainer.as_saved and trainer.sae.saved_as_it_is and not list(trainer.sae.buffers()):
            state.pop("weights", None)
        return StateFiles.of(TRAINING, self.held(state))

    def stream(self, state: Mapping[str, Any]) -> StateFiles:
        """The ``state`` of the batches, whose tensors are copies already."""
        return StateFiles.of(STREAM, state)

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
            return value.clone()
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
