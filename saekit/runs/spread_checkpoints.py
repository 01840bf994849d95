"""Checkpoints that several processes write together, each its part, and the state of an SAE made of such parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.distributed.agreement import agreed
from saekit.distributed.group import Group
from saekit.errors import StorageError
from saekit.files.mapped import is_mapped
from saekit.files.storage import new_folder, nothing, sync_files
from saekit.runs.checkpoints import Checkpoint, carry_over, check_place, finish_checkpoint
from saekit.runs.state_files import StateFiles
from saekit.sae.folder import Contents
from saekit.sae.module import SAEModule
from saekit.sae.parameters import ParameterTable
from saekit.sae.part_folder import PartContents, whole_in_first
from saekit.sae.taking import fill

__all__ = ["part_of_training", "training_of", "write_together"]


def write_together(
    group: Group,
    folder: Path,
    saes: Mapping[str, Contents | PartContents],
    states: Mapping[str, StateFiles],
    stream: StateFiles | None,
    facts: Mapping[str, Any] | None,
    go_on: Callable[[], None] = nothing,
) -> None:
    """Write what this process has of the checkpoint ``folder``, which all of ``group`` write at the same time.

    The first process makes the folder, and writes the manifest when the others' files are on the disk.  Where one
    fails, all do, by :class:`StorageError`, and what was there before is there still.  Without ``facts``, it is a
    folder to look at, with SAEs alone.
    """
    first = group.rank == 0
    with contextlib.ExitStack() as stack:

        def make() -> Path | None:
            if not first:
                return None
            check_place(folder)
            return stack.enter_context(new_folder(folder, go_on=go_on))

        temporary = agreed(group, make)[0]
        assert temporary is not None

        def write() -> dict[str, str]:
            sums = {} if stream is None else stream.write(temporary, go_on)
            for name in {*saes, *states}:
                (temporary / name).mkdir(exist_ok=True)
            for name, state in states.items():
                sums |= {f"{name}/{file}": summed for file, summed in state.write(temporary / name, go_on).items()}
            sync_files([temporary / file for file in sums])
            return sums

        def write_saes() -> dict[str, str]:
            sums: dict[str, str] = {}
            with whole_in_first(group, saes, go_on) as whole:
                for name, sae in whole.items():
                    sums |= {f"{name}/{file}": summed for file, summed in sae.write(temporary / name, go_on).items()}
            sync_files([temporary / file for file in sums])
            return sums

        written = [*agreed(group, write), *agreed(group, write_saes)]  # so that nobody waits for who has failed
        sums = {file: summed for part in written for file, summed in part.items()}

        def finish() -> None:
            if first and facts is not None:
                finish_checkpoint(folder, temporary, facts, sums)
            elif first:
                carry_over(folder, temporary)
            stack.close()

        agreed(group, finish)


# ---- one SAE's state, of which each process has some features


def training_of(checkpoint: Checkpoint, name: str, sae: SAEModule) -> dict[str, Any]:
    """The training state of an SAE, or of that part of its features which ``sae`` has, whatever parts were written.

    Of files of other parts, no more is read than belongs to this one.
    """
    share, (data, features) = sae.share, checkpoint.mesh
    numbers = range(features) if data * features > 1 else [None]
    if features == share.parts:
        own = numbers[share.features.rank]
        moments = checkpoint.moments(name, own, mapped=True)
        state = checkpoint.training(name, own, mapped=bool(moments))
        return part_of_training([state], sae.table, moments=[moments]) if moments else state
    states = [checkpoint.training(name, number, mapped=True) for number in numbers]
    every = [checkpoint.moments(name, number, mapped=True) for number in numbers]
    return part_of_training(states, sae.table, share.features.rank, share.parts, every)


def part_of_training(
    states: Sequence[Mapping[str, Any]],
    table: ParameterTable,
    number: int = 0,
    of: int = 1,
    moments: Sequence[Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Part ``number`` of ``of`` of an SAE's training state, in memory of its own.

    ``states`` are those of all parts as its features were split before, in their order, or the one of the whole; of
    each, ``moments`` are those parts of what the optimizer keeps that other processes kept, in their order.
    """

    def cut(values: Sequence[Tensor], axis: int) -> Tensor:
        own = sum(value.shape[axis] for value in values) // of
        shape = [own if dim == axis else n for dim, n in enumerate(values[0].shape)]
        found, at = torch.empty(shape, dtype=values[0].dtype, device="cpu"), -number * own
        for value in values:  # ``at`` is where it begins in what is wanted
            first, last = max(at, 0), min(at + value.shape[axis], own)
            if first < last:
                fill(found.narrow(axis, first, last - first), value.narrow(axis, first - at, last - first), alone=True)
            at += value.shape[axis]
        return found

    found = {**states[0], **_each(states, table, cut, moments or [[] for _ in states])}
    return {key: _owned(value) for key, value in found.items()}


