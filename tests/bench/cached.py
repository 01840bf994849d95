"""Writing and reading cached activations, beside `dd` and sae-lens's cache where that is installed.

    python tests/bench/cached.py [--quick] [--looking]

Prints figures; it judges nothing.  The site is before the first block, so writing is hardly held up by the model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import figures
import torch
from common import BATCH, CONTEXT, PEER, Case, Run, Times, language_model, random_contexts, settings

import saekit
from saekit.data.cache import CachedActivations, CachedBatches, CacheWriter, Manifest
from saekit.data.cache.manifest import SiteRows
from saekit.values import Batch

HOOK, WIDTH = "blocks.0.hook_resid_pre", 512
SITE = saekit.Site(hook_name=HOOK)


class Bench:
    """A model, contexts, and a folder on the disk to be measured."""

    def __init__(self, contexts: int, folder: Path) -> None:
        self.contexts, self.folder = contexts, folder
        self.model = language_model(n_layers=1)
        self.records = random_contexts(contexts)
        self.rows = contexts * CONTEXT
        self.config = settings(HOOK, {})
        self.config["activations"]["cache"] = {
            "folder": str(folder / "ours"),
            "tokens": self.rows,
            "shard_megabytes": 128,
        }
        self.config["training"]["verbose"] = False

    # ---- writing

    def dd(self) -> int:
        """The disk alone."""
        size = self.rows * WIDTH * 4
        target = self.folder / "dd"
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={target}", "bs=4M", f"count={size >> 22}", "conv=fsync"],
            check=True, capture_output=True,
        )  # fmt: skip
        target.unlink()
        return (size >> 22 << 22) // (WIDTH * 4)

    def writer(self) -> int:
        """saekit's writer on rows that are there already."""
        form = SiteRows(SITE, WIDTH, "float32", 4)
        plan = Manifest(identity={}, sites=[form], context_size=CONTEXT, contexts_per_shard=512)
        rows = torch.randn(16 * CONTEXT, WIDTH)
        origin = torch.zeros(len(rows), dtype=torch.long)
        with CacheWriter(self.folder / "writer", plan) as writer:
            for _ in range(self.contexts // 16):
                writer.add(Batch({SITE: rows}, tokens=origin, documents=origin), {})
            writer.finish(ended=False)
        shutil.rmtree(self.folder / "writer")
        return self.contexts // 16 * len(rows)

    def ours(self) -> int:
        """`saekit cache`, the model included."""
        shutil.rmtree(self.folder / "ours", ignore_errors=True)
        return saekit.cache_activations(self.config, model=self.model, dataset=self.records).rows

    def peer(self) -> int:
        """sae-lens's runner, the model included."""
        import datasets
        from sae_lens import cache_activations_runner
        from sae_lens.config import CacheActivationsRunnerConfig

        shutil.rmtree(self.folder / "peer", ignore_errors=True)
        datasets.disable_progress_bars()
        cache_activations_runner.load_model = lambda **_: self.model
        config = CacheActivationsRunnerConfig(
            dataset_path="", model_name="", model_batch_size=16, hook_name=HOOK, d_in=WIDTH, device="cpu",
            training_tokens=self.rows, context_size=CONTEXT, new_cached_activations_path=str(self.folder / "peer"),
            prepend_bos=False, shuffle=False, buffer_size_gb=0.128,
        )  # fmt: skip
        dataset = datasets.Dataset.from_list(self.records)
        return len(cache_activations_runner.CacheActivationsRunner(config, override_dataset=dataset).run()) * CONTEXT

    # ---- reading

    def read_ours(self, *, prefetch: bool, cold: bool = False) -> int:
        """One reading of every row, in batches."""
        if cold:
            forget(self.folder / "ours")
        source = {"name": "cached", "folder": str(self.folder / "ours"), "prefetch": prefetch}
        run = Run(self.model, self.records, HOOK, {})
        run.config = saekit.load_config({**self.config, "activations": {"source": source}})
        stream = run.stream
        stream.identity = Manifest.load(self.folder / "ours").identity
        reader = run.plugins.build("activation_sources", run.config.activations.source, stream=stream)
        rows = sum(len(next(reader)) for _ in range(self.rows // BATCH))
        reader.close()
        return rows

    def read_peer(self, *, cold: bool = False) -> int:
        """One reading by sae-lens's store, which mixes in a buffer."""
        from sae_lens.training.activations_store import ActivationsStore

        if cold:
            forget(self.folder / "peer")
        store = ActivationsStore(
            self.model, dataset=None, streaming=False, hook_name=HOOK, hook_head_index=None, context_size=CONTEXT,
            d_in=WIDTH, n_batches_in_buffer=512, total_training_tokens=self.rows, store_batch_size_prompts=16,
            train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
            dtype="float32", cached_activations_path=str(self.folder / "peer"),
        )  # fmt: skip
        return sum(len(store.next_batch()) for _ in range(self.rows // BATCH // 2))


def looking(folder: Path, shards: int, contexts: int, rounds: int) -> None:
    """What it costs to look at the files before each batch: batches with and without, taken in turn."""
    plan = Manifest(
        identity={}, sites=[SiteRows(SITE, WIDTH, "float32", 4)], context_size=16, contexts_per_shard=contexts
    )
    rows = torch.randn(contexts * 16, WIDTH)
    origin = torch.zeros(len(rows), dtype=torch.long)
    with mock.patch("saekit.files.storage._sync"), CacheWriter(folder, plan) as writer:
        for _ in range(shards):
            writer.add(Batch({SITE: rows}, tokens=origin, documents=origin), {})
        writer.finish(ended=False)
    cache = CachedActivations(folder, Manifest.load(folder), [SITE])
    batches = CachedBatches(cache, BATCH, seed=0, repeat=True)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds + 4):
        look = number % 2 == 0
        with contextlib.nullcontext() if look else mock.patch("saekit.data.cache.read.check_files"):
            start = time.perf_counter()
            next(batches)
        if number >= 4:
            times[look].append(time.perf_counter() - start)
    cache.close()
    shutil.rmtree(folder)
    looked, without = (statistics.median(times[look]) * 1e3 for look in (True, False))
    figures.row(
        "looking at the files before a batch",
        f"{shards:,} shards",
        {"ms a batch": looked, "ms without looking": without, "ratio": looked / without},
    )
    print(
        f"  {shards:5} shards: {looked:7.2f} ms a batch of {BATCH} rows of {WIDTH}, {without:7.2f} ms without looking: "
        f"{looked / without:.3f}, medians of {rounds}"
    )


def forget(folder: Path) -> None:
    """Make the system drop what it keeps of the files in memory."""
    gc.collect()  # mappings of theirs would keep it
    for file in files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def files(folder: Path) -> Iterator[Path]:
    """Every file below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small and once")
    parser.add_argument("--looking", action="store_true", help="only what looking at the files before a batch costs")
    parser.add_argument("--contexts", type=int, default=2048, help="contexts of 128 rows of 2 kB")
    quick = (options := parser.parse_args()).quick
    contexts, rounds = (128, 1) if quick else (options.contexts, 3)
    disk = os.environ.get(figures.DISK, Path.cwd())  # one in memory is no disk
    with tempfile.TemporaryDirectory(prefix=".saekit-bench-", dir=disk) as folder:
        print("looking at the files before each batch:")
        for shards, size in ((4, 64), (64, 64)) if quick else ((4, 1024), (64, 64), (2000, 16)):
            looking(Path(folder) / "look", shards, size, 5 if quick else 41)
        if options.looking:
            return
        bench = Bench(contexts, Path(folder))
        size = bench.rows * WIDTH * 4 / 1e9
        print(f"cached activations: {bench.rows:,} rows of {WIDTH} float32 ({size:.2f} GB)")
        if PEER:
            print("sae-lens: its CacheActivationsRunner and ActivationsStore")
        else:
            figures.missing("sae-lens")
        print("writing:")  # what was written before is with the disk when the clock starts
        ours = {"dd conv=fsync": bench.dd, "CacheWriter": bench.writer, "saekit cache": bench.ours}
        Times({name: Case(run, before=os.sync) for name, run in ours.items()}, rounds).table("dd conv=fsync", "writing")
        if PEER:  # apart: it leaves the disk much to do
            cases = {"saekit cache": bench.ours, "sae-lens": bench.peer}
            Times({name: Case(run, before=os.sync) for name, run in cases.items()}, rounds).table(
                "saekit cache", "writing, beside sae-lens", "sae-lens"
            )
        for name, cold in (("warm", False), ("cold", True)):
            peer = {"sae-lens": lambda cold=cold: bench.read_peer(cold=cold)} if PEER else {}
            print(f"reading, {name}:")
            ours = {
                "cached, no prefetch": lambda cold=cold: bench.read_ours(prefetch=False, cold=cold),
                "cached, prefetch": lambda cold=cold: bench.read_ours(prefetch=True, cold=cold),
            }
            beside = "sae-lens" if PEER else None
            Times({**ours, **peer}, rounds).table("cached, prefetch", f"reading, {name}", beside)
        print(f"  (1 µs/token is {WIDTH * 4 / 1e3:.2f} GB/s)")


if __name__ == "__main__":
    main()
