"""The same steps by one process and by several, which share batches and features; run as a script, it is one of them.

A case is a configuration's ``sae``, ``optimizer`` and ``training``, with the widths of its sites.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import torch
from support import golden, warm
from torch import Tensor

import saekit
from saekit.config import DistributedConfig, TrainConfig
from saekit.config.files import load_config
from saekit.data import Corpus
from saekit.distributed import ALONE, World, open_world
from saekit.runs.opening import open_backend
from saekit.runs.parts import make_schedule
from saekit.runs.setup import give_weights, make_trainer
from saekit.sae.splitting import gathered, give_part, whole_like
from saekit.site import Site
from saekit.training import SAETrainer, shown
from saekit.values import Batch, Ports

ROWS, D_SAE, STEPS = 24, 32, 30


T = TypeVar("T")


@attrs.frozen
class Case:
    """One SAE and how it trains."""

    sae: Mapping[str, Any]
    training: Mapping[str, Any] = attrs.field(factory=dict)
    optimizer: Mapping[str, Any] = attrs.field(factory=lambda: {"name": "adam"})
    lr_schedule: Any = "constant"
    widths: tuple[int, ...] = (6,)
    """Of the sites."""
    reads: int | None = None
    """How many of the sites are inputs, where the others are targets; None: all are both."""
    fast: bool = False
    """By the fast kernels, where they do not refuse."""
    dtype: str = "float64"
    uneven: bool = False
    """Whether processes have different numbers of rows."""
    golden: str | None = None
    """The file of ``tests/golden`` that has its options, its starting weights and its batches."""
    lopsided: bool = False
    """Whether features of the first half are active nearly always."""
    rows: int = ROWS
    d_sae: int = D_SAE
    steps: int = STEPS

    @property
    def sites(self) -> list[Site]:
        return [Site(hook_name=f"site_{number}") for number in range(len(self.widths))]

    @property
    def config(self) -> TrainConfig:
        """Of a run."""
        sites: dict[str, Any] = {"site": {"hook_name": "site_0"}}
        if len(self.widths) > 1:
            names = [{"hook_name": site.hook_name} for site in self.sites]
            sites = {"inputs": names[: self.reads], **({} if self.reads is None else {"targets": names[self.reads :]})}
        table = {
            **sites,
            "model": {"backend": "none"},
            "evals": {"run": [], "held_out_every": 0},
            "activations": {"source": {"name": "toy"}},
            "sae": {"d_sae": self.d_sae, "dtype": self.dtype, "b_dec_init_method": "zeros", **self.sae},
            "optimizer": dict(self.optimizer),
            "lr_schedule": self.lr_schedule,
            "training": {
                "training_tokens": self.rows * self.steps, "train_batch_size_tokens": self.rows, "lr": 3e-3,
                "device": "cpu", "verbose": False, "kernels": "reference", "log_frequency": 1, "dead_feature_window": 2,
                "feature_sampling_window": 10, **self.training,
            },
        }  # fmt: skip
        return load_config(table)

    def batches(self) -> Iterator[Batch]:
        """The very same rows for everybody."""
        if self.golden is not None:
            file = golden.read(golden.FILES[self.golden])
            yield from (Batch({self.sites[0]: rows * file.activation_scale}) for rows in file.tensors["batches"])
            return
        generator = torch.Generator().manual_seed(3)
        mixing = torch.randn(sum(self.widths), sum(self.widths), generator=generator, dtype=torch.float64)
        for _ in range(self.steps):
            rows = torch.randn(self.rows, sum(self.widths), generator=generator, dtype=torch.float64).abs() @ mixing
            parts = rows.to(getattr(torch, self.dtype)).split(self.widths, dim=1)
            yield Batch({site: part.clone() for site, part in zip(self.sites, parts, strict=True)})

    def trainer(self, world: World) -> SAETrainer:
        """As a run makes it."""
        config, plugins = self.config, saekit.default_manager()
        corpus = Corpus.of(config.dataset, config.evals)
        backend = open_backend(config, corpus, plugins, None, {})
        ports = Ports.of(config.sites, dict(zip(self.sites, self.widths, strict=True)))
        options = plugins.options("sae_architectures", config.sae)
        trainer = make_trainer(
            config, plugins, backend, corpus, options, ports, make_schedule(config, plugins), world=world
        )
        give_weights(trainer, config, corpus, dict)
        if self.golden is not None:
            whole = whole_like(trainer.sae)
            whole.load_public_tensors(golden.read(golden.FILES[self.golden]).part("init."))
            give_part(trainer.sae, whole)
        if self.lopsided:
            sae: Any = trainer.sae
            bias, first = getattr(sae, "b_gate", None), sae.share.first_feature(sae.d_sae)
            bias = sae.b_enc if bias is None else bias
            bias.data[: max(self.d_sae // 2 - first, 0)] += 10
        if self.fast:
            trainer.sae.kernels = "fast"
        return trainer


@attrs.frozen
class Found:
    """What came of a case."""

    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]
    fractions: Tensor
    """The last firing fractions of all features."""


def trained(case: Case, world: World = ALONE, rounded: int | None = None) -> Found:
    """The whole SAE after all steps, on the processes of ``world``.

    With a seed ``rounded``, starting weights are changed by their rounding.
    """
    trainer, metrics = case.trainer(world), []
    if rounded is not None:
        generator = torch.Generator().manual_seed(rounded)
        for weights in trainer.sae.parameters():
            noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
            weights.data.mul_(1 + torch.finfo(weights.dtype).eps * noise)
    for batch in case.batches():
        found = trainer.train_on(*_rows(trainer, part := part_of(batch, case, world)), part)
        metrics.append({name: value for name, value in found.items() if isinstance(value, float)})
    sae = trainer.sae if world.features.size == 1 else gathered(trainer.sae)
    weights = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    return Found(weights, metrics, world.share().all_features(trainer.firing.fractions()))


def _rows(trainer: SAETrainer, batch: Batch) -> tuple[Tensor, Tensor | None]:
    return trainer.rows_of(batch)


def part_of(batch: Batch, case: Case, world: World) -> Batch:
    """The rows of this process: as many as the others', or one more and one fewer."""
    parts, n = world.data.size, len(batch)
    counts = [n // parts] * parts
    if case.uneven and parts > 1:
        counts[0], counts[-1] = counts[0] + 1, counts[-1] - 1
    first = sum(counts[: world.data.rank])
    own = batch.at(list(range(first, first + counts[world.data.rank])))
    return attrs.evolve(own, counts=tuple(counts) if parts > 1 else ())


@attrs.frozen
class Call:
    """What every process does: ``function`` is ``module:name``, and takes the world of this arrangement, which calls
    share, and then ``given``."""

    function: str
    data: int = 1
    features: int = 1
    given: tuple[Any, ...] = ()
    saes: int = 1
    parts: bool = True
    """Whether of all that can be divided each process updates a part, as of what is large."""

    @property
    def config(self) -> DistributedConfig:
        return DistributedConfig(data=self.data, features=self.features, saes=self.saes, timeout_s=60)

    def done(self, world: World) -> Any:
        module, name = self.function.split(":")
        with pytest.MonkeyPatch.context() as patch:
            if self.parts:
                patch.setattr(shown, "LARGE", 1)
            return getattr(importlib.import_module(module), name)(world, *self.given)


def steps(world: World, case: Case) -> Found:
    """For :class:`Call`."""
    return trained(case, world)


Results = dict[str, list[Any]]
"""By the labels of calls, what each process made of them."""


def together(calls: Mapping[str, Call], size: int, folder: Path) -> Results:
    """What each of ``size`` processes, which are started once, makes of each of ``calls``."""
    folder.mkdir(exist_ok=True)
    torch.save(dict(calls), folder / "asked.pt")
    launch(size, [__file__, str(folder)])
    found = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(size)]
    return {name: [one[name] for one in found] for name in calls}


