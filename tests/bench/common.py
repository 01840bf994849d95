"""What the benches share: a random model, tokens in memory, the objects of a run, and a table of figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from figures import Figure, cut, late, row, spread
from saekit_plugins.backends.hooked_transformer import EMBEDDED

import saekit
from saekit.config import TrainConfig
from saekit.config.files import load_config
from saekit.data import Corpus, StreamContext
from saekit.protocols import ActivationSource, ModelBackend
from saekit.runs.parts import make_schedule
from saekit.runs.setup import give_weights, make_trainer, sae_options
from saekit.training.trainer import SAETrainer

CONTEXT, VOCABULARY, BATCH = 128, 2048, 4096
PEER = importlib.util.find_spec("sae_lens") is not None
QUIET = 0.1  # of the machine, that other programs may use while something is timed
WORKERS: list[int] = []
"""Processes that make steps for this one: their time is no other program's."""


class Run:
    """What ``saekit.train`` builds from a configuration, without its loop."""

    def __init__(self, model: Any, dataset: Any, hook: str, source: Mapping[str, Any]) -> None:
        self.plugins = saekit.default_manager()
        self.config: TrainConfig = load_config(settings(hook, source), plugins=self.plugins)
        self.corpus = Corpus.of(self.config.dataset, self.config.evals, dataset)
        chosen = self.config.model
        self.backend: ModelBackend = (
            model if hasattr(model, "special_tokens")
            else self.plugins.build("model_backends", chosen.backend, model=chosen, loaded=model)
        )  # fmt: skip
        self.stream = StreamContext(
            backend=self.backend,
            sites=[self.config.site],
            batch_size=BATCH,
            seed=0,
            open_contexts=lambda: self.corpus.contexts(self.backend),
        )
        self.source: ActivationSource = self.plugins.build(
            "activation_sources", self.config.activations.source, stream=self.stream
        )

    def trainer(self) -> SAETrainer:
        """A new SAE with everything that trains it."""
        schedule = make_schedule(self.config, self.plugins)
        width = self.stream.widths[self.config.site]
        options, _ = sae_options(self.config, self.plugins)
        trainer = make_trainer(self.config, self.plugins, self.backend, self.corpus, options, width, schedule)
        give_weights(trainer, self.config, self.corpus, self.source.peek)
        return trainer


def settings(hook: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration for contexts that are whole: no token is put in, and nothing is held out."""
    return {
        "model": {"device": "cpu"},
        "dataset": {"context_size": CONTEXT, "prepend_bos": False, "sequence_separator_token": "none"},
        "site": {"hook_name": hook},
        "activations": {"source": {"name": "live", "act_store_device": "cpu", **source}},
        "sae": {"name": "standard", "d_sae": 4096, "l1_coefficient": 1.0},
        "training": {"training_tokens": 10**9, "train_batch_size_tokens": BATCH, "device": "cpu"},
        "evals": {"run": [], "held_out_every": 0},
    }


def language_model(n_layers: int = 4, d_model: int = 512, n_heads: int = 8) -> Any:
    """An untrained HookedTransformer with the embedded model's tokenizer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = HookedTransformerConfig(
            n_layers=n_layers, d_model=d_model, n_ctx=CONTEXT, d_head=d_model // n_heads, n_heads=n_heads,
            d_mlp=4 * d_model, d_vocab=VOCABULARY, act_fn="gelu", seed=0, device="cpu",
        )  # fmt: skip
        return HookedTransformer(config, AutoTokenizer.from_pretrained(EMBEDDED["saekit/tiny-python"]))


def random_contexts(n: int, vocabulary: int = VOCABULARY) -> list[dict[str, list[int]]]:
    """Records of one context each: a dataset that is tokenized already and costs next to nothing to read."""
    tokens = torch.randint(vocabulary, (n, CONTEXT), generator=torch.Generator().manual_seed(0))
    return [{"tokens": row} for row in tokens.tolist()]


