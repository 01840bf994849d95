"""How far the costs of `docs/scaling.md` are from what is so: memory of a process, and what processes send.

    python tests/bench/scaling.py count [--size 2 4]        bytes that real processes give to each collective (gloo)
    python tests/bench/scaling.py memory [--size 1 2 4]     memory of real processes in training (Linux, CPU)
    python tests/bench/scaling.py fake [--size 8 64 512]    parts and messages at large sizes, of fake processes
    python tests/bench/scaling.py rates                     what this machine does in a second
    python tests/bench/scaling.py table | picture FILE      those of docs/scaling.md

The fake processes are private to torch, and used here alone.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from saekit_plugins.architectures.topk import TopKConfig
from support.processes import Call, Case, part_of, together

import saekit
from saekit.distributed import World
from saekit.distributed.costs import Job, Mesh, Rates, advised, meshes
from saekit.distributed.group import Group, JoinedGroup
from saekit.kinds import SAE_ARCHITECTURES
from saekit.runs.timing import bytes_text
from saekit.sae.build import build_module
from saekit.sae.splitting import keep_part
from saekit.training.firing import FiringStatistics

ROWS = 1024
KINDS: dict[str, dict[str, Any]] = {"topk": {"name": "topk", "k": 8, "aux_loss_coefficient": 0.0},
                                    "batchtopk": {"name": "batchtopk", "k": 8, "aux_loss_coefficient": 0.0},
                                    "standard": {"name": "standard", "l1_coefficient": 1.0}}  # fmt: skip


def case(kind: str, d: int, d_sae: int, steps: int, rows: int = ROWS) -> Case:
    """Metrics only after the first and the last step."""
    return Case(
        KINDS[kind], {"log_frequency": 1000, "dead_feature_window": 1000}, widths=(d,), fast=True, dtype="float32",
        rows=rows, d_sae=d_sae, steps=steps,
    )  # fmt: skip


def job(kind: str, d: int, d_sae: int, rows: int = ROWS) -> Job:
    """The same, as costs know it."""
    k = KINDS[kind].get("k", 0)
    competes = {"topk": "features", "batchtopk": "all"}.get(kind)
    return attrs.evolve(Job.topk(d, d_sae, rows, k), competes=competes, gathers_rows=False)


# ---- what is sent


@contextmanager
def counted(sent: Counter[str]) -> Iterator[None]:
    """Add to ``sent`` the bytes that this process gives to each kind of collective."""
    sum_, gather = JoinedGroup.sum_, JoinedGroup.gather
    names = {}

    def summing(group: JoinedGroup, value: torch.Tensor) -> torch.Tensor:
        sent[f"sum {group.size}"] += value.nbytes if value.is_contiguous() or value.T.is_contiguous() else 0
        return sum_(group, value)

    def gathering(group: JoinedGroup, value: torch.Tensor) -> list[torch.Tensor]:
        sent[f"gather {group.size}"] += value.nbytes
        return gather(group, value)

    names = {"sum_": summing, "gather": gathering}
    for name, own in names.items():
        setattr(JoinedGroup, name, own)
    try:
        yield
    finally:
        JoinedGroup.sum_, JoinedGroup.gather = sum_, gather  # type: ignore[method-assign]


def count(world: World, of: Case) -> dict[str, int]:
    """Bytes that this process gives in the second of three steps, which makes no metrics."""
    trainer, sent = of.trainer(world), Counter[str]()
    for number, batch in enumerate(of.batches()):
        part = part_of(batch, of, world)
        rows = trainer.rows_of(part)
        if number != 1:
            trainer.train_on(*rows, part)
            continue
        with counted(sent):
            trainer.train_on(*rows, part)
    return dict(sent)


def expected(of: Job, mesh: Mesh) -> dict[str, float]:
    """The same by the model."""
    found = Counter[str]()
    sizes = {"data": mesh.data, "features": mesh.features}
    for message in of.messages(mesh):
        found[f"{'gather' if message.gathers else 'sum'} {sizes[message.over]}"] += message.size
    return dict(found)


def compared(of: Job, mesh: Mesh, found: dict[str, int], kind: str) -> None:
    """In a line."""
    said, there = sum(expected(of, mesh).values()), sum(found.values())
    print(f"{kind:10} {mesh.data:3} × {mesh.features:<3} planned {said:12,.0f}  counted {there:12,}  "
          f"{said / there - 1:+7.2%}   {dict(sorted(found.items()))}", flush=True)  # fmt: skip


def count_all(sizes: list[int], d: int = 64, d_sae: int = 4096) -> None:
    """In real processes."""
    for size in sizes:
        calls = {
            f"{kind} {mesh.data} {mesh.features}": Call(
                f"{Path(__file__).stem}:count", mesh.data, mesh.features, (case(kind, d, d_sae, 3),)
            )
            for kind in KINDS
            for mesh in meshes(size)
        }
        with tempfile.TemporaryDirectory() as folder:
            found = together(calls, size, Path(folder))
        for kind in KINDS:
            for mesh in meshes(size):
                compared(job(kind, d, d_sae), mesh, found[f"{kind} {mesh.data} {mesh.features}"][0], kind)


# ---- memory


def peak() -> float:
    """The most that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def memory(world: World, of: Case) -> float:
    """Bytes that training has taken at most, after all that is drawn for the whole SAE is gone."""
    warm = attrs.evolve(of, d_sae=2048 * world.features.size)
    for trainer, made in [(warm.trainer(world), warm)]:
        for batch in made.batches():
            part = part_of(batch, made, world)
            trainer.train_on(*trainer.rows_of(part), part)
    parts = [part_of(batch, of, world) for batch in of.batches()]
    before = _held()
    trainer = of.trainer(world)
    _held()
    Path("/proc/self/clear_refs").write_text("5")
    for part in parts:
        trainer.train_on(*trainer.rows_of(part), part)
    return peak() - before


