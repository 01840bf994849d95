"""Memory of the live source: its peak beside what it must hold, and whether it grows over millions of tokens; memory
of evals for more and more contexts.

    python tests/bench/memory.py [--only peak soak evals] [--tokens 20_000_000] [--quick]

Each case is a process of its own.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import CONTEXT, VOCABULARY, Run, language_model, megabytes, random_contexts
from figures import row

BUFFER, PROMPTS = 80, 16  # forwards, and contexts in each


class Stream:
    """Documents of 20 to 2,000 random tokens without end, made as they are read, as from a dataset on a server."""

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        generator = np.random.default_rng(0)
        while True:
            yield {"tokens": generator.integers(VOCABULARY, size=generator.integers(20, 2001)).tolist()}


def peak(options: argparse.Namespace, prefetch: bool) -> None:
    """Serve three buffers of rows."""
    model, dataset = language_model(d_model=64 if options.quick else 512), random_contexts(2048)
    with torch.inference_mode():  # the first forward allocates what the libraries keep
        model(torch.zeros(PROMPTS, CONTEXT, dtype=torch.long), stop_at_layer=1, return_type=None)
    base = megabytes("VmRSS")
    source = {"store_batch_size_prompts": PROMPTS, "n_batches_in_buffer": BUFFER, "prefetch": prefetch}
    run = Run(model, dataset, "blocks.1.hook_resid_pre", source)
    served = 0
    while served < 3 * BUFFER * PROMPTS * CONTEXT:
        served += len(next(run.source))
    run.source.close()
    buffer = run.source.memory_bytes() / 1e6
    top = megabytes("VmHWM")
    row(
        TITLES["peak"],
        f"prefetch = {str(prefetch).lower()}",
        {"peak, MB": top, "imports, model and data, MB": base, "buffer, MB": buffer, "beyond, MB": top - base - buffer},
    )
    print(
        f"  prefetch = {str(prefetch).lower():5}  peak {top:7.1f} MB; imports, model and data {base:.1f} MB + buffer "
        f"{buffer:.1f} MB; beyond these {top - base - buffer:+.1f} MB"
    )


def soak(options: argparse.Namespace, kind: str) -> None:
    """Serve ``--tokens`` rows of a tiny model."""
    dataset: Any = Stream() if kind == "stream" else random_contexts(2048)
    source = {"store_batch_size_prompts": PROMPTS, "n_batches_in_buffer": BUFFER}
    run = Run(language_model(1, 16, 2), dataset, "blocks.0.hook_resid_post", source)
    served, start = 0, time.perf_counter()
    sizes = []
    for tenth in range(1, 11):
        while served < tenth * options.tokens // 10:
            served += len(next(run.source))
        sizes.append(megabytes("VmRSS"))
        print(f"  {served:12,} tokens  RSS {sizes[-1]:7.1f} MB  {time.perf_counter() - start:6.1f} s", flush=True)
    run.source.close()
    found = {"tokens": options.tokens, "grown by, MB": sizes[-1] - sizes[0], "at most, MB": max(sizes)}
    row(TITLES["soak"], f"from a {kind}", found)
    print(f"  from the first of these to the last: {sizes[-1] - sizes[0]:+.1f} MB; the most: {max(sizes):.1f} MB")


def evals(options: argparse.Namespace, contexts: int, per_forward: int) -> None:
    """The parts of an eval, and the peaks of every feature."""
    from saekit_plugins.architectures.standard import StandardConfig
    from saekit_plugins.evals.downstream import DownstreamConfig
    from saekit_plugins.evals.downstream.module import DownstreamEval

    import saekit
    from saekit.analysis.examples import feature_peaks
    from saekit.evals import variance_metrics
    from saekit.sae.build import build_module

    d_sae = 2048 if options.quick else 16384
    model = language_model(1, 64, 2)
    run = Run(model, random_contexts(8), "blocks.0.hook_resid_pre", {})
    plugins, site = saekit.default_manager(), saekit.Site(hook_name="blocks.0.hook_resid_pre")
    config = StandardConfig(d_sae=d_sae)
    sae = build_module(plugins.find("sae_architectures", config), config, 64, plugins)
    torch.nn.init.normal_(sae.W_enc)
    tokens = torch.randint(VOCABULARY, (contexts, CONTEXT), generator=torch.Generator().manual_seed(0))
    backend = run.backend
    backend.run(tokens[:1], want="loss")
    base = megabytes("VmRSS")

    def rows() -> Iterator[torch.Tensor]:
        for part in tokens.split(per_forward):
            yield site.extract(backend.run(part, read={site.hook_name}).held[site.hook_name]).flatten(0, 1)

    variance_metrics(sae, rows())
    DownstreamEval(DownstreamConfig(batch_size_prompts=per_forward))(
        sae, backend=backend, sites=saekit.Sites.one(site), contexts=tokens
    )
    feature_peaks(sae, backend=backend, sites=site, contexts=tokens, batch_size=per_forward)
    dense = per_forward * CONTEXT * d_sae * 4 / 1e6
    row(
        TITLES["evals"],
        f"{contexts} contexts, {per_forward} in a forward",
        {"peak beyond model and SAE, MB": megabytes("VmHWM") - base, "dense features of a forward, MB": dense},
    )
    print(
        f"  {contexts:4} contexts, {per_forward:2} in a forward: peak {megabytes('VmHWM') - base:7.1f} MB beyond model "
        f"and SAE; dense features of a forward {dense:7.1f} MB, of all {dense * contexts / per_forward:9.1f} MB",
        flush=True,
    )


CASES: dict[str, dict[str, Callable[[argparse.Namespace], None]]] = {
    "peak": {
        "prefetch off": lambda options: peak(options, False),
        "prefetch on": lambda options: peak(options, True),
    },
    "soak": {
        "stream": lambda options: soak(options, "stream"),
        "list": lambda options: soak(options, "list"),
    },
    "evals": {
        f"{contexts}, {size}": lambda options, contexts=contexts, size=size: evals(options, contexts, size)
        for contexts, size in ((32, 16), (64, 16), (128, 16), (64, 32))
    },
}
TITLES = {
    "peak": f"peak memory, a buffer of {BUFFER * PROMPTS} contexts of {CONTEXT} tokens, three buffers served",
    "evals": "peak memory of evals and of feature peaks, a model of one layer",
    "soak": "memory over time, a model of one layer and d_model 16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of each soak")
    parser.add_argument("--quick", action="store_true", help="a small model and 1,000,000 tokens, to see that it runs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.tokens = min(options.tokens, 1_000_000)
    if options.case:
        CASES[options.only[0]][options.case](options)
        return
    for kind in options.only:
        print(TITLES[kind], flush=True)
        for name in CASES[kind]:
            if kind == "soak":
                print(f" from a {name}", flush=True)
            command = [sys.executable, "-W", "ignore", __file__, "--only", kind, "--case", name]
            command += ["--tokens", str(options.tokens)] + ["--quick"] * options.quick
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
