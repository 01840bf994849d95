"""Time and size of a checkpoint, beside writing as many bytes to the same disk, and beside a training step.

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
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        saving = Saving(session, folder, {"sae": Trackers({})}, Interruption())
        steps, saves, writes, sizes = [], [], [], []
        for number in range(options.rounds):
            batch = next(lane.source).activations[site]
            steps.append(timed(lambda rows=batch: trainer.train_on(rows)))
            lane.batches = number + 1
            saves.append(timed(saving.save))
            sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
            writes.append(timed(lambda: write(folder / "bytes", sizes[-1])))
            (folder / "bytes").unlink()
    finally:
        session.close()
        shutil.rmtree(folder)
    median = statistics.median
    print(f"  SAE {d_model} -> {d_sae}, {options.rounds} rounds: a checkpoint of {sizes[-1] / 1e6:,.0f} MB")
    for name, values in (("checkpoint", saves), ("its bytes alone", writes), ("training step", steps)):
        print(f"  {name:16}  {median(values):7.3f} s  ({min(values):.3f}-{max(values):.3f})")
    print(f"  checkpoint / its bytes alone  {median(saves) / median(writes):.2f}")
    print(f"  checkpoint / training step    {median(saves) / median(steps):.2f}")


if __name__ == "__main__":
    main()
