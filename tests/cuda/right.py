"""The parts that say whether steps on a device are what they should be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from cases import CASES, Made, rows, target_of, trainer_of, weights_of

from saekit.data import ShuffleBuffer
from saekit.planning.step_costs import step_bytes
from saekit.site import Site, Sites
from saekit.training.loop import Lane, fit
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, StepInput


def steps(device: str, *, quick: bool) -> Made:
    """Six steps in float64 on the CPU and on the device, of which features are dead in some: parameters to 1e-9."""
    d_in, d_sae, n = (12, 96, 70) if quick else (64, 1024, 2500)
    found = []
    for name, options in CASES.items():
        row: dict[str, Any] = {"case": name}
        try:
            one = _trained(options, "cpu", d_in, d_sae, n)
            other = _trained(options, device, d_in, d_sae, n)
            off = {key: _off(one.sae.state_dict()[key], value) for key, value in other.sae.state_dict().items()}
            worst = max(off, key=lambda key: off[key])
            row |= {"well": all(value < 1e-9 for value in off.values()), "worst": worst, "off by": off[worst]}
            row["way"] = other.step_path()
        except Exception as error:
            row |= {"well": False, "error": f"{type(error).__name__}: {error}"}
        found.append(row)
        yield row
    return _judged(found)


def _trained(options: Mapping[str, Any], device: str, d_in: int, d_sae: int, n: int) -> SAETrainer:
    trainer = trainer_of({**options, "dtype": "float64"}, d_in, d_sae, device)
    sae: Any = trainer.sae
    sae.kernels = "auto" if options["name"] in ("abstopk", "groupmax", "groupmax_transcoder") else "fast"
    x, target = rows(n, d_in, torch.float64), target_of(options, n, d_in, torch.float64)
    for step in range(6):
        dead = (torch.arange(d_sae, device=device) % 5 == 0) & (step > 2)
        given = StepInput(
            step=step, generator=trainer.generator, dead=dead, target=None if target is None else target.to(device)
        )
        found = sae.training_step(x.to(device), given)
        sae.before_update()
        trainer.optimizer.step(step, found.loss)
        sae.after_update()
    return trainer


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far ``other`` is from ``one``, relative to it; where that is no number, infinitely far."""
    one, other = one.double(), other.double().cpu()
    found = float((one - other).norm() / (one.norm() + 1e-12))
    return math.inf if math.isnan(found) else found


READ, WRITTEN = Site(hook_name="read"), Site(hook_name="written")
UNWATCHED = 4
"""Batches in which first handles and memory are made; afterwards features are dead."""


class Batches:
    """Some batches of ``rows``, which lie on the CPU, through a shuffle buffer on the device.

    From the fifth on, until they end, torch watches for whatever waits for the device.
    """

    def __init__(self, rows: Mapping[Site, torch.Tensor], device: str) -> None:
        self._rows, self._device, self._left = Batch(rows), device, iter(range(2 * UNWATCHED))
        self._buffer = ShuffleBuffer(
            {site: values.shape[1] for site, values in rows.items()},
            2 * len(self._rows),
            generator=torch.Generator().manual_seed(1),
            dtypes={site: values.dtype for site, values in rows.items()},
            device=device,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if next(self._left) == UNWATCHED:
            self.watch("error")
        while self._buffer.free >= len(self._rows):
            self._buffer.add(self._rows)
        self._buffer.shuffle()
        return self._buffer.take(len(self._rows))

    def watch(self, mode: str) -> None:
        """Have torch fail, or not, where something waits for the device."""
        if self._device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode(mode)


def waits(device: str, *, quick: bool) -> Made:
    """The loop from a buffer on the device on, under torch's watch for what waits for it."""
    found = []
    for name, options in CASES.items():
        found.append(_fitted(name, options, None, device, quick=quick))
        yield found[-1]
    found.append(_fitted("topk", CASES["topk"], "medium", device, quick=quick))
    yield found[-1]
    return _judged(found)


def _fitted(
    name: str, options: Mapping[str, Any], precision: str | None, device: str, *, quick: bool
) -> dict[str, Any]:
    d_in, d_sae, n = (12, 96, 70) if quick else (256, 4096, 4096)
    trainer = trainer_of(options, d_in, d_sae, device, matmul_precision=precision)
    row: dict[str, Any] = {"case": name, "precision": precision or "", "way": trainer.step_path()}
    x, target = rows(n, d_in), target_of(options, n, d_in)
    trainer.sites = Sites.one(READ) if target is None else Sites((READ,), (WRITTEN,))
    batches: Any = Batches({READ: x} if target is None else {READ: x, WRITTEN: target}, device)
    try:
        try:
            fit([Lane(batches, [trainer])])
        finally:
            batches.watch("default")
        trainer.check_weights()
    except Exception as error:
        return row | {"well": False, "error": f"{type(error).__name__}: {error}"}
    well = trainer.diverged is None and trainer.step == 2 * UNWATCHED
    return row | {"well": well, "dead": int(trainer.firing.dead().sum())}


def determinism(device: str, *, quick: bool) -> Made:
    """Two trainings of the same: all parameters have the same bytes."""
    d_in, d_sae, n, length = (12, 96, 70, 6) if quick else (256, 8192, 4096, 40)
    found = []
    for name, options in CASES.items():
        sums = []
        for _ in range(2):
            trainer = trainer_of(options, d_in, d_sae, device)
            for step in range(length):
                trainer.train_on(rows(n, d_in, seed=step % 4), target_of(options, n, d_in))
            sums.append(_digest(trainer))
        found.append({"case": name, "well": sums[0] == sums[1], "way": trainer.step_path()})
        yield found[-1]
    return _judged(found)


def _digest(trainer: SAETrainer) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(trainer.sae.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def memory(device: str, *, quick: bool) -> Made:
    """The peak of a few steps beside what `saekit plan` counts for them: within a fifth of it, or below."""
    sizes = [(12, 96, 70)] if quick else [(512, 4096, 4096), (768, 24576, 4096), (4096, 65536, 4096)]
    found = []
    for d_in, d_sae, n in sizes:
        weights = weights_of(d_in, d_sae)
        for name in ("standard", "topk", "batchtopk", "jumprelu"):
            found.append(_measured(name, weights, n, device))
            yield found[-1]
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    return _judged(found)


def _measured(name: str, start: Mapping[str, torch.Tensor], n: int, device: str) -> dict[str, Any]:
    d_in, d_sae = start["W_enc"].shape
    cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else 0
    trainer = trainer_of(CASES[name], d_in, d_sae, device, weights=start, train_batch_size_tokens=n)
    weights = sum(value.nbytes for value in trainer.sae.parameters())
    planned = 4 * weights + step_bytes(trainer.sae, trainer.training, device)  # gradients, and two moments
    x = rows(n, d_in)
    for step in range(5):
        if cuda and step == 3:  # what is kept is there, and features are dead
            torch.cuda.reset_peak_memory_stats()
        trainer.train_on(x)
    row: dict[str, Any] = {"case": name, "size": f"{d_in} -> {d_sae}", "planned MB": planned / 1e6}
    if not cuda:
        return row | {"well": True}
    peak = torch.cuda.max_memory_allocated() - before
    return row | {"peak MB": peak / 1e6, "ratio": peak / planned, "well": peak < 1.2 * planned}


def _judged(found: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [row for row in found if not row["well"]]
    return {"ok": not bad, "text": f"{len(found) - len(bad)} of {len(found)}"}
