"""A plan of many processes, made in one: what each has and sends, and how to arrange them."""

from __future__ import annotations

import os
from collections.abc import Callable

import attrs

from saekit.config import TrainConfig
from saekit.distributed.costs import Job, Mesh, advised
from saekit.distributed.group import Group
from saekit.distributed.launched import Launched, check_mesh
from saekit.distributed.world import ALONE, World
from saekit.errors import ConfigError
from saekit.runs.timing import bytes_text
from saekit.sae.module import SAEModule
from saekit.sae.splitting import check_spread

__all__ = ["advice", "facts_of_layout", "facts_of_mesh", "in_step", "mesh_text", "planned_world"]

_MANY = 512
"""Parts of features up to which a mesh is looked for."""


class _Absent(Group):
    """A group whose other processes are not there: who asks hears what it has said itself."""

    def __init__(self, size: int) -> None:
        self.size = size


def planned_world(config: TrainConfig) -> World:
    """The first process of those that ``config`` is for, without the others.

    Steps on it take as long as on one of them, less what messages take; what they compute is nothing.
    """
    launched = Launched.here(os.environ)
    asked = config.distributed
    width = max(asked.features, asked.saes)
    data, width = (asked.data or 1, width) if launched.size == 1 else check_mesh(asked, launched)
    if data * width == 1:
        return ALONE
    every, rows, others = _Absent(data * width), _Absent(data), _Absent(width)
    if asked.saes > 1:
        return World(every, rows, behind=every, saes=others)
    return World(every, rows, others, every)


def in_step(config: TrainConfig, world: World) -> TrainConfig:
    """``config`` with the rows that one process trains on in a step."""
    rows = config.training.train_batch_size_tokens
    if world.data.size == 1 or rows % world.data.size:
        return config
    return attrs.evolve(config, training=attrs.evolve(config.training, train_batch_size_tokens=rows // world.data.size))


def mesh_text(mesh: Mesh) -> str:
    """Its arrangement, in words."""
    return f"{mesh.data} × {mesh.features} (data × features)"


def facts_of_mesh(job: Job, mesh: Mesh) -> dict[str, str]:
    """What each process of ``mesh`` has and sends."""
    if mesh.size == 1:
        return {}
    rows, own = job.rows // mesh.data, job.d_sae // mesh.features
    told = ", ".join(f"{message.what} {bytes_text(message.size)}" for message in job.messages(mesh))
    return {
        "processes": (
            f"{mesh.size}, {mesh_text(mesh)}: in each step, each has {rows:,} of {job.rows:,} rows and {own:,} of "
            f"{job.d_sae:,} features"
        ),
        "messages": f"each sends about {bytes_text(job.sent_bytes(mesh))} in each step, of {told}",
    }


def facts_of_layout(job: Job, world: World, numbers: int, here: int = 1, saes: int = 1) -> dict[str, str]:
    """What there is to know where ``saes`` are laid out over processes, and what is told is of one that has so many of
    them ``here``; or of one SAE of those.  Batches, of all lanes, have so many ``numbers``."""
    parts = world.saes.size
    if parts == 1:
        return {}
    own = "for one SAE" if saes == 1 else f"that trains {here} of {saes} SAEs; none has more weights to train"
    facts = f"{world.size} processes, those with the same rows in {parts} parts: this is what one takes {own}"
    if job.gathers_rows:
        sent = 4 * numbers / world.size
        facts += f", and each sends its {bytes_text(sent)} of each batch to {parts - 1} more"
    return {"sweep": facts}


def advice(sae: SAEModule, job: Job, mesh: Mesh, free: float | None, device: str) -> str:
    """Which mesh is best for a whole ``sae`` where ``device`` of each process has so many bytes ``free``, and why."""

    def possible(one: Mesh) -> bool:
        try:
            check_spread(sae, one.data, one.features)
        except ConfigError:
            return False
        return True

    if free is None:
        return ""
    best = advised(job, mesh.size, possible, free)
    if best is None:
        return _larger(job, possible, free, device)
    if mesh.size == 1:
        return ""
    start = f"torchrun --nproc-per-node {mesh.size} ... distributed.features={best.features}"
    why = f"of all grids that fit, each process sends least on it, {bytes_text(job.sent_bytes(best))} in each step"
    if best != mesh:
        fits = job.bytes(mesh) <= free
        why += f", and {bytes_text(job.sent_bytes(mesh))} as it is" if fits else "; as it is, it does not fit"
    return f"{mesh_text(best)}{', as it is' if best == mesh else f': {start}'}; {why}"


def _larger(job: Job, possible: Callable[[Mesh], bool], free: float, device: str) -> str:
    """With how many processes it would fit."""
    parts = 1
    while parts <= _MANY:
        parts *= 2
        one = Mesh(1, parts)
        if possible(one) and job.bytes(one) <= free:
            size = bytes_text(job.bytes(one))
            return (
                f"{parts} processes that split features: each needs {size} on {device} for the SAE, of "
                f"{bytes_text(free)}; torchrun --nproc-per-node {parts} ... distributed.features={parts}"
            )
    return f"none: on no number of processes up to {_MANY} does it fit into {bytes_text(free)} on {device}"