def cycle(capacity: int) -> int:
    """Batches from one refill of a live buffer of ``capacity`` rows to the next, which together use what was forwarded.

    The buffer is refilled before a batch when less than half of it is filled.
    """
    filled, batches = capacity, 0
    while filled >= max(BATCH, capacity // 2):
        filled, batches = filled - BATCH, batches + 1
    return batches


@dataclasses.dataclass
class Case:
    """Something to time: ``run`` returns how many tokens it took; the others are not timed."""

    run: Callable[[], int]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclasses.dataclass
class Timed:
    """One run of a case."""

    microseconds: float
    """Per token."""
    processors: float
    """In use."""
    others: float
    """The share of the machine that other programs used meanwhile."""


class Times:
    """Microseconds per token of cases that are timed in turn, every other round in reverse.

    A case is timed when the machine is quiet, or half a minute later (a minute for all of a script).  If other programs
    then used more than ``QUIET`` of it, the time is not counted and the case is timed again; it is timed ``2 * rounds``
    times at most, and once where there is no time for more.
    """

    def __init__(self, cases: Mapping[str, Case | Callable[[], int]], rounds: int) -> None:
        self.cases = {name: case if isinstance(case, Case) else Case(case) for name, case in cases.items()}
        self._all: dict[str, list[Timed]] = {name: [] for name in cases}
        self._rounds = rounds
        for number in range(2 * rounds):
            if number and late():
                break
            for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
                if len(self._quiet(name)) < rounds:
                    _wait_for_quiet()
                    self._all[name].append(_time(self.cases[name]))

    def _quiet(self, name: str) -> list[Timed]:
        return [timed for timed in self._all[name] if timed.others < QUIET]

    def of(self, name: str) -> list[float]:
        """The times of a case that count: all of them if none was quiet."""
        return [timed.microseconds for timed in self._quiet(name) or self._all[name]]

    def ratio(self, name: str, base: str) -> float:
        """The ratio of the medians of two cases."""
        return statistics.median(self.of(name)) / statistics.median(self.of(base))

    def table(self, base: str, title: str, beside: str | None = None) -> None:
        """Print each case's median and spread, its ratio to ``base``, and the processors it kept busy.

        They go into the table ``title``, with how many times as long the case ``beside`` takes.
        """
        width = max(len(name) for name in self.cases)
        if (made := min(map(len, self._all.values()))) < self._rounds:
            cut(f"{made} of {self._rounds} rounds of {title}")
        for name, runs in self._all.items():
            values, quiet = self.of(name), self._quiet(name)
            processors = statistics.median(timed.processors for timed in quiet or runs)
            print(
                f"  {name:{width}}  {statistics.median(values):8.2f} µs/token  ({min(values):.2f}-{max(values):.2f})"
                f"  x {self.ratio(name, base):.3f}  {processors:.2f} processors; {len(quiet)} of {len(runs)} quiet",
                flush=True,
            )
            found: dict[str, Figure] = {"µs per token": spread(values), f"× {base}": self.ratio(name, base)}
            if beside is not None and name not in (base, beside):
                found[f"{beside} / it"] = self.ratio(beside, name)
            row(title, name, found | {"processors": processors, "quiet": f"{len(quiet)} of {len(runs)}"})


_LOOK = 0.3  # seconds, of which the system counts hundredths
_PATIENCE = 60.0  # seconds of waiting in all
_waited = 0.0


def _wait_for_quiet(seconds: int = 30) -> None:
    global _waited
    for _ in range(int(seconds / _LOOK)):
        if late() or _waited > _PATIENCE:
            return
        busy = _busy_seconds()
        time.sleep(_LOOK)
        if _busy_seconds() - busy < QUIET * _LOOK * (os.cpu_count() or 1):
            return
        _waited += _LOOK


def _time(case: Case) -> Timed:
    case.before()
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    tokens = case.run()
    wall, own = time.perf_counter() - start, _own_seconds() - own
    others = _busy_seconds() - busy - own
    case.after()
    return Timed(wall / tokens * 1e6, own / wall, others / (wall * (os.cpu_count() or 1)))


def _own_seconds() -> float:
    """Seconds that this process has worked, with those that it started: those that ended, and :data:`WORKERS`."""
    workers = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in WORKERS]
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in workers)  # in user's and in system's code
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def _busy_seconds() -> float:
    """Seconds that all processors together have worked since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text(encoding="ascii").split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def megabytes(field: str) -> float:
    """A size in ``/proc/self/status``, such as ``VmRSS`` or its peak ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {field}")
