"""Steps and inference of architectures on this machine, beside one product with an encoder; `saekit bench` shows it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.config import TrainConfig, TrainingConfig
from saekit.config.fields import a_size
from saekit.config.files import load_config
from saekit.defaults import BENCHED
from saekit.devices import resolve_device
from saekit.errors import ConfigError, SaekitError
from saekit.kernels.workspace import SHARED
from saekit.kinds import SAE_ARCHITECTURES, STEP_KERNELS
from saekit.plugins.building import blamed
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.runs.machine import Machine, this_machine
from saekit.runs.parts import make_optimizer
from saekit.runs.steady import Spread, seconds_in_turn
from saekit.runs.timing import bytes_text, least_seconds
from saekit.runs.working_memory import free_memory
from saekit.sae.build import build_module, initialize
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.training.firing import FiringStatistics
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.trainer import SAETrainer
from saekit.values import Ports

__all__ = ["Bench", "Found", "Timed", "encoder_product", "resting_trainer", "time_machine"]

_MOST, _LEAST = 4096, 256  # rows of a batch
_L0, _K = 48, 32  # features of a row, of architectures that leave it open and of those that have a `k`
_STEP, _PLAIN, _USE = 2.0, 11.0, 1.5  # about what a step, one in plain torch, and each use takes, in products
_CALLS = 5  # of each that there should be time for, but in plain torch, of which one will do
_NEEDED = _CALLS * (1 + _STEP + 3 * _USE) + _PLAIN  # by an architecture, in products
_A_ROW = 30  # calls that tell how fast products are
_RATE = 1e-7  # of learning: so that what is active stays active
_HALVINGS = 24  # until as many features are active
_NEVER = 1 << 62  # steps
_FEW = 32  # rows on which these are counted again and again
_SHARE = 0.85  # of the time that is given: what may be foreseen to be needed


def _sizes(_: object, attribute: object, value: Sequence[tuple[int, int]]) -> None:
    if not value or any(len(size) != 2 or min(size) < 1 or math.prod(size) > 2**40 for size in value):
        raise ConfigError([("size", f"must be pairs of a width and a number of features, 1 or more; found {value!r}")])


def _seconds(_: object, attribute: object, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError([("seconds", f"must be above 0; found {value:g}")])


@attrs.frozen(kw_only=True)
class Bench:
    """What is timed."""

    architectures: tuple[str, ...] = BENCHED
    """Their keys."""
    sizes: tuple[tuple[int, int], ...] = attrs.field(default=((512, 4096), (768, 24576)), validator=_sizes)
    """Widths and numbers of features."""
    device: str = "auto"
    seconds: float = attrs.field(default=120.0, validator=_seconds)
    """About what all of it takes.  With less, calls are fewer, and batches smaller where they would be too few."""
    rows: int = attrs.field(default=_MOST, validator=a_size)
    """Of a batch, at most."""


@attrs.frozen(kw_only=True)
class Timed:
    """One architecture in one size.  Times are seconds of a whole batch, the lower quartiles of several calls.

    What other programs do makes calls longer, and never shorter; the least alone would be a matter of luck.
    """

    architecture: str
    d_in: int
    d_sae: int
    rows: int
    product: float
    """Of one product with an encoder, ``mm1``."""
    l0: float | None
    """Features that are active in a row while it trains; None: its steps do not tell."""
    step: float
    """Of a training step by the way that is taken."""
    plain: float
    """Of one in plain torch."""
    uses: Mapping[str, float]
    """Of inference without gradients, by what is called."""
    calls: Mapping[str, Spread] = attrs.field(factory=dict)
    """How far the calls lie apart: of `product`, `step`, `plain` where that is another way, and each of `uses`."""
    path: str
    """The way of a step, in words."""
    why_plain: str | None
    """Why that is plain torch; None: it is not."""
    if_fast: str | None
    """What `training.kernels = "fast"` would say against it; None: it would take the fast kernels."""
    if_int8: str | None
    """What `"int8"` would; None: it would take them, with a first look in 8-bit integers."""
    others: Sequence[str] = ()
    """Step kernels of plugins for this architecture, and why each is not at work here."""

    def unsteady(self, name: str) -> bool:
        """Whether the time of this name, as in `calls`, may be another the next time."""
        return name in self.calls and self.calls[name].unsteady

    def microseconds(self, seconds: float) -> float:
        """For each token."""
        return seconds / self.rows * 1e6

    def flops_in(self, seconds: float) -> float:
        """In a second, where the product takes ``seconds``."""
        return 2.0 * self.rows * self.d_in * self.d_sae / seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = attrs.asdict(self)
        calls = {name: attrs.asdict(spread) for name, spread in self.calls.items()}
        return {**found, "uses": dict(self.uses), "calls": calls, "others": list(self.others)}


@attrs.frozen(kw_only=True)
class Found:
    """What a bench found."""

    machine: Machine
    device: str
    timed: Sequence[Timed]
    busy: float | None
    """Programs that were at work beside it in the minute before; None: the system does not tell."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        rows = [one.to_dict() for one in self.timed]
        return {"machine": self.machine.to_dict(), "device": self.device, "busy": self.busy, "rows": rows}