def _held() -> float:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def memory_all(sizes: list[int], d: int = 768, d_sae: int = 24576) -> None:
    """In real processes, one kind of mesh after the other."""
    for size in sizes:
        for mesh in meshes(size):
            of = case("topk", d, d_sae, 4)
            call = Call(f"{Path(__file__).stem}:memory", mesh.data, mesh.features, (of,))
            with tempfile.TemporaryDirectory() as folder:
                found = max(together({"": call}, size, Path(folder))[""])
            model = attrs.evolve(job("topk", d, d_sae), screened=True)
            said = model.bytes(mesh)
            print(f"{mesh.data} × {mesh.features}  planned {said / 1e6:8.1f} MB  measured {found / 1e6:8.1f} MB  "
                  f"{said / found - 1:+6.1%}", flush=True)  # fmt: skip


# ---- at large sizes


def fake_world(mesh: Mesh) -> World:
    """The first process of ``mesh``."""
    import torch.distributed as dist

    rows = [data * mesh.features for data in range(mesh.data)]
    groups = [JoinedGroup(dist.new_group(ranks)) for ranks in (range(mesh.size), rows, range(mesh.features))]
    every, data, features = (group if group.size > 1 else Group() for group in groups)
    return World(every, data, features, every)


def fake_all(sizes: list[int], d: int = 16) -> None:
    """By one process of each mesh whose others are torch's fake ones: shapes of its part, and messages of a real step.

    What the others would say is not there, so what is computed is nothing.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # private: here alone

    for size in sizes:
        for mesh in meshes(size):
            if mesh.features & (mesh.features - 1):
                continue
            of = case("standard", d, 4 * size, 3, rows=4 * size)
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
            try:
                world = fake_world(mesh)
                trainer = of.trainer(world)
                own = sum(value.numel() for value in trainer.sae.parameters())
                found = count(world, of)
            finally:
                dist.destroy_process_group()
            model = job("standard", d, 4 * size, rows=4 * size)
            assert own == model.parameters(mesh), (own, model.parameters(mesh))
            compared(model, mesh, found, "standard")


def meta_all(sizes: list[int]) -> None:
    """State of an SAE as a process of so many parts has it, on torch's meta device: what Adam makes of it in a step."""
    plugins = saekit.default_manager()
    for d, d_sae in ((768, 2**14), (768, 2**20), (4096, 2**17), (8192, 2**16)):
        options = TopKConfig(d_sae=d_sae, k=64)
        for parts in sizes:
            sae = build_module(plugins.find(SAE_ARCHITECTURES, options), options, d, plugins).to("meta")
            keep_part(sae, Fake(parts))
            optimizer = torch.optim.Adam(sae.parameters(), foreach=True)
            for value in sae.parameters():
                value.grad = torch.empty_like(value)
            optimizer.step()
            kept = [value for state in optimizer.state.values() for value in state.values()]
            firing = FiringStatistics(sae.d_sae, dead_after=1, window=1, device="meta")
            kept += [value for value in firing.state_dict().values() if isinstance(value, torch.Tensor)]
            found = sum(value.nbytes for value in kept) + 2 * sum(value.nbytes for value in sae.parameters())
            said = Job.topk(d, d_sae, ROWS, 64).state_bytes(Mesh(1, parts))
            print(f"{d:5} → {d_sae:10,} in {parts:3} parts  planned {said / 1e6:10.2f} MB  "
                  f"on meta {found / 1e6:10.2f} MB  {said / found - 1:+7.3%}", flush=True)  # fmt: skip


