"""The memory and the disk that a run takes, and whether there is as much."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import attrs

from saekit.evals.pieces import at_once
from saekit.runs.timing import bytes_text
from saekit.sae.module import SAEModule

__all__ = [
    "Memory",
    "Need",
    "Of",
    "Verdict",
    "eval_bytes",
    "free_disk",
    "process_text",
    "standing_place",
    "verdict",
]


class Of(StrEnum):
    """What memory is for."""

    MODEL = "the model"
    SAE = "the SAE in training"
    SAES = "the SAEs in training"
    BUFFER = "the buffer of activations"
    KEPT = "forwards that wait for other SAEs"
    FORWARD = "running the model"
    STEP = "a training step"
    EVALS = "evals"
    CHECKPOINT = "writing a checkpoint"
    SAVING = "saving at the end"
    LOADING = "loading the model"
    WHOLE = "the whole SAE, to draw its weights"
    LIBRARIES = "Python's libraries"
    TOKENIZING = "processes that tokenize"


_LESS = {
    Of.MODEL: "choose model.dtype=bfloat16, or a smaller model",
    Of.SAE: "choose fewer features (sae.d_sae)",
    Of.SAES: "train fewer at a time, have several processes train some each (distributed.saes), or choose fewer "
    "features",
    Of.BUFFER: "lower activations.source.n_batches_in_buffer",
    Of.KEPT: "give SAEs the same seed, batch size and activations.source, so that they share batches, or lower "
    "activations.source.n_batches_in_buffer",
    Of.FORWARD: "lower activations.source.store_batch_size_prompts",
    Of.STEP: "lower training.train_batch_size_tokens",
    Of.EVALS: "lower batch_size_prompts of what evals.run names",
    Of.CHECKPOINT: "lower activations.source.n_batches_in_buffer, or set checkpoints.keep_last=0",
    Of.SAVING: "lower activations.source.n_batches_in_buffer, or set checkpoints.keep_last=0",
    Of.LOADING: "choose model.dtype=bfloat16, or a smaller model",
    Of.WHOLE: "choose fewer features (sae.d_sae)",
    Of.LIBRARIES: "end other programs, or choose a machine with more memory",
    Of.TOKENIZING: "choose fewer of them (tokenize_processes of activations.source)",
}
"""What to do where something takes too much."""

_EVALS = 6
"""Tensors of features of a piece that evals have at one time: measured, see docs/recipes.md."""


@attrs.frozen
class Need:
    """Memory for one thing."""

    what: Of
    device: str
    size: float


@attrs.frozen
class Memory:
    """What a run needs on every device: what it holds from beginning to end, and the work that it does in turns."""

    held: Sequence[Need]
    turns: Sequence[Sequence[Need]]
    """What is needed at one time beside what is held: for steps, for evals; beside each, the copy of what is being
    written as a checkpoint."""
    before: Sequence[Need] = ()
    """What is needed at one time when nothing of this is held yet."""

    @property
    def devices(self) -> list[str]:
        """In the order in which they are named first."""
        return list(
            dict.fromkeys(need.device for needs in (self.held, *self.turns, self.before) for need in needs if need.size)
        )

    def on(self, device: str) -> list[Need]:
        """What is needed there when most is: what is held, and the greatest of the turns; or what comes before it."""
        most = max(self.turns, key=lambda turn: sum(_at(turn, device)), default=())
        later = [need for need in (*self.held, *most) if need.device == device and need.size]
        first = [need for need in self.before if need.device == device and need.size]
        return max(later, first, key=lambda needs: sum(need.size for need in needs))

    def without(self, what: Of) -> Memory:
        """The same without ``what``."""
        turns = [[need for need in turn if need.what != what] for turn in self.turns]
        return attrs.evolve(self, turns=turns)

    def beside(self, libraries: float, tokenizing: float) -> Memory:
        """The same with so many bytes more, all the time, of what is no tensor."""
        more = [Need(Of.LIBRARIES, "cpu", libraries), Need(Of.TOKENIZING, "cpu", tokenizing)]
        libraries_first = [*self.before, more[0]] if self.before else self.before
        return attrs.evolve(self, held=[*self.held, *more], before=libraries_first)

    def needed(self) -> dict[str, float]:
        """Bytes, by device."""
        return {device: sum(need.size for need in self.on(device)) for device in self.devices}

    def facts(self, free: Mapping[str, float]) -> dict[str, str]:
        """In words: for each device what is needed there, and of what.  ``free`` are bytes, where they are known."""
        return {
            f"memory on {device}": f"{bytes_text(size)} ({_parts(self.on(device))})" + _free(free.get(device))
            for device, size in self.needed().items()
        }

    def greatest(self, device: str) -> Of:
        """What needs most there."""
        return max(self.on(device), key=lambda need: need.size).what

    def lacking(self, free: Mapping[str, float]) -> list[str]:
        """The devices that have less than is needed."""
        return [device for device, size in self.needed().items() if size > free.get(device, float("inf"))]


def _at(needs: Sequence[Need], device: str) -> Iterator[float]:
    return (need.size for need in needs if need.device == device)


def _parts(needs: Sequence[Need]) -> str:
    return ", ".join(f"{need.what} {bytes_text(need.size)}" for need in needs)


def _free(size: float | None) -> str:
    return "" if size is None else f"; {bytes_text(size)} are free"


def process_text(tensors: float, libraries: float) -> str:
    """Of a process that has so many bytes of tensors on the CPU, and of Python and its libraries, the whole."""
    return (
        f"about {bytes_text(tensors + libraries)}: {bytes_text(tensors)} of memory on cpu, and {bytes_text(libraries)} "
        "of Python and its libraries"
    )


def free_disk(folder: str) -> int:
    """Bytes that are free where ``folder`` is, or would be made."""
    return shutil.disk_usage(standing_place(folder)).free


def standing_place(folder: str) -> Path:
    """``folder``, or the nearest of those around it that is there."""
    place = Path(folder).absolute()
    return next(parent for parent in (place, *place.parents) if parent.exists())


def eval_bytes(sae: SAEModule, rows: int) -> int:
    """About what the features of ``rows`` rows take in evals, which go through them in pieces."""
    return _EVALS * min(rows, at_once(sae)) * sae.d_sae * sae.dtype.itemsize


@attrs.frozen
class Verdict:
    """Whether a run fits."""

    text: str
    fits: bool | None = None
    """None: that is not known."""
    warnings: Sequence[str] = ()


def verdict(memory: Memory, disk: float, free: Mapping[str, float], free_on_disk: float, processes: int = 1) -> Verdict:
    """For a run that needs ``memory`` in each of its ``processes``, and ``disk``, where so much is ``free``."""
    needed, warnings = memory.needed(), []
    for device in (lacking := memory.lacking(free)):
        warnings.append(
            f"about {bytes_text(needed[device])} are needed on {device}, and {bytes_text(free[device])} are free: "
            + _LESS[memory.greatest(device)]
        )
    if disk > free_on_disk:
        warnings.append(
            f"about {bytes_text(disk)} of disk are needed, and {bytes_text(free_on_disk)} are free "
            "(checkpoints.folder): lower checkpoints.keep_last"
        )
    parts = [
        f"{bytes_text(size)}{' of memory' * (number == 0)} on {device} ({_of(free.get(device))})"
        for number, (device, size) in enumerate(needed.items())
    ]
    needs = f"about {', '.join(parts)} and {bytes_text(disk)} of disk ({_of(free_on_disk)})"
    if processes > 1:
        needs += f", each of {processes} processes; those that share a device need so many times as much of it"
    if warnings:
        where = [f"on {device}" for device in lacking] + (["on disk"] if disk > free_on_disk else [])
        return Verdict(f"It does not fit {' and '.join(where)}: it needs {needs}.", False, warnings)
    if set(needed) <= set(free):
        return Verdict(f"It fits: it needs {needs}.", True)
    return Verdict(f"It needs {needs}.")


def _of(free: float | None) -> str:
    return "not on this machine" if free is None else f"{bytes_text(free)} are free"