def time_machine(bench: Bench, plugins: PluginManager, say: Callable[[str], object] = lambda doing: None) -> Found:
    """Time all of ``bench``, and tell ``say`` what is timed now.

    :class:`ConfigError` for what cannot be: an unknown architecture, one that is not trained or not on one site, a
    device that is not there, a size that memory does not hold.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with ambient():
        device = resolve_device(bench.device, "device")
        items = [plugins.get(SAE_ARCHITECTURES, key) for key in dict.fromkeys(bench.architectures)]
        for item in items:
            item.check_requirements()
        configs = {
            (item, size): _config(item, size, device, plugins) for item in items for size in dict.fromkeys(bench.sizes)
        }
        try:
            for (item, size), config in configs.items():  # what is refused, before anything takes long
                _rows_for(size, device)
                _made(item, config, size[0], plugins)
            found = [*_all(bench, configs, device, plugins, say)]
        finally:
            SHARED.release()
        return Found(machine=this_machine(device), device=device, timed=found, busy=busy)


def _all(
    bench: Bench,
    configs: Mapping[tuple[Registered, tuple[int, int]], TrainConfig],
    device: str,
    plugins: PluginManager,
    say: Callable[[str], object],
) -> Iterator[Timed]:
    say("looking how fast this machine multiplies")
    ends = time.perf_counter() + bench.seconds
    sizes = [*dict.fromkeys(size for _, size in configs)]
    number = len(configs) // len(sizes)
    needed = {size: number * _NEEDED * _a_row(size, device, bench.seconds / 50) for size in sizes}  # by a row
    rows = _rows(bench, needed, device)
    left = sum(rows[size] * needed[size] for size in sizes)
    for size in sizes:
        x = torch.randn(rows[size], size[0], generator=torch.Generator().manual_seed(0)).to(device)
        for (item, own), config in configs.items():
            if own == size:
                say(f"timing {item.key}, {size[0]:,} → {size[1]:,}")
                need, now = rows[size] * needed[size] / number, time.perf_counter()
                yield _timed(item, config, size, x, now + (ends - now) * min(need / left, 1.0), plugins)
                left -= need


def _rows(bench: Bench, needed: Mapping[tuple[int, int], float], device: str) -> dict[tuple[int, int], int]:
    """Rows of a batch of each size: half as many of what takes the most time, until all that is needed fits."""
    rows = {size: min(bench.rows, _rows_for(size, device)) for size in needed}
    while sum(rows[size] * each for size, each in needed.items()) > _SHARE * bench.seconds:
        smaller = [size for size in needed if rows[size] > _LEAST]
        if not smaller:
            break
        size = max(smaller, key=lambda size: rows[size] * needed[size])
        rows[size] = max(rows[size] // 2, _LEAST)
    return rows


def _config(item: Registered, size: tuple[int, int], device: str, plugins: PluginManager) -> TrainConfig:
    """A run of the architecture with its defaults, which would not learn for a long time."""
    options = {field.name for field in attrs.fields(item.entry.config)}
    table: dict[str, Any] = {"name": item.key, "d_sae": size[1]}
    if "k" in options:
        table["k"] = min(_K, size[1])
    training = {"training_tokens": 10**12, "log_frequency": 10**6, "device": device}
    return load_config({"sae": table, "training": training}, plugins=plugins)


def _made(item: Registered, config: TrainConfig, d_in: int, plugins: PluginManager) -> SAEModule:
    sae = build_module(item, plugins.options(SAE_ARCHITECTURES, config.sae), Ports.one(d_in), plugins)
    if (why := sae.why_no_training) is not None:
        raise ConfigError([("architecture", f"{item.key} is for inference alone and has no steps to time: {why}")])
    if sae.reads_sequences or not sae.ports.same:
        raise ConfigError([("architecture", f"{item.key} does not read the rows of one site, which is what is timed")])
    return sae


def _rows_for(size: tuple[int, int], device: str) -> int:
    """Rows of a batch that memory holds; :class:`ConfigError` where it holds not even a few.

    Plain torch keeps features of all rows about five times; weights, gradients and two moments are four copies.
    """
    weights, row = 4 * 2 * math.prod(size) * 4, 5 * size[1] * 4
    free = free_memory([device]).get(device, math.inf)
    if weights + _LEAST * row > free:
        raise ConfigError(
            [("size", f"{size[0]}x{size[1]} needs {bytes_text(weights + _LEAST * row)}, and {bytes_text(free)} are "
              f"free on {device}; choose a smaller one")]
        )  # fmt: skip
    return int(min((free - weights) / row, 2**31))


def encoder_product(x: Tensor, turned: Tensor) -> Callable[[], Tensor]:
    """What is called ``mm1``: ``x [n, d_in]`` times an encoder, of which ``turned [d_sae, d_in]`` is the transpose."""
    out = torch.empty(len(x), len(turned), dtype=x.dtype, device=x.device)
    return lambda: torch.mm(x, turned.T, out=out)


def _a_row(size: tuple[int, int], device: str, budget: float) -> float:
    """Seconds of the product for one row, about."""
    x, turned = torch.ones(_LEAST, size[0], device=device), torch.ones(size[1], size[0], device=device)
    return least_seconds(encoder_product(x, turned), device, most=_A_ROW, budget=budget) / _LEAST


def resting_trainer(
    sae: SAEModule, optimizer: ScheduledOptimizer, training: TrainingConfig | None = None, device: str = "cpu"
) -> SAETrainer:
    """One whose features never count as dead and which logs nothing after its first step: each does the same work.

    ``optimizer`` should learn next to nothing, so that what is active stays active.
    """
    return SAETrainer(
        name="bench", sae=sae, sites=Sites.one(Site()), optimizer=optimizer, device=device,
        training=training or TrainingConfig(training_tokens=10**10, log_frequency=10**6),
        generator=torch.Generator(device).manual_seed(0),
        firing=FiringStatistics(sae.d_sae, dead_after=_NEVER, window=_NEVER, device=device),
    )  # fmt: skip


def _timed(
    item: Registered, config: TrainConfig, size: tuple[int, int], x: Tensor, ends: float, plugins: PluginManager
) -> Timed:
    """Until the clock shows about ``ends``; the product too, so that all of it meets the same machine."""
    device = str(x.device)
    sae = _made(item, config, size[0], plugins)
    with blamed(item, "while it was timed", at_work=True):
        initialize(sae, torch.Generator().manual_seed(0), x[:_LEAST].cpu())
        sae.to(device)
        _leave_active(sae, x[:_LEAST])
        trainer = resting_trainer(
            sae, make_optimizer(config, plugins, sae, lambda step: _RATE), config.training, device
        )
        l0 = _number(trainer.train_on(x).get("metrics/l0"))  # which its first step tells
        turned = torch.randn(size[1], size[0], generator=torch.Generator().manual_seed(1)).to(device)
        path, why = trainer.step_path(), trainer.why_reference()
        uses = _uses(sae, x)
        works = {"product": encoder_product(x, turned), "step": lambda: trainer.train_on(x), **uses}
        if why is None:
            works["plain"] = lambda: _by(trainer, "reference", lambda: trainer.train_on(x))
        calls = seconds_in_turn(works, device, ends)
        if_fast, if_int8 = (_by(trainer, kernels, trainer.why_reference) for kernels in ("fast", "int8"))
    seconds = {name: spread.low for name, spread in calls.items()}
    return Timed(
        architecture=item.key, d_in=size[0], d_sae=sae.d_sae, rows=len(x), product=seconds["product"], l0=l0,
        step=seconds["step"], plain=seconds.get("plain", seconds["step"]), uses={name: seconds[name] for name in uses},
        calls=calls, path=path, why_plain=why, if_fast=if_fast, if_int8=if_int8, others=_others(item, sae, plugins),
    )  # fmt: skip


def _number(found: object) -> float | None:
    return found if isinstance(found, float) and math.isfinite(found) else None


def _by(trainer: SAETrainer, kernels: Any, work: Callable[[], Any]) -> Any:
    """What ``work`` gives with ``training.kernels`` set so."""
    kept, trainer.sae.kernels = trainer.sae.kernels, kernels
    try:
        return work()
    finally:
        trainer.sae.kernels = kept


def _uses(sae: SAEModule, x: Tensor) -> dict[str, Callable[[], object]]:
    """Inference, by what is called."""
    calls: dict[str, Callable[[], object]] = {
        "sae(x)": lambda: sae(x),
        "decode(encode(x))": lambda: sae.decode(sae.encode(x), like=x),
        "encode_sparse(x)": lambda: sae.encode_sparse(x),
    }
    return {name: functools.partial(_without_gradients, call) for name, call in calls.items()}


def _without_gradients(call: Callable[[], object]) -> None:
    with torch.no_grad():
        call()


@torch.no_grad()
def _leave_active(sae: SAEModule, rows: Tensor) -> None:
    """Late in training few features are active.  Where more are at the start, or none, shift what they are made of."""

    def active(some: Tensor) -> float:
        return len(sae.encode_sparse(some).values) / len(some)

    wanted, found = min(_L0, sae.d_sae / 2), active(rows)
    if 0 < found <= wanted:
        return
    few, at = rows[:_FEW], 0.0
    if not _can_be_shifted(sae):
        return
    with contextlib.suppress(NotImplementedError):  # of one that has none, as it is
        pre = sae.pre_activations(rows)
        high = float(pre.abs().max()) + 1.0  # as a threshold may be
        low, middle = -high, -float(pre.flatten().topk(int(wanted * len(rows))).values[-1])
        for number in range(_HALVINGS):
            sae.shift_pre_activations(torch.full((sae.d_sae,), middle - at, device=rows.device))
            at, found = middle, active(few if number else rows)
            if abs(found - wanted) <= 0.05 * wanted:
                return
            low, high = (low, middle) if found > wanted else (middle, high)
            middle = (low + high) / 2


def _can_be_shifted(sae: SAEModule) -> bool:
    """Whether it has pre-activations and a bias of them: those of every SAE, or as it says itself."""
    names, own = {name for name, _ in sae.named_parameters()}, type(sae)
    has_pre = "W_enc" in names or own.pre_activations is not SAEModule.pre_activations
    return has_pre and ("b_enc" in names or own.shift_pre_activations is not SAEModule.shift_pre_activations)


def _others(item: Registered, sae: SAEModule, plugins: PluginManager) -> list[str]:
    """Step kernels of plugins for this architecture that do not work here, and why."""
    told = []
    for one in plugins.registry(STEP_KERNELS).items:
        if item.key not in one.entry.serves:
            continue
        if missing := one.missing():
            told.append(f"{one.key} needs {' and '.join(missing)}, which is not installed")
            continue
        with contextlib.suppress(SaekitError, ImportError):  # that it cannot be built was warned of
            kernel = plugins.build(STEP_KERNELS, one.key)
            if sae.device.type not in kernel.devices:
                told.append(f"{one.key} is for {' and '.join(sorted(kernel.devices))}")
    return told
