"""Two processes of one thread each beside one, on the same whole batch; and what a world of one costs.

    python tests/bench/processes.py [--rounds 7] [--rows 4096] [--size 768 24576] [--only topk standard] [--where]

Two processes are started once.  In each round the first makes a step alone, while the other waits; then both make it
together, by batches split in two and by features split in two.  Per mesh it prints the medians and the ratio, of the
clock and of the time that processors worked, which on a busy machine says more; and with ``--where`` how long each
collective took and how many there were.  What a world of one costs is the time that the calls of its groups and shares
take that a step makes, made again by themselves, over that of the step.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from figures import row, spread

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.processes import Call, Case, part_of, together

from saekit.distributed import ALONE, World
from saekit.distributed.group import Group, JoinedGroup
from saekit.distributed.share import Share
from saekit.training import SAETrainer
from saekit.values import Batch

MESHES = {"data": (2, 1), "features": (1, 2)}
ACTIVE = 48  # features of a row of `standard`, as late in training
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"name": "topk", "k": 32},
    "batchtopk": {"name": "batchtopk", "k": 32},
    "standard": {"name": "standard", "l1_coefficient": 1.0},
}


def case(kind: str, d: int, d_sae: int, rows: int, steps: int = 1) -> Case:
    """One whose metrics are made after the first step alone, and whose features do not die."""
    return Case(
        KINDS[kind], {"log_frequency": 10**6, "dead_feature_window": 10**6, "training_tokens": 10**12, "lr": 1e-7},
        widths=(d,), fast=True, dtype="float32", rows=rows, d_sae=d_sae, steps=steps,
    )  # fmt: skip


def prepared(of: Case, world: World, batch: Batch) -> Callable[[], object]:
    """A step of ``of`` on this process's part of ``batch``."""
    trainer = of.trainer(world)
    if of.sae["name"] == "standard":
        leave_active(trainer, batch, world)
    part = part_of(batch, of, world)
    rows = trainer.rows_of(part)
    return lambda: trainer.train_on(*rows, part)


