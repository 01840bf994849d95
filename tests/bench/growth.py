"""How the step grows with the number of features and with the batch: time per token, and memory.

    python tests/bench/growth.py [--plot docs/images/growth.png] [--rounds 3]

Every width is timed in a process of its own, whose peak memory is that of its width.  Prints the fitted exponents of
time per token against the number of features, and the memory beyond parameters, gradients, moments and batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import row

D_IN = 512
WIDTHS = [1 << power for power in range(10, 17)]
BATCHES = [512, 1024, 2048, 4096, 8192]
KINDS = ["standard", "dense", "topk"]


def one(kind: str, d_sae: int, batch: int, rounds: int) -> dict[str, float]:
    """Microseconds per token, and megabytes at the peak of a step."""
    import torch
    from common import megabytes
    from step import CONFIGS, shared_weights, trainer_of

    x = torch.randn(batch, D_IN, generator=torch.Generator().manual_seed(0))
    weights = shared_weights(D_IN, d_sae, x, 48 if kind == "standard" else None)
    trainer = trainer_of(CONFIGS["standard" if kind == "dense" else kind](d_sae), weights)
    del weights
    parameters = sum(parameter.numel() * 4 for parameter in trainer.sae.parameters()) / 1e6
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the libraries take their own memory
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    before = megabytes("VmRSS")
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        trainer.train_on(x)
        times.append(time.perf_counter() - start)
    peak = megabytes("VmHWM")
    # The parameters and x were there before; gradients and two moments came, and one batch goes with the output.
    return {
        "us": statistics.median(times[2:]) / batch * 1e6,
        "beyond": peak - before - 3 * parameters,
        "buffer": 1024 * d_sae * 4 / 1e6,
        "batch": batch * D_IN * 4 / 1e6,
    }


def measured(kind: str, d_sae: int, batch: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", kind, str(d_sae), str(batch), "--rounds", str(rounds)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def exponent(sizes: list[int], times: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def large(widths: list[int], found: list[dict[str, float]]) -> tuple[list[int], list[float]]:
    """Those from 4,096 features on, with their times."""
    pairs = [(width, one["us"]) for width, one in zip(widths, found, strict=True) if width >= 4096]
    return [width for width, _ in pairs], [time for _, time in pairs]


def plot(
    path: Path,
    widths: list[int],
    by_width: dict[str, list[dict[str, float]]],
    batches: list[int],
    by_batch: dict[str, list[dict[str, float]]],
) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (time_axes, batch_axes, memory_axes) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for kind, found in by_width.items():
        times = [one["us"] for one in found]
        time_axes.loglog(widths, times, "o-", label=f"{kind}: features^{exponent(*large(widths, found)):.2f}")
        memory_axes.plot(widths, [one["beyond"] / one["buffer"] for one in found], "o-", label=kind)
    for kind, found in by_batch.items():
        batch_axes.plot(batches, [one["us"] for one in found], "o-", label=kind)
    batch_axes.set_xscale("log", base=2)
    batch_axes.set_xticks(batches, map(str, batches))
    allowed = [1.5 + one["batch"] / one["buffer"] for one in by_width[KINDS[0]]]
    memory_axes.plot(widths, allowed, "k--", label="1.5 buffers and a batch")
    memory_axes.set(xscale="log", ylim=(0, 8), xlabel="features", ylabel="memory in buffers of [1024, features]")
    time_axes.set(xlabel="features", ylabel="µs per token", title=f"width {D_IN}, batch 4096")
    batch_axes.set(xlabel="batch", ylabel="µs per token", title=f"{D_IN} → 16384", ylim=(0, None))
    memory_axes.set_title("peak beyond weights, gradients, moments")
    for axes in (time_axes, batch_axes, memory_axes):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "FEATURES", "BATCH"), help=argparse.SUPPRESS)
    asked: Any = parser.parse_args()
    if asked.one:
        kind, d_sae, batch = asked.one
        print(json.dumps(one(kind, int(d_sae), int(batch), asked.rounds)))
        return
    by_width = {kind: [measured(kind, d_sae, 4096, asked.rounds) for d_sae in asked.widths] for kind in KINDS}
    by_batch = {
        kind: [measured(kind, 16384, batch, asked.rounds) for batch in asked.batches] for kind in ("standard", "topk")
    }
    for kind, found in by_width.items():
        for d_sae, numbers in zip(asked.widths, found, strict=True):
            allowed = 1.5 * numbers["buffer"] + numbers["batch"]
            told = {
                "µs per token": numbers["us"],
                "beyond, MB": numbers["beyond"],
                "1.5 buffers and a batch, MB": allowed,
            }
            row(f"width {D_IN}, batch 4096", f"{kind}, {d_sae:,} features", told)
            print(
                f"  {kind:8} {d_sae:6} features  {numbers['us']:8.2f} µs/token  {numbers['beyond']:7.1f} MB beyond "
                f"parameters, gradients and moments; 1.5 buffers and a batch are {allowed:.1f} MB"
            )
        if len(grown := large(asked.widths, found)[0]) > 1:
            power = exponent(*large(asked.widths, found))
            row("time per token grows as features to the power of", kind, {"power": power, "from": f"{grown[0]:,} on"})
            print(f"  {kind}: time per token grows as features^{power:.2f} from {grown[0]} features on")
    for kind, found in by_batch.items():
        for batch, numbers in zip(asked.batches, found, strict=True):
            row(f"{D_IN} → 16,384 by batch", f"{kind}, {batch:,} rows", {"µs per token": numbers["us"]})
            print(f"  {kind:8} batch {batch:5}  {numbers['us']:8.2f} µs/token")
    if asked.plot:
        plot(asked.plot, asked.widths, by_width, asked.batches, by_batch)


if __name__ == "__main__":
    main()
