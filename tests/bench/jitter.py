"""How even the steps of a run are: p99 / median of 2,000 steps with trackers and checkpoints on, beside bare steps.

    python tests/bench/jitter.py [--steps 2000] [--only cached]
    python tests/bench/jitter.py --only live --steps 500

TopK SAEs of 1024 features on the embedded model, batches of 1024, from a cache, or live, which is measured by itself:
its steps are made beside the model's forwards.  The run has its tracker, with a record every 10 steps, and four
checkpoints, which are written behind it.  After
each step of the run comes one of a trainer of the same kind alone, on rows that are there, so that both meet the same
machine; what the run takes is all that is between two of these, but for the time in which it waits for its source,
which is reported apart.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import cut, late, row

import saekit
import saekit.runs.run
import saekit.training.loop
from saekit.training.trainer import SAETrainer
from saekit.values import Batch

BATCH, D_SAE = 1024, 1024


class Interleaved:
    """An observer of the run, the last one: a bare step after each of the run's."""

    def __init__(self) -> None:
        self.bare: SAETrainer | None = None
        self.batch: Batch | None = None
        self.times: dict[str, list[float]] = {"run": [], "waiting": [], "bare": []}
        self.waited, self.end, self.late = 0.0, time.perf_counter(), False
        self.noted: list[str] = []
        self.marks: dict[int, list[str]] = {}

    def after_step(self, trainer: SAETrainer, metrics: dict[str, Any]) -> None:
        if metrics:
            self.noted.append("record")

    def after_batch(self) -> None:
        now = time.perf_counter()
        self.times["run"].append(now - self.end - self.waited)
        self.times["waiting"].append(self.waited)
        if self.noted:
            self.marks[len(self.times["run"]) - 1] = self.noted
        self.noted = []
        assert self.bare is not None
        assert self.batch is not None
        start = time.perf_counter()
        self.bare.train_on(*self.bare.rows_of(self.batch), self.batch)
        self.end = time.perf_counter()
        self.times["bare"].append(self.end - start)
        self.waited = 0.0
        self.late = late()
        if self.late:
            raise SystemExit

    def timed_source(self, next_batch: Callable[[Any], Batch | None]) -> Callable[[Any], Batch | None]:
        def timed(lane: Any) -> Batch | None:
            start = time.perf_counter()
            batch = next_batch(lane)
            self.waited += time.perf_counter() - start
            self.batch = batch if self.batch is None else self.batch
            return batch

        return timed

    def noted_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            self.noted.append("gc")


def config(folder: Path, source: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        "dataset": {"path": "saekit/python-stdlib", "context_size": 128},
        "site": {"hook_name": "blocks.1.hook_resid_post"},
        "activations": {"source": source, "cache": {"folder": str(folder / "cache"), "tokens": 300_000}},
        "sae": {"name": "topk", "d_sae": D_SAE, "k": 32},
        "training": {
            "training_tokens": steps * BATCH, "train_batch_size_tokens": BATCH, "verbose": False, "log_frequency": 10,
        },
        "evals": {"run": []},
        "checkpoints": {"folder": str(folder / "runs"), "n_checkpoints": 4, "keep_last": 1},
        "reports": {"pictures": False},
    }  # fmt: skip


def measure(name: str, folder: Path, steps: int) -> None:
    sources = {"cached": {"name": "cached", "folder": str(folder / "cache")}, "live": {"name": "live"}}
    chosen = config(folder, sources[name], steps)
    watch = Interleaved()
    fit, next_batch = saekit.runs.run.fit, saekit.training.loop._next_batch
    staged = saekit.runs.saving.Saving._begin  # type: ignore[attr-defined]

    def fitted(lanes: Any, observers: Any) -> None:
        trainer = lanes[0].trainers[0]
        watch.bare = _alone(chosen)
        watch.bare.sae.load_state_dict(trainer.sae.state_dict())
        watch.end = time.perf_counter()
        fit(lanes, [*observers, watch])

    def begin(saving: Any, *given: Any) -> Any:
        watch.noted.append("checkpoint")
        return staged(saving, *given)

    gc.callbacks.append(watch.noted_gc)
    saekit.runs.run.fit = fitted  # type: ignore[assignment]
    saekit.training.loop._next_batch = watch.timed_source(next_batch)
    saekit.runs.saving.Saving._begin = begin  # type: ignore[attr-defined]
    try:
        saekit.train(chosen)
    except SystemExit:
        if not watch.late:
            raise
        cut(f"{len(watch.times['run']):,} of {steps:,} steps, {name}")
    finally:
        gc.callbacks.remove(watch.noted_gc)
        saekit.runs.run.fit, saekit.training.loop._next_batch = fit, next_batch
        saekit.runs.saving.Saving._begin = staged  # type: ignore[attr-defined]
    _tell(name, watch)


def _alone(chosen: dict[str, Any]) -> SAETrainer:
    """A trainer like the run's, with nothing around it."""
    from saekit.config.files import load_config
    from saekit.data import Corpus
    from saekit.runs.opening import build_backend
    from saekit.runs.parts import make_schedule
    from saekit.runs.setup import make_trainer, sae_options
    from saekit.values import Ports

    plugins = saekit.default_manager()
    loaded = load_config({**chosen, "activations": {}}, plugins=plugins)
    options, _ = sae_options(loaded, plugins)
    corpus = Corpus.of(loaded.dataset, loaded.evals, None)
    ports = Ports.of(loaded.sites, dict.fromkeys(loaded.sites.all, 128))
    backend = build_backend(loaded, plugins, None)
    return make_trainer(loaded, plugins, backend, corpus, options, ports, make_schedule(loaded, plugins))


def _tell(name: str, watch: Interleaved) -> None:
    first = 20  # whose memory is new
    if len(watch.times["run"]) < 2 * first:
        return  # of so few there is no 99th percentile
    ratios = {}
    for what, values in watch.times.items():
        ordered = sorted(values[first:])
        median, p99 = statistics.median(ordered), ordered[int(0.99 * len(ordered))]
        ratios[what] = p99 / median if median else float("inf")
        print(
            f"  {name:7} {what:8} median {1e3 * median:7.2f} ms  p99 {1e3 * p99:7.2f} ms  most "
            f"{1e3 * ordered[-1]:7.2f} ms  p99/median {ratios[what]:.2f}",
            flush=True,
        )
        row("Jitter of steps", f"{name}, {what}", {"median, ms": 1e3 * median, "p99 / median": ratios[what]})
    print(f"  {name:7} run / bare of p99/median: {ratios['run'] / ratios['bare']:.2f}")
    slowest = sorted(range(first, len(watch.times["run"])), key=lambda step: -watch.times["run"][step])[:20]
    texts = [f"{1e3 * watch.times['run'][step]:.1f} ms {'+'.join(watch.marks.get(step, ['-']))}" for step in slowest]
    print(f"  {name:7} the slowest: {', '.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=("cached", "live"), default=["cached"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"TopK 128 -> {D_SAE}, batches of {BATCH}, {torch.get_num_threads()} threads, {options.steps:,} steps")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "cached" in options.only:
            saekit.cache_activations(config(folder, {"name": "live"}, options.steps))
        for name in options.only:
            measure(name, folder, options.steps)


if __name__ == "__main__":
    main()
