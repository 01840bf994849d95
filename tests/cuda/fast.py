"""The parts that say how fast: products, steps, and those of other libraries."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from cases import CASES, K, Made, precision, rows, trainer_of, weights_of
from torch import Tensor

from saekit.kernels import Encoder, Workspace
from saekit.kernels.encoder import CHUNK

SIZES = [(512, 4096), (768, 24576), (4096, 65536)]
BATCH = 4096
PRECISIONS = {"float32": 1e-5, "TF32": 2e-3, "bfloat16": 1e-2}
"""And how far off a product in each may be: three to ten times what rounding its operands makes."""
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989, "A100": 312,
         "L40S": 362, "L4": 121, "A10": 125, "RTX 4090": 165}  # fmt: skip
"""Teraflops of dense bfloat16 products with sums in float32, from the makers' data sheets, by words of the name; the
first that fits."""
OTHERS = re.compile(r"\b(MIG|Laptop|RTX 4090 D)\b")
"""A part of a GPU, and others that are called nearly the same."""


def sizes(*, quick: bool) -> tuple[list[tuple[int, int]], int]:
    """``(d_in, d_sae)``, and rows of a batch."""
    return ([(16, 1024)], 64) if quick else (SIZES, BATCH)


def seconds(work: Callable[[], object], device: str, *, quick: bool) -> float:
    """The median of some calls, after some that are not counted."""
    for _ in range(1 if quick else 3):
        work()
    times, end = [], time.monotonic() + (0 if quick else 1.5)
    while len(times) < 3 or (time.monotonic() < end and len(times) < 50):
        if device.startswith("cuda"):
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            done.record()
            done.synchronize()
            times.append(begin.elapsed_time(done) / 1000)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak(device: str) -> float | None:
    """Floating-point operations a second, of bfloat16 products; None: not known."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    if OTHERS.search(name):
        return None
    return next((1e12 * flops for words, flops in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def products(device: str, *, quick: bool) -> Made:
    """The encoder's product, in chunks as in a step and rounded as there, beside the peak, and how far off it is."""
    well, best = True, 0.0
    many, n = sizes(quick=quick)
    for d_in, d_sae in many:
        x = rows(n, d_in).to(device)
        encoder = weights_of(d_in, d_sae)["W_dec"].to(device)
        flops = 2.0 * n * d_in * d_sae
        for name in PRECISIONS:
            row: dict[str, Any] = {"size": f"{d_in} -> {d_sae}", "precision": name}
            try:
                with precision(name):
                    taken = seconds(lambda x=x, encoder=encoder: _chunks(x, encoder), device, quick=quick)  # type: ignore[misc]
                    row["off by"] = _off(x, encoder)
            except Exception as error:
                well, row["error"] = False, f"{type(error).__name__}: {error}"[:200]
                yield row
                continue
            well &= row["off by"] < PRECISIONS[name]
            row |= {"ms": 1000 * taken, "teraflops": flops / taken / 1e12}
            if (most := peak(device)) is not None:
                row["of the bfloat16 peak"] = f"{100 * flops / taken / most:.0f} %"
                best = max(best, flops / taken / most)
            yield row
    text = f"at best {100 * best:.0f} % of the bfloat16 peak" if best else ""
    return {"ok": well, "text": text}


def _off(x: Tensor, decoder: Tensor) -> float:
    """How far a part of the product is from that in float64, relative to it."""
    x, decoder = x[:64], decoder[:512]
    made = Encoder(decoder.T, decoder.new_zeros(len(decoder)), Workspace()).product(x).double()
    exact = x.double() @ decoder.double().T
    return float((made - exact).norm() / exact.norm())


def _chunks(x: Tensor, decoder: Tensor) -> None:
    encoder = Encoder(decoder.T, decoder.new_zeros(len(decoder)), Workspace())
    for part in x.split(CHUNK):
        encoder.product(part)


def speed(device: str, *, quick: bool) -> Made:
    """Whole steps in each precision, by plain kernels and, where it is there, by Triton's, and by autograd."""
    well = True
    many, n = sizes(quick=quick)
    for d_in, d_sae in many:
        x, weights = rows(n, d_in).to(device), weights_of(d_in, d_sae)
        for name in ("standard", "topk", "batchtopk"):
            for way in ("", "without Triton", "reference"):
                for row in _each(name, way, x, weights, device, quick=quick):
                    well &= "error" not in row
                    yield row
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
    return {"ok": well}


def _each(
    name: str, way: str, x: Tensor, weights: Mapping[str, Tensor], device: str, *, quick: bool
) -> Iterator[dict[str, Any]]:
    """Steps of one trainer in each precision; nothing where this way is not there."""
    d_in, d_sae = weights["W_enc"].shape
    known: dict[str, Any] = {"size": f"{d_in} -> {d_sae}", "case": name}
    try:
        trainer = step_trainer(name, weights, device)
        sae: Any = trainer.sae
        if way == "reference":
            sae.kernels = "reference"
        elif way:
            if not sae.served_by:
                return
            sae.served_by = type(sae.served_by)()
        known["way"] = trainer.step_path().split(",")[0]
    except Exception as error:
        yield known | {"error": f"{type(error).__name__}: {error}"[:200]}
        return
    for short in PRECISIONS if way != "reference" else ("float32",):
        row = {**known, "precision": short}
        try:
            with precision(short):
                row["µs per token"] = 1e6 * seconds(lambda: trainer.train_on(x), device, quick=quick) / len(x)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        yield row


def step_trainer(name: str, weights: Mapping[str, Tensor], device: str) -> Any:
    """With so small a rate that what is active stays active, and no feature dead."""
    options = {**CASES[name], **({} if name == "standard" else {"k": K})}
    d_in, d_sae = weights["W_enc"].shape
    return trainer_of(options, d_in, d_sae, device, weights=weights, lr=1e-7, dead_feature_window=10**6)


def peers(device: str, *, quick: bool) -> Made:
    """The steps of sae-lens and of sparsify, each by its own code, beside saekit's on the same weights and rows."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here / "bench"), str(here.parent / "bench")]
    import peers as others

    well = True
    left_out = [name for name in ("sae-lens", "eai-sparsify") if others.version(name) is None]
    many, n = sizes(quick=quick)
    for d_in, d_sae in many:
        x, weights = rows(n, d_in).to(device), {key: one.to(device) for key, one in weights_of(d_in, d_sae).items()}
        for name in ("standard", "topk", "batchtopk"):
            try:
                known = others.peer_steps(name, weights, x)
            except Exception as error:
                well, known = False, {}
                yield {"size": f"{d_in} -> {d_sae}", "step": name, "error": f"{type(error).__name__}: {error}"}
            trainer = step_trainer(name, weights, device)
            known[f"saekit {name}"] = lambda trainer=trainer, x=x: trainer.train_on(x)
            for row in _beside(f"{d_in} -> {d_sae}", known, len(x), device, quick=quick):
                well &= "error" not in row
                yield row
            del known, trainer
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    text = f"left out: {', '.join(left_out)}" if left_out else ""
    return {"ok": well, "text": text}


def _beside(size: str, known: Mapping[str, Any], n: int, device: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    for short in ("float32", "TF32"):
        found: list[dict[str, Any]] = []
        for name, work in known.items():
            row: dict[str, Any] = {"size": size, "precision": short, "step": name}
            try:
                with precision(short):
                    row["µs per token"] = 1e6 * seconds(work, device, quick=quick) / n
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            found.append(row)
        own = found[-1].get("µs per token")
        for row in found:
            if own and "µs per token" in row:
                row["by saekit's"] = row["µs per token"] / own
        yield from found
