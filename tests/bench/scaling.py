"""How far the costs of `docs/scaling.md` are from what is so: memory of a process, and what processes send.

    python tests/bench/scaling.py count [--size 2 4]        bytes that real processes give to each collective (gloo)
    python tests/bench/scaling.py memory [--size 1 2 4]     memory of real processes in training (Linux, CPU)
    python tests/bench/scaling.py fake [--size 8 64 512]    messages and tensors of a step at large sizes, of fake
                                                            processes; and the state of an SAE on the meta device
    python tests/bench/scaling.py time [--size 1 2]         steps of real processes, by rates found in the same run
    python tests/bench/scaling.py table | picture FILE      those of docs/scaling.md

With `--quick`, `memory`, `fake` and `time` take a few cases, and a few minutes on two cores.

The fake processes are private to torch, and used here alone.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import weakref
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
from torch.utils._python_dispatch import TorchDispatchMode  # private: here alone
from torch.utils._pytree import tree_leaves

import saekit
from saekit.distributed import World
from saekit.distributed.costs import Job, Mesh, Rates, advised, meshes
from saekit.distributed.group import Group, JoinedGroup
from saekit.kernels.screen import why_no_screen
from saekit.kernels.workspace import SHARED
from saekit.kinds import SAE_ARCHITECTURES
from saekit.runs.timing import bytes_text
from saekit.sae.build import build_module
from saekit.sae.splitting import keep_part
from saekit.training.firing import FiringStatistics

ROWS = 1024
KINDS: dict[str, dict[str, Any]] = {"topk": {"name": "topk", "k": 8, "aux_loss_coefficient": 0.0},
                                    "revived": {"name": "topk", "k": 8},
                                    "batchtopk": {"name": "batchtopk", "k": 8, "aux_loss_coefficient": 0.0},
                                    "standard": {"name": "standard", "l1_coefficient": 1.0}}  # fmt: skip


def case(kind: str, d: int, d_sae: int, steps: int, rows: int = ROWS) -> Case:
    """Metrics only after the first and the last step; features die in the second, where they shall be revived."""
    window = 1 if kind == "revived" else 1000
    return Case(
        KINDS[kind], {"log_frequency": 1000, "dead_feature_window": window}, widths=(d,), fast=True, dtype="float32",
        rows=rows, d_sae=d_sae, steps=steps,
    )  # fmt: skip


def job(kind: str, d: int, d_sae: int, rows: int = ROWS) -> Job:
    """The same, as costs know it."""
    k = KINDS[kind].get("k", 0)
    competes = {"standard": None, "batchtopk": "all"}.get(kind, "features")
    k_aux = d // 2 if kind == "revived" else 0
    return attrs.evolve(
        Job.topk(d, d_sae, rows, k), competes=competes, gathers_rows=False, k_aux=k_aux, leaves_weights=True
    )


def on_cpu(of: Job, mesh: Mesh) -> Job:
    """With a first look in bfloat16 where there is one."""
    shape = torch.device("cpu"), torch.float32, of.d_sae // mesh.features
    return attrs.evolve(of, screened="bfloat16" if of.k and why_no_screen(*shape) is None else None)


# ---- what is sent


@contextmanager
def counted(sent: Counter[str]) -> Iterator[None]:
    """Add to ``sent`` the bytes that this process gives to each kind of collective.

    A sum of own parts and then their spreading send half each of what a sum does.
    """
    kept = {name: getattr(JoinedGroup, name) for name in ("sum_", "sum_parts_", "spread_parts_", "gather")}

    def summing(group: JoinedGroup, value: torch.Tensor) -> torch.Tensor:
        sent[f"sum {group.size}"] += value.nbytes if value.is_contiguous() or value.T.is_contiguous() else 0
        found: torch.Tensor = kept["sum_"](group, value)
        return found

    def summing_parts(group: JoinedGroup, value: torch.Tensor, memory: torch.Tensor) -> None:
        sent[f"sum {group.size}"] += value.nbytes // 2
        kept["sum_parts_"](group, value, memory)

    def spreading(group: JoinedGroup, value: torch.Tensor) -> None:
        sent[f"sum {group.size}"] += value.nbytes // 2
        kept["spread_parts_"](group, value)

    def gathering(group: JoinedGroup, value: torch.Tensor) -> list[torch.Tensor]:
        sent[f"gather {group.size}"] += value.nbytes
        found: list[torch.Tensor] = kept["gather"](group, value)
        return found

    for name, own in zip(kept, (summing, summing_parts, spreading, gathering), strict=True):
        setattr(JoinedGroup, name, own)
    try:
        yield
    finally:
        for name, own in kept.items():
            setattr(JoinedGroup, name, own)


def count(world: World, of: Case) -> dict[str, int]:
    """Bytes that this process gives in the third of four steps, which makes no metrics."""
    trainer, sent = of.trainer(world), Counter[str]()
    for number, batch in enumerate(of.batches()):
        part = part_of(batch, of, world)
        rows = trainer.rows_of(part)
        if number != 2:
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
                "bench.scaling:count", mesh.data, mesh.features, (case(kind, d, d_sae, 4),), parts=False
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
    _warm_up(attrs.evolve(of, d_sae=2048 * world.features.size), world)
    SHARED.release()  # else memory that was there before is used again
    parts = [part_of(batch, of, world) for batch in of.batches()]
    before = _held()
    trainer = of.trainer(world)
    _held()
    Path("/proc/self/clear_refs").write_text("5")
    for part in parts:
        trainer.train_on(*trainer.rows_of(part), part)
    return peak() - before


def _warm_up(of: Case, world: World) -> None:
    """So that what is imported and made once is there; what is of this is gone afterwards."""
    trainer = of.trainer(world)
    for batch in of.batches():
        part = part_of(batch, of, world)
        trainer.train_on(*trainer.rows_of(part), part)


def _held() -> float:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


SHAPES = (("topk", 768, 24576, 1024), ("topk", 512, 16384, 3072), ("batchtopk", 640, 16384, 2048),
          ("standard", 512, 8192, 1024))  # fmt: skip


QUICK = (("topk", 768, 16384, 1024), ("batchtopk", 640, 16384, 2048))
"""Large enough for what else a process allocates, some megabytes, to be little beside it."""


def memory_all(sizes: list[int], *, quick: bool = False) -> None:
    """In real processes, one kind of mesh after the other."""
    for kind, d, d_sae, rows in QUICK if quick else SHAPES:
        for size in sizes:
            for mesh in meshes(size):
                given = (case(kind, d, d_sae, 4, rows),)
                call = Call("bench.scaling:memory", mesh.data, mesh.features, given, parts=False)
                with tempfile.TemporaryDirectory() as folder:
                    found = max(together({"": call}, size, Path(folder))[""])
                of = on_cpu(job(kind, d, d_sae, rows), mesh)
                told("measured", kind, of, mesh, of.bytes(mesh) - _FLOAT * rows / mesh.data * d, found)


def told(how: str, kind: str, of: Job, mesh: Mesh, said: float, found: float) -> None:
    """Bytes by the model and as they are, in a line."""
    print(f"{kind:10} {of.d_in:5} → {of.d_sae:7,}, {of.rows:5,} rows, {mesh.data:3} × {mesh.features:<3} planned "
          f"{said / 1e6:8.1f} MB  {how} {found / 1e6:8.1f} MB  {said / found - 1:+6.1%}", flush=True)  # fmt: skip


_FLOAT = 4


class Live(TorchDispatchMode):
    """The most bytes that tensors have held at one time which any operation met."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, found)):
            if isinstance(value, torch.Tensor) and (known := value.untyped_storage())._cdata not in self._sizes:
                self._sizes[known._cdata] = known.nbytes()
                self.now += known.nbytes()
                weakref.finalize(known, self._gone, known._cdata)
        self.most = max(self.most, self.now)
        return found

    def _gone(self, number: int) -> None:
        self.now -= self._sizes.pop(number)


