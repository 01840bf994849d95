"""The parts that say how fast: products, steps, and those of other libraries."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cases import CASES, K, precision, rows, trainer_of
from torch import Tensor

from saekit.kernels import Encoder, Workspace
from saekit.kernels.encoder import CHUNK

SIZES = [(512, 4096), (768, 24576), (4096, 65536)]
BATCH = 4096
PRECISIONS = ("float32", "TF32", "bfloat16")
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "L40S": 362, "L4": 121,
         "A10": 125, "RTX 4090": 165}  # fmt: skip
"""Teraflops of dense bfloat16 products with sums in float32, from the makers' data sheets, by a part of the name."""


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
    return next((1e12 * flops for part, flops in PEAKS.items() if part in name), None)


def weights_of(d_in: int, d_sae: int) -> dict[str, Tensor]:
    """Unit decoder rows, the encoder their transpose."""
    decoder = torch.nn.functional.normalize(rows(d_sae, d_in, seed=1), dim=1)
    return {"W_enc": decoder.T.contiguous(), "W_dec": decoder, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}


def products(device: str, *, quick: bool) -> dict[str, Any]:
    """The encoder's product, in chunks as in a step and rounded as there, beside the peak; and torch's own in one."""
    found, best = [], 0.0
    many, n = sizes(quick=quick)
    for d_in, d_sae in many:
        x = rows(n, d_in).to(device)
        encoder = weights_of(d_in, d_sae)["W_dec"].to(device)
        flops = 2.0 * n * d_in * d_sae
        for name in PRECISIONS:
            row: dict[str, Any] = {"size": f"{d_in} -> {d_sae}", "precision": name}
            with precision(name):
                taken = seconds(lambda x=x, encoder=encoder: _chunks(x, encoder), device, quick=quick)  # type: ignore[misc]
            row |= {"ms": 1000 * taken, "teraflops": flops / taken / 1e12}
            if (most := peak(device)) is not None:
                row["of the bfloat16 peak"] = f"{100 * flops / taken / most:.0f} %"
                best = max(best, flops / taken / most)
            found.append(row)
    text = f"at best {100 * best:.0f} % of the bfloat16 peak" if best else ""
    return {"ok": True, "rows": found, "text": text}


def _chunks(x: Tensor, decoder: Tensor) -> None:
    encoder = Encoder(decoder.T, decoder.new_zeros(len(decoder)), Workspace())
    for part in x.split(CHUNK):
        encoder.product(part)


def speed(device: str, *, quick: bool) -> dict[str, Any]:
    """Whole steps in each precision, by plain kernels and, where it is there, by Triton's, and by autograd."""
    found = []
    many, n = sizes(quick=quick)
    for d_in, d_sae in many:
        x, weights = rows(n, d_in).to(device), weights_of(d_in, d_sae)
        for name in ("standard", "topk", "batchtopk"):
            for way in ("", "without Triton", "reference"):
                for short in PRECISIONS if way != "reference" else ("float32",):
                    row = _one(name, way, short, x, weights, device, quick=quick)
                    found += [] if row is None else [row]
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
    return {"ok": all("error" not in row for row in found), "rows": found}


def _one(
    name: str, way: str, short: str, x: Tensor, weights: Mapping[str, Tensor], device: str, *, quick: bool
) -> dict[str, Any] | None:
    d_in, d_sae = weights["W_enc"].shape
    row: dict[str, Any] = {"size": f"{d_in} -> {d_sae}", "case": name, "precision": short}
    try:
        trainer = step_trainer(name, weights, device)
        sae: Any = trainer.sae
        if way == "reference":
            sae.kernels = "reference"
        elif way:
            if not sae.served_by:
                return None
            sae.served_by = type(sae.served_by)()
        row["way"] = trainer.step_path().split(",")[0]
        with precision(short):
            row["µs per token"] = 1e6 * seconds(lambda: trainer.train_on(x), device, quick=quick) / len(x)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    return row


def step_trainer(name: str, weights: Mapping[str, Tensor], device: str) -> Any:
    """With so small a rate that what is active stays active, and no feature dead."""
    options = {**CASES[name], **({} if name == "standard" else {"k": K})}
    d_in, d_sae = weights["W_enc"].shape
    return trainer_of(options, d_in, d_sae, device, weights=weights, lr=1e-7, dead_feature_window=10**6)


def peers(device: str, *, quick: bool) -> dict[str, Any]:
    """The steps of sae-lens and of sparsify, each by its own code, beside saekit's on the same weights and rows."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here / "bench"), str(here.parent / "bench")]
    import peers as others

    found: list[dict[str, Any]] = []
    left_out = [name for name in ("sae-lens", "eai-sparsify") if others.version(name) is None]
    many, n = sizes(quick=quick)
    for d_in, d_sae in many:
        x, weights = rows(n, d_in).to(device), {key: one.to(device) for key, one in weights_of(d_in, d_sae).items()}
        for name in ("standard", "topk", "batchtopk"):
            try:
                known = others.peer_steps(name, weights, x)
            except Exception as error:
                found.append({"size": f"{d_in} -> {d_sae}", "step": name, "error": f"{type(error).__name__}: {error}"})
                known = {}
            trainer = step_trainer(name, weights, device)
            known[f"saekit {name}"] = lambda trainer=trainer, x=x: trainer.train_on(x)
            found += _beside(f"{d_in} -> {d_sae}", known, len(x), device, quick=quick)
            del known, trainer
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    text = f"left out: {', '.join(left_out)}" if left_out else ""
    return {"ok": all("error" not in row for row in found), "rows": found, "text": text}


def _beside(size: str, known: Mapping[str, Any], n: int, device: str, *, quick: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for short in ("float32", "TF32"):
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
            if own and row["precision"] == short and "µs per token" in row:
                row["by saekit's"] = row["µs per token"] / own
    return found