class Fake(Group):
    """The first of so many processes."""

    def __init__(self, size: int) -> None:
        self.size = size


# ---- rates, and what is made of them

DEVICES = {
    "H100 (as its maker says: half of 989 TFLOP/s in bfloat16, 3.35 TB/s; links 50 GB/s)": Rates(4.9e14, 3.35e12, 5e10),
}


def rates() -> Rates:
    """Of one thread of this machine."""
    x, y = torch.rand(1024, 768), torch.rand(768, 8192)
    product = min(_timed(lambda: x @ y) for _ in range(5))
    values = torch.rand(50_000_000)
    moved = min(_timed(lambda: values.add_(1)) for _ in range(5))
    found = Rates(2 * 1024 * 768 * 8192 / product, 2 * values.nbytes / moved, 0)
    print(f"{found.flops / 1e9:.0f} GFLOP/s, {found.memory / 1e9:.1f} GB/s", flush=True)
    return found


def _timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


SIZES = (2**14, 2**17, 2**20, 2**24)
WIDTHS = (768, 2304, 4096, 8192)
PROCESSES = (1, 8, 64, 512)
BATCH, K, FREE = 32768, 64, 80e9
H100 = next(iter(DEVICES.values()))


def chosen(d: int, d_sae: int, size: int) -> tuple[Job, Mesh | None]:
    """The mesh that is advised where each process has 80 GB, a sixteenth of which the model and texts take."""
    of = Job.topk(d, d_sae, BATCH, K)
    return of, advised(of, size, lambda mesh: True, FREE * 15 / 16)


def table() -> str:
    """In Markdown."""
    lines = ["| d | features | processes | grid | memory of each | sent in a step | time of a step |", "|-" * 7 + "|"]
    for d in WIDTHS:
        for d_sae in SIZES:
            for size in PROCESSES:
                of, mesh = chosen(d, d_sae, size)
                name = f"| {d:,} | {d_sae:,} | {size} |"
                if mesh is None:
                    one = Mesh(1, size)
                    lines.append(f"{name} none | {bytes_text(of.bytes(one))} | | |")
                    continue
                held = bytes_text(of.bytes(mesh))
                sent, seconds = bytes_text(of.sent_bytes(mesh)), of.seconds(mesh, H100)
                lines.append(f"{name} {mesh.data} × {mesh.features} | {held} | {sent} | {seconds * 1e3:,.1f} ms |")
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Time of a step by the number of processes, for each number of features."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WIDTHS), figsize=(12, 3.4), sharey=True, constrained_layout=True)
    sizes = [2**power for power in range(10)]
    for axis, d in zip(axes, WIDTHS, strict=True):
        for d_sae in SIZES:
            found = [(size, *chosen(d, d_sae, size)) for size in sizes]
            there = [(size, of.seconds(mesh, H100) * 1e3) for size, of, mesh in found if mesh is not None]
            name = f"{d_sae // 1024:,}k" if d_sae < 2**20 else f"{d_sae // 2**20}M"
            axis.loglog(*zip(*there, strict=True) if there else ([], []), marker="o", markersize=3, label=name)
        axis.set(title=f"d = {d:,}", xlabel="processes", xticks=[1, 8, 64, 512], xticklabels=["1", "8", "64", "512"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms in a step")
    axes[-1].legend(loc="lower left", title="features", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["count", "memory", "fake", "rates", "table", "picture"])
    parser.add_argument("file", nargs="?", default="scaling.png")
    parser.add_argument("--size", nargs="+", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    if options.what == "count":
        count_all(options.size or [2, 4])
    elif options.what == "memory":
        memory_all(options.size or [1, 2, 4])
    elif options.what == "fake":
        fake_all(options.size or [8, 64, 512])
        meta_all([1, 2, 4, 64, 512])
    elif options.what == "rates":
        rates()
    elif options.what == "table":
        print(table())
    else:
        picture(Path(options.file))


if __name__ == "__main__":
    main()