def held(world: World, of: Case) -> int:
    """Bytes of tensors in training, own rows of one batch included."""
    trainer, parts = of.trainer(world), [part_of(batch, of, world) for batch in of.batches()]
    with Live() as live:
        for value in trainer.sae.parameters():
            value.view_as(value)
        for part in parts:
            trainer.train_on(*trainer.rows_of(part), part)
    # of the other batches, rows are there as well
    return live.most - sum(rows.nbytes for part in parts[1:] for rows in part.activations.values())


# ---- at large sizes


class Silent(JoinedGroup):
    """Whose others say nothing, and so agree."""

    def same(self, number: int) -> bool:
        return True

    def sum_parts_(self, value: torch.Tensor, memory: torch.Tensor) -> None:
        memory.zero_()  # nobody writes to it, and what was there may be no number
        super().sum_parts_(value, memory)


def fake_world(mesh: Mesh) -> World:
    """The first process of ``mesh``."""
    import torch.distributed as dist

    rows = [data * mesh.features for data in range(mesh.data)]
    groups = [Silent(dist.new_group(ranks)) for ranks in (range(mesh.size), rows, range(mesh.features))]
    every, data, features = (group if group.size > 1 else Group() for group in groups)
    return World(every, data, features, every)


def fake_all(sizes: list[int], d: int = 64, d_sae: int = 2**16, rows: int = 2048, *, quick: bool = False) -> None:
    """By one process of each mesh whose others are torch's fake ones: messages of a real step, and its tensors.

    What the others would say is not there, so what is computed is nothing.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # private: here alone

    for kind in ("topk",) if quick else ("topk", "batchtopk", "standard"):
        for size in sizes:
            for mesh in meshes(size)[:: 3 if quick else 1]:
                if mesh.features & (mesh.features - 1):
                    continue
                of = case(kind, d, d_sae, 4, rows)
                dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
                try:
                    world = fake_world(mesh)
                    found = count(world, of)  # of a batch together, too few are found where the others say nothing
                    tensors = held(world, of) if kind != "batchtopk" else None
                finally:
                    dist.destroy_process_group()
                SHARED.release()
                model = on_cpu(job(kind, d, d_sae, rows), mesh)
                compared(model, mesh, found, kind)
                if tensors is not None:
                    told("tensors", kind, model, mesh, model.bytes(mesh), tensors)


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


def rates_here(world: World, d: int, own: int) -> Rates:
    """Of one thread of this machine, at the very kinds of work: products in the type that steps make them in, passes
    through memory, and what is sent of gradients, or of reconstructions."""
    kind = torch.bfloat16 if why_no_screen(torch.device("cpu"), torch.float32, own) is None else torch.float32
    x, y = torch.rand(1024, d).to(kind), torch.rand(own, d).to(kind)
    out = torch.empty(1024, own, dtype=kind)
    values, more = torch.rand(20_000_000), torch.rand(20_000_000)
    product = min(_timed(lambda: torch.mm(x, y.T, out=out)) for _ in range(7))
    moved = min(_timed(lambda: values.add_(more)) for _ in range(7))

    def send() -> None:
        if world.data.size > 1:
            world.data.sum_parts_(values, more)
            world.data.spread_parts_(values)
        else:
            world.all.sum_(values)

    linked = min(_timed(send) for _ in range(7)) if world.size > 1 else 1.0
    sent = 2 * (world.size - 1) / world.size * values.nbytes
    return Rates(2 * 1024 * d * own / product, 3 * values.nbytes / moved, sent / linked or 1.0)


def steps_timed(world: World, of: Case) -> tuple[Rates, float]:
    """For :class:`Call`: rates before and after, the better of them; and the seconds of the fastest step."""
    trainer, found = of.trainer(world), list[float]()
    batch = part_of(next(of.batches()), of, world)
    rows, own = trainer.rows_of(batch), trainer.sae.d_sae
    before = rates_here(world, of.widths[0], own)
    for _ in range(8):
        world.all.gather(torch.zeros(()))
        found.append(_timed(lambda: trainer.train_on(*rows, batch)))
    after = rates_here(world, of.widths[0], own)
    best = [max(pair) for pair in zip(attrs.astuple(before), attrs.astuple(after), strict=True)]
    return Rates(*best), min(found)


def time_all(sizes: list[int], *, quick: bool = False) -> None:
    """In real processes of one thread."""
    for kind, d, d_sae, rows in (("topk", 768, 24576, 4096), ("topk", 512, 16384, 2048))[quick:]:
        for size in sizes:
            for mesh in meshes(size):
                of = attrs.evolve(case(kind, d, d_sae, 100, rows), steps=100)
                call = Call("bench.scaling:steps_timed", mesh.data, mesh.features, (of,), parts=False)
                with tempfile.TemporaryDirectory() as folder:
                    each = together({"": call}, size, Path(folder))[""]
                rates = Rates(*(min(some) for some in zip(*(attrs.astuple(one) for one, _ in each), strict=True)))
                found = max(seconds for _, seconds in each)
                said = on_cpu(job(kind, d, d_sae, rows), mesh).seconds(mesh, rates)
                print(f"{kind:10} {d:5} → {d_sae:7,}, {rows:5,} rows, {mesh.data} × {mesh.features}: planned "
                      f"{said * 1e3:7.1f} ms, measured {found * 1e3:7.1f} ms, {said / found:.2f} of it; "
                      f"{rates.flops / 1e9:.0f} GFLOP/s, {rates.memory / 1e9:.1f} GB/s, links {rates.links / 1e9:.2f} "
                      "GB/s", flush=True)  # fmt: skip


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
    of = attrs.evolve(Job.topk(d, d_sae, BATCH, K), on_gpu=True)
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
    parser.add_argument("what", choices=["count", "memory", "fake", "time", "table", "picture"])
    parser.add_argument("file", nargs="?", default="scaling.png")
    parser.add_argument("--size", nargs="+", type=int)
    parser.add_argument(
        "--quick", action="store_true", help="smaller cases and fewer of them: two minutes on two cores"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # glibc's malloc keeps some of what is given back to it, more from time to time: up to a tenth of all, as it comes.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    if options.what == "count":
        count_all(options.size or [2, 4])
    elif options.what == "memory":
        memory_all(options.size or [1, 2, 4], quick=options.quick)
    elif options.what == "fake":
        fake_all(options.size or ([8, 512] if options.quick else [8, 64, 512]), quick=options.quick)
        meta_all([1, 4, 512] if options.quick else [1, 2, 4, 64, 512])
    elif options.what == "time":
        time_all(options.size or [1, 2], quick=options.quick)
    elif options.what == "table":
        print(table())
    else:
        picture(Path(options.file))


if __name__ == "__main__":
    main()
