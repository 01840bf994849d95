"""What the benches share: a random model, tokens in memory, the objects of a run, and a table of figures."""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from saekit_plugins.hooked_transformer import EMBEDDED

import saekit
from saekit.config import TrainConfig
from saekit.config_files import load_config
from saekit.data import Corpus, StreamContext
from saekit.protocols import ActivationSource, ModelBackend
from saekit.training.setup import make_schedule, make_trainer
from saekit.training.trainer import SAETrainer

CONTEXT, VOCABULARY = 128, 2048
PEER = importlib.util.find_spec("sae_lens") is not None


class Run:
    """What ``saekit.train`` builds from a configuration, without its loop."""

    def __init__(self, model: Any, dataset: Any, hook: str, source: Mapping[str, Any]) -> None:
        self.plugins = saekit.default_manager()
        self.config: TrainConfig = load_config(settings(hook, source), plugins=self.plugins)
        self.corpus = Corpus.of(self.config.dataset, self.config.evals, dataset)
        config, backend = self.config, self.plugins.build(
            "model_backends", self.config.model.backend, model=self.config.model, loaded=model
        )
        self.backend: ModelBackend = backend
        self.stream = StreamContext(
            backend=backend,
            sites=[config.site],
            batch_size=config.training.train_batch_size_tokens,
            seed=0,
            open_contexts=lambda: self.corpus.contexts(backend),
        )
        self.source: ActivationSource = self.plugins.build(
            "activation_sources", config.activations.source, stream=self.stream
        )

    def trainer(self) -> SAETrainer:
        """A new SAE with everything that trains it."""
        schedule = make_schedule(self.config, self.plugins)
        width = self.stream.widths[self.config.site]
        return make_trainer(self.config, self.plugins, self.backend, self.corpus, width, self.source, schedule)


def settings(hook: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration for contexts that are whole: no token is put in, and nothing is held out."""
    return {
        "model": {"device": "cpu"},
        "dataset": {"context_size": CONTEXT, "prepend_bos": False, "sequence_separator_token": "none"},
        "site": {"hook_name": hook},
        "activations": {"source": {"name": "live", **source}},
        "sae": {"name": "standard", "d_sae": 4096, "l1_coefficient": 1.0},
        "training": {"training_tokens": 10**9, "train_batch_size_tokens": 4096, "device": "cpu"},
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


def random_contexts(n: int) -> list[dict[str, list[int]]]:
    """Records of ``CONTEXT`` random tokens each: a dataset that is tokenised already and costs nothing to read."""
    tokens = torch.randint(VOCABULARY, (n, CONTEXT), generator=torch.Generator().manual_seed(0))
    return [{"tokens": row} for row in tokens.tolist()]


def interleave(cases: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Microseconds per token of each case; a case returns how many tokens it took.

    Every round runs all cases, every other round in reverse, so that what else the machine does hits them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            tokens = cases[name]()
            times[name].append((time.perf_counter() - start) / tokens * 1e6)
    return times


def table(times: Mapping[str, Sequence[float]], base: str, unit: str = "µs/token") -> None:
    """Median and spread of each case, and the ratio of its median to that of ``base``."""
    reference = statistics.median(times[base])
    width = max(len(name) for name in times)
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"  {name:{width}}  {median:8.2f} {unit}  ({spread}, n={len(values)})  x{median / reference:.3f}")


def status(field: str) -> float:
    """A size in ``/proc/self/status``, such as ``VmRSS`` or its peak ``VmHWM``, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {field}")
