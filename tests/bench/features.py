"""The pass that collects features: its time beside that of the forwards and the encoder alone, and its memory.

    python tests/bench/features.py [--tokens 500_000] [--d-sae 2048] [--k 47] [--threads 1] [--features 2048] [--quick]

The embedded model and its text, and a TopK SAE that is trained for a moment, so that features fire as they do.  First
the forwards and ``encode_sparse`` of all contexts, and nothing kept; then ``saekit.collect_features`` of the same, each
in a process of its own, with the growth of its memory beside what it said before it began.  Wall time, and that
of all processors.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from common import megabytes
from figures import row

import saekit

HOOK, BATCH = "blocks.1.hook_resid_pre", 32


def trained(options: argparse.Namespace, folder: Path) -> Path:
    """The folder of an SAE."""
    saekit.train(
        {
            "site": {"hook_name": HOOK},
            "sae": {"name": "topk", "d_sae": options.d_sae, "k": options.k},
            "training": {"training_tokens": 65_536, "train_batch_size_tokens": 2048, "lr": 3e-3, "device": "cpu"},
            "evals": {"run": []},
            "checkpoints": {"folder": str(folder), "name": "run"},
        },
    )
    return folder / "run"


def contexts_of(backend: Any, tokens: int) -> torch.Tensor:
    """``[n, t]``: the text of the embedded model, as often as it takes."""
    from saekit.config.files import load_config
    from saekit.data import Corpus

    config = load_config({"site": {"hook_name": HOOK}}, plugins=saekit.default_manager())
    corpus = Corpus.of(config.dataset, config.evals, None)
    return torch.from_numpy(corpus.contexts(backend).take(tokens // corpus.context_size).tokens)


class Peak(threading.Thread):
    """Looks fifty times a second how much memory is the process's own, files that are mapped aside."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = megabytes("RssAnon")
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, megabytes("RssAnon"))


@contextmanager
def timed(what: str, tokens: int) -> Iterator[None]:
    """Print wall and processor time, and by how much memory grew at most."""
    peak = Peak()
    peak.start()
    wall, own = time.perf_counter(), time.process_time()
    yield
    wall, own = time.perf_counter() - wall, time.process_time() - own
    peak.over.set()
    found = {"seconds": wall, "of processors": own, "µs per token": own / tokens * 1e6}
    row(f"{tokens:,} tokens", what, {**found, "memory, MB more": peak.most - peak.first})
    print(
        f"{what:22} {wall:7.1f} s, {own:7.1f} s of processors, {own / tokens * 1e6:6.1f} µs/token, "
        f"{peak.most - peak.first:+7.0f} MB",
        flush=True,
    )


def alone(sae: Any, backend: Any, contexts: torch.Tensor) -> None:
    """The forwards and the encoder."""
    with timed("forwards and encoder", contexts.numel()), torch.no_grad():
        for batch in contexts.split(BATCH):
            sae.encode_sparse(backend.run(batch, read=[HOOK]).held[HOOK])


def whole(sae: Any, backend: Any, contexts: torch.Tensor, features: Any, folder: Path) -> None:
    """The pass."""
    said = StringIO()
    with timed("the pass", contexts.numel()), redirect_stderr(said):
        store = saekit.collect_features(
            sae, model=backend, contexts=contexts, features=features, folder=folder, batch_size=BATCH
        )
    (line,) = re.findall(r"about .* in the end", said.getvalue())[:1]
    size = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    print(
        f"  it said: {line}\n"
        f"  {float(store.sae.fired.sum()) / contexts.numel():.1f} fire on a token; {size / 1e6:,.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {"tokens": 500_000, "d-sae": 2048, "k": 47, "threads": 1, "features": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=["alone", "whole"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part is None:
        with tempfile.TemporaryDirectory() as name:
            trained(options, Path(name))
            for part in ("alone", "whole"):
                again = [*sys.argv, "--part", part, "--folder", name]
                subprocess.run([sys.executable, *again], check=True)
        return
    sae, backend = saekit.SAE.load(options.folder / "run"), saekit.load_model("saekit/tiny-python", device="cpu")
    contexts = contexts_of(backend, 20_000 if options.quick else options.tokens)
    with torch.no_grad():  # what runs first is slow
        sae.encode_sparse(backend.run(contexts[:BATCH], read=[HOOK]).held[HOOK])
    if options.part == "alone":
        alone(sae, backend, contexts)
    else:
        whole(sae, backend, contexts, range(options.features) if options.features else "all", options.folder / "store")


if __name__ == "__main__":
    main()