def once(folder: Path, calls: Callable[[Path], Mapping[str, Call]], size: int = 2) -> Results:
    """The same for all who name ``folder``, to which ``calls`` is given."""
    return done_once(folder, lambda: together(calls(folder), size, folder / "calls"))


def done_once(folder: Path, work: Callable[[], T]) -> T:
    """What ``work`` returns, for all who name ``folder``, in whatever process: the first does it, the others wait."""
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder / "results.pt").exists():
            torch.save(work(), done)
        found: T = torch.load(done, weights_only=False)
    return found


def launch(size: int, command: Sequence[str], timeout: float = 3600, **environment: str) -> list[str]:
    """Start ``size`` processes of Python as torchrun does; what each has written; an error of any is one here."""
    ends = ended(size, command, timeout, **environment)
    for code, text in ends:
        assert code == 0, f"it ended with {code}: {text[-3000:]}"
    return [text for _, text in ends]


def ended(size: int, command: Sequence[str], timeout: float = 300, **environment: str) -> list[tuple[int, str]]:
    """The same, with the exit code of each; all are forks of one that has imported torch.

    ``SENT``, words such as ``1:KILL:2.5``, has process 1 get that signal after so many seconds.  With ``TORCHRUN``, the
    others get a SIGTERM when one has failed, and so many seconds later a SIGKILL, as torchrun does it after 30.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    shared |= {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    with tempfile.TemporaryDirectory() as folder:
        late = timeout + 60  # for those that it kills itself
        found = warm.python(__file__, "fork", folder, size, timeout, *command, env=shared, timeout=late)
        assert found.returncode == 0, found.stderr
        codes = json.loads(found.stdout)
        return [(code, (Path(folder) / f"{rank}.txt").read_text()) for rank, code in enumerate(codes)]


def fork(folder: Path, size: int, timeout: float, command: list[str]) -> None:
    """Have ``size`` forks of this process run ``command``; tells the exit codes.  What takes longer is killed."""
    children = []
    for rank in range(size):
        if not (child := os.fork()):
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            written = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(written, 1)
            os.dup2(written, 2)
            torch.set_num_threads(1)
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
            sys.exit()
        children.append(child)
    begun, codes = time.monotonic(), dict[int, int]()
    due = [(begun + timeout, child, signal.SIGKILL) for child in children]
    for rank, name, seconds in (one.split(":") for one in os.environ.get("SENT", "").split()):
        due.append((begun + float(seconds), children[int(rank)], signal.Signals[f"SIG{name}"]))
    torchrun, patience = "TORCHRUN" in os.environ, float(os.environ.get("TORCHRUN", "0"))
    while left := [child for child in children if child not in codes]:
        for child in left:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if torchrun and any(codes.values()):
            torchrun, wait = False, [(0, signal.SIGTERM), (patience, signal.SIGKILL)]
            due += [(now + seconds, child, number) for child in left for seconds, number in wait]
        for when, child, number in [one for one in due if one[0] <= now]:
            due.remove((when, child, number))
            if child not in codes:
                os.kill(child, number)
        time.sleep(0.02)
    print(json.dumps([codes[child] for child in children]))


def main(folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    calls: dict[str, Call] = torch.load(folder / "asked.pt", weights_only=False)
    found, worlds = {}, dict[DistributedConfig, World]()
    with contextlib.ExitStack() as ends:
        for name, call in calls.items():  # one world for all of an arrangement: each takes seconds and a dozen threads
            if call.config not in worlds:
                worlds[call.config] = ends.enter_context(open_world(call.config))
            found[name] = call.done(worlds[call.config])
    torch.save(found, folder / f"found-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    from support import processes  # pickles name it so

    if sys.argv[1] == "fork":
        folder, size, timeout, *command = sys.argv[2:]
        processes.fork(Path(folder), int(size), float(timeout), command)
    else:
        processes.main(Path(sys.argv[1]))