@torch.no_grad()
def leave_active(trainer: SAETrainer, batch: Batch, world: World) -> None:
    """Lower the bias until ``ACTIVE`` features of a row are above zero."""
    sae, rows = trainer.sae, next(iter(batch.activations.values()))[:256]
    pre = (rows - sae.b_dec) @ sae.W_enc + sae.b_enc
    own = max(ACTIVE * len(rows) // world.features.size, 1)
    cut = pre.flatten().topk(min(own, pre.numel())).values[-1]
    sae.b_enc -= world.features.sum(cut) / world.features.size


# ---- two against one


@contextmanager
def watched(seconds: dict[str, float], calls: Counter[str]) -> Iterator[None]:
    """Add to ``seconds`` and ``calls`` what collectives take, the wait for the others included."""
    kept = {name: getattr(JoinedGroup, name) for name in ("sum_", "sum_parts_", "spread_parts_", "gather")}

    def timed(name: str) -> Callable[..., Any]:
        def call(group: JoinedGroup, value: torch.Tensor, *rest: Any) -> Any:
            begun = time.perf_counter()
            found = kept[name](group, value, *rest)
            kind = f"{name.rstrip('_').replace('_', ' ')} of {value.nbytes:,} bytes"
            seconds[kind] += time.perf_counter() - begun
            calls[kind] += 1
            return found

        return call

    for name in kept:
        setattr(JoinedGroup, name, timed(name))
    try:
        yield
    finally:
        for name, own in kept.items():
            setattr(JoinedGroup, name, own)


@attrs.frozen
class Found:
    """Seconds of steps, in rounds, and those of processors."""

    alone: list[float]
    both: list[float]
    work_alone: list[float]
    work_of_both: list[float]
    where: dict[str, tuple[int, float]]
    """Of each collective of a step how many there were, and the seconds of all."""


def rounds_of(world: World, of: Case, number: int) -> Found:
    """For :class:`Call`: each round one step alone and one together, in an order that turns."""
    batch = next(of.batches())
    alone = prepared(of, ALONE, batch) if world.main else lambda: None
    both = prepared(of, world, batch)
    seconds: dict[str, list[float]] = {"alone": [], "both": []}
    work: dict[str, list[float]] = {"alone": [], "both": []}
    spent, calls = defaultdict[str, float](float), Counter[str]()
    for turn in range(number + 1):
        for name in ("alone", "both") if turn % 2 else ("both", "alone"):
            world.all.gather(torch.zeros(()))
            begun, worked = time.perf_counter(), time.process_time()
            if name == "alone":
                alone()
            elif turn:
                with watched(spent, calls):
                    both()
            else:
                both()
            seconds[name].append(time.perf_counter() - begun)
            work[name].append(time.process_time() - worked)
    where = {kind: (calls[kind] // number, spent[kind] / number) for kind in calls}
    times = [found[name][1:] for found in (seconds, work) for name in ("alone", "both")]
    return Found(*times, where)


def against_one(kind: str, mesh: str, of: Case, rounds: int, where: bool) -> None:
    """Print a mesh's figures."""
    call = Call("bench.processes:rounds_of", *MESHES[mesh], (of, rounds), parts=False)
    with tempfile.TemporaryDirectory() as folder:
        found: Sequence[Found] = together({"": call}, 2, Path(folder))[""]
    both = [max(times) for times in zip(*(one.both for one in found), strict=True)]
    ratios = [a / b for a, b in zip(found[0].alone, both, strict=True)]
    worked = statistics.median(found[0].work_alone) / max(statistics.median(one.work_of_both) for one in found)
    told = {"one process, ms": [s * 1e3 for s in spread(found[0].alone)], "two, ms": [s * 1e3 for s in spread(both)]}
    row("two processes beside one", f"{kind}, {mesh}", {**told, "×": spread(ratios), "× of processors": worked})
    print(
        f"{kind:10} {mesh:9} one process {statistics.median(found[0].alone) * 1e3:8.1f} ms, two "
        f"{statistics.median(both) * 1e3:8.1f} ms: x {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}); by processor time x {worked:.2f}",
        flush=True,
    )
    if where:
        for rank, one in enumerate(found):
            for name, (calls, spent) in sorted(one.where.items(), key=lambda item: -item[1][1]):
                print(f"    process {rank}: {calls:3} x {name:28} {spent * 1e3:8.1f} ms", flush=True)


# ---- a world of one


def calls_of(step: Callable[[], object]) -> list[Callable[[], object]]:
    """The calls of groups and shares that ``step`` makes, each to be made again."""
    made: list[Callable[[], object]] = []
    kept = {(kind, name): value for kind in (Group, Share, World) for name, value in vars(kind).items()
            if callable(value) and not name.startswith("_")}  # fmt: skip

    def noted(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            made.append(lambda: own(*given, **named))
            return own(*given, **named)

        return call

    for (kind, name), own in kept.items():
        setattr(kind, name, noted(own))
    try:
        step()
    finally:
        for (kind, name), own in kept.items():
            setattr(kind, name, own)
    return made


def world_of_one(kind: str, of: Case, rounds: int) -> None:
    """Print what it costs."""
    batch = next(of.batches())
    step = prepared(of, ALONE, batch)
    step()
    made = calls_of(step)
    steps = [_seconds(step) for _ in range(rounds)]
    calls = [_seconds(lambda: [call() for call in made]) for _ in range(rounds)]
    spent, whole = statistics.median(calls), statistics.median(steps)
    row("a world of one", kind, {"calls": len(made), "µs": spent * 1e6, "of a step": f"{spent / whole:.4%}"})
    print(
        f"{kind:10} a world of one: {len(made)} calls in a step, {spent * 1e6:.0f} µs of {whole * 1e3:.1f} ms: "
        f"{spent / whole:.4%}",
        flush=True,
    )


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--size", type=int, nargs=2, default=(768, 24576), metavar=("D", "D_SAE"))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=["topk", "standard"])
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=list(MESHES))
    parser.add_argument("--where", action="store_true")
    asked: Any = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    print(f"{asked.size[0]} → {asked.size[1]}, {asked.rows} rows, one thread in each process, {asked.rounds} rounds")
    for kind in asked.only:
        of = case(kind, *asked.size, asked.rows)
        for mesh in asked.mesh:
            against_one(kind, mesh, of, asked.rounds, asked.where)
        world_of_one(kind, of, asked.rounds)


if __name__ == "__main__":
    main()
