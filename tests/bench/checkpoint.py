"""How long the loop stands still for a checkpoint that is written behind it, and for one that is waited for.

Beside both: a copy of as many bytes in memory, writing as many to the same disk, and a training step.

    python tests/bench/checkpoint.py [--rounds 5] [--quick] [--folder FOLDER]

A real session: a live source with its buffer, an SAE 768 -> 24576 with Adam's moments.  Prints figures; it judges
nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import language_model, random_contexts, settings
from figures import DISK, cut, late, row, spread

import saekit
from saekit.runs.interruption import Interruption
from saekit.runs.saving import Saving
from saekit.runs.session import Session
from saekit.runs.trackers import Trackers


def timed(work: Callable[[], object]) -> float:
    """Seconds, with nothing left to be written before or after."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copied(size: int) -> None:
    """``size`` bytes into new memory, as a staged checkpoint is."""
    source = torch.zeros(min(size, 1 << 26) // 4)
    for start in range(0, size, source.nbytes):
        kept.append(source[: (size - start) // 4].clone())


kept: list[torch.Tensor] = []


def write(path: Path, size: int) -> None:
    """``size`` bytes as one file, and on the disk."""
    piece = torch.randint(256, (16_000_000,), dtype=torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small SAE, to try the script")
    parser.add_argument("--folder", default=None, help="where to write; by default the system's temporary folder")
    options = parser.parse_args()
    d_model, d_sae = (64, 512) if options.quick else (768, 24576)
    model, dataset = language_model(1, d_model, 8), random_contexts(2048)
    table = settings("blocks.0.hook_resid_pre", {"store_batch_size_prompts": 16, "n_batches_in_buffer": 32})
    table["sae"]["d_sae"] = d_sae
    table["checkpoints"] = {"keep_last": 1}
    config = saekit.load_config(table)
    session = Session({"sae": config}, saekit.default_manager(), model, dataset)
    session.give_weights()
    (lane,) = session.lanes
    (trainer,) = lane.trainers
    site = config.site
    folder = Path(tempfile.mkdtemp(dir=options.folder or os.environ.get(DISK)))
    try:
        saving = Saving(session, folder, {"sae": Trackers({})}, Interruption())
        behind, saves, copies, writes, sizes = [], [], [], [], []
        batch = next(lane.source).activations[site]
        steps = [timed(lambda: trainer.train_on(batch))]
        for number in range(options.rounds):
            if number and late():
                cut(f"{number} of {options.rounds} rounds")
                break
            lane.batches = 2 * number + 1
            behind.append(timed(saving.save_if_possible))
            saving.settle()
            lane.batches += 1
            saves.append(timed(saving.save))
            sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
            copies.append(timed(lambda: copied(sizes[-1])))
            kept.clear()
            writes.append(timed(lambda: write(folder / "bytes", sizes[-1])))
            (folder / "bytes").unlink()
    finally:
        session.close()
        shutil.rmtree(folder)
    median = statistics.median
    title = f"SAE {d_model} → {d_sae:,}, a checkpoint of {sizes[-1] / 1e6:,.0f} MB"
    print(f"  {title}, {len(behind)} rounds")
    for name, values in (
        ("written behind", behind), ("a copy of its bytes", copies), ("waited for", saves),
        ("its bytes to the disk", writes), ("training step", steps),
    ):  # fmt: skip
        row(title, name, {"seconds": spread(values)})
        print(f"  {name:21}  {median(values):7.3f} s  ({min(values):.3f}-{max(values):.3f})")
    beyond = [one - other for one, other in zip(behind, copies, strict=True)]
    before = [one - other for one, other in zip(saves, copies, strict=True)]
    row(title, "beyond a copy, written behind", {"seconds": spread(beyond)})
    row(title, "beyond a copy, waited for", {"seconds": spread(before)})
    print(f"  the loop stands still beyond a copy: {median(beyond):.3f} s; if it waited: {median(before):.3f} s")
    print(f"  waited for / its bytes to the disk  {median(saves) / median(writes):.2f}")
    print(f"  waited for / training step          {median(saves) / median(steps):.2f}")


if __name__ == "__main__":
    main()
