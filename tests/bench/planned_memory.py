"""What `saekit plan` says that a run needs of memory, beside what the run needs at most (Linux, on the CPU).

    python tests/bench/planned_memory.py [--only NAME ...]

Each run is a process of its own, after a tiny run that imports everything; Python and the libraries are not counted.
Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

from common import language_model, megabytes, random_contexts

import saekit

RUNS: dict[str, tuple[list[str], dict[str, int] | None]] = {
    "laptop": (["training.training_tokens=60_000"], None),
    "wide": (["sae.d_sae=16384", "training.train_batch_size_tokens=4096", "training.training_tokens=60_000"], None),
    "standard": (['sae={name="standard",d_sae=8192}', "training.training_tokens=60_000"], None),
    "plain": (
        ["sae.d_sae=8192", 'training.kernels="reference"', "training.train_batch_size_tokens=4096",
         "training.training_tokens=60_000"],
        None,
    ),
    "plain standard": (
        ['sae={name="standard",d_sae=8192}', 'training.kernels="reference"', "training.training_tokens=60_000"], None
    ),
    "buffer": (
        ["activations.source.n_batches_in_buffer=256", "activations.source.store_batch_size_prompts=32",
         "training.training_tokens=60_000"],
        None,
    ),
    "no checkpoint": (
        ["activations.source.n_batches_in_buffer=256", "activations.source.store_batch_size_prompts=32",
         "checkpoints.keep_last=0", "training.training_tokens=60_000"],
        None,
    ),
    "model": (["sae.d_sae=4096", "training.training_tokens=60_000"], {"n_layers": 6, "d_model": 512, "n_heads": 8}),
}  # fmt: skip


def measure(name: str) -> None:
    """One run."""
    overrides, shape = RUNS[name]
    model = None if shape is None else language_model(**shape)
    dataset = None if shape is None else random_contexts(2048)
    if dataset is not None:
        overrides = [*overrides, "dataset.prepend_bos=false", 'dataset.sequence_separator_token="none"']
        overrides += ["evals.split={none=true}"]
    with tempfile.TemporaryDirectory() as folder:
        small = ["sae.d_sae=64", "training.training_tokens=4096"]
        short = [
            "training.verbose=false",
            "training.lr_decay_steps=0",
            "training.lr_warm_up_steps=0",
            f"checkpoints.folder={folder!r}",
        ]
        saekit.train(saekit.recipe("laptop", [*small, *short]))
        config = saekit.recipe("laptop", [*overrides, *short])
        planned = saekit.plan(config, model=model, dataset=dataset, load=shape is not None)
        own = planned.numbers.get("model_bytes", 0) if shape is not None else 0  # which is there already
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = megabytes("VmRSS")
        saekit.train(config, model=model, dataset=dataset)
        found = megabytes("VmHWM") - before
    said = (planned.numbers["memory_bytes"] - own) / 1e6
    print(f"{name:16} planned {said:8.1f} MB  measured {found:8.1f} MB  {said / found - 1:+6.1%}")
    print(f"{'':16} {planned.facts['memory on cpu']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        measure(options.run)
        return
    for name in options.only:
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--run", name], check=True)


if __name__ == "__main__":
    main()