def _are_of(parts: Sequence[object], axis: int, weights: Tensor) -> bool:
    """Whether ``parts`` make together, along ``axis``, what has the shape of ``weights``."""
    shapes = [list(part.shape) for part in parts if isinstance(part, Tensor) and part.ndim == weights.ndim]
    if not weights.ndim or len(shapes) != len(parts):
        return False
    along = sum(shape[axis] for shape in shapes)
    return all([*shape[:axis], along, *shape[axis + 1 :]] == list(weights.shape) for shape in shapes)


def _alike(what: str, parts: Sequence[Any]) -> Any:
    """What all have alike; :class:`StorageError` for what is neither that nor a part of a whole."""
    first = parts[0]
    if isinstance(first, Tensor):
        alike = all(isinstance(part, Tensor) and torch.equal(part, first) for part in parts) and not first.ndim
    else:
        alike = not isinstance(first, (Mapping, list)) and all(type(part) is type(first) for part in parts)
        alike = alike and all(part == first for part in parts)
    if not alike:
        raise StorageError(
            f"{what} in the state of the optimizer is not of the shape of its weights, and not one number that all "
            "processes have, so that its parts make no whole. An optimizer that keeps more must not say that it "
            "updates each number by itself (elementwise): go on with as many processes as before, or begin anew"
        )
    return first


def _owned(state: Any) -> Any:
    """``state`` without tensors that show a file."""
    if isinstance(state, Tensor):
        return state.clone() if is_mapped(state) else state
    if isinstance(state, Mapping):
        return {key: _owned(value) for key, value in state.items()}
    return [_owned(value) for value in state] if isinstance(state, list) else state


def _each(
    states: Sequence[Mapping[str, Any]],
    table: ParameterTable,
    made: Callable[[Sequence[Tensor], int], Tensor],
    moments: Sequence[Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """What is split of training states: weights, moments of their shape, and what is counted of each feature."""
    if states[0]["diverged"] is not None:
        return {}
    axes = {entry.name: entry.dims.index("d_sae") for entry in table if entry.split == "d_sae"}
    weights = {
        name: made([state["weights"][name] for state in states], axes[name]) if name in axes else value
        for name, value in states[0]["weights"].items()
    }
    firing = {
        name: made([state["firing"][name] for state in states], 0) if isinstance(value, Tensor) else value
        for name, value in states[0]["firing"].items()
    }
    optimizer = {}
    for name, kept in states[0]["optimizer"].items():
        every = [
            [part[name] for part in (state["optimizer"], *others) if name in part]
            for state, others in zip(states, moments, strict=True)
        ]
        like = states[0]["weights"].get(name)
        optimizer[name] = kept
        if name not in axes:
            continue
        if any(part.keys() != kept.keys() for parts in every for part in parts):
            raise StorageError(f"the parts of what the optimizer keeps of {name} are not of one optimizer")
        optimizer[name] = {
            key: made([part[key] for parts in every for part in parts], axes[name])
            if _are_of([part[key] for part in every[0]], axes[name], like)
            else _alike(f"{key} of {name}", [part[key] for parts in every for part in parts])
            for key in kept
        }
    return {"weights": weights, "firing": firing, "optimizer": optimizer}
