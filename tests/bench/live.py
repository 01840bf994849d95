"""The live source: beside the model's bare forward, while an SAE trains, and beside sae-lens where it is installed.

    python tests/bench/live.py [--only forward overlap peer] [--quick]

Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import figures
import torch
from common import BATCH, CONTEXT, PEER, Case, Run, Times, cycle, language_model, random_contexts

PROMPTS = 16  # contexts in one forward
HOOK = "blocks.2.hook_resid_pre"


def forward_case(model: Any, dataset: list[dict[str, list[int]]], layers: int, forwards: int) -> Case:
    """The model alone, on as many contexts at once as the live source."""
    tokens = torch.tensor([record["tokens"] for record in dataset]).split(PROMPTS)
    position = 0

    @torch.inference_mode()
    def run() -> int:
        nonlocal position
        for _ in range(forwards):
            model(tokens[position % len(tokens)], stop_at_layer=layers, return_type=None)
            position += 1
        return forwards * PROMPTS * CONTEXT

    return Case(run)


def live_run(model: Any, dataset: list[dict[str, list[int]]], hook: str, buffer: int, *, prefetch: bool) -> Run:
    """A live source with room for ``buffer`` forwards, in its steady state: filled once and refilled once."""
    source = {"store_batch_size_prompts": PROMPTS, "n_batches_in_buffer": buffer, "prefetch": prefetch}
    run = Run(model, dataset, hook, source)
    for _ in range(cycle(buffer * PROMPTS * CONTEXT) + 1):
        next(run.source)
    run.source.close()
    return run


def live_case(model: Any, dataset: list[dict[str, list[int]]], hook: str, buffer: int) -> Case:
    """One refill and the batches that it feeds."""
    source, batches = live_run(model, dataset, hook, buffer, prefetch=False).source, cycle(buffer * PROMPTS * CONTEXT)

    def run() -> int:
        return sum(len(next(source)) for _ in range(batches))

    return Case(run)


def training_case(run: Run, buffer: int) -> Case:
    """An SAE trained on the batches from one refill to the next, with two batches before the clock starts."""
    trainer, site = run.trainer(), run.config.site

    def steps(batches: int) -> int:
        for _ in range(batches):
            trainer.train_on(next(run.source).activations[site])
        return batches * BATCH

    return Case(
        lambda: steps(cycle(buffer * PROMPTS * CONTEXT)), before=lambda: steps(2), after=lambda: run.source.close()
    )


def step_case(run: Run, steps: int) -> Case:
    """The SAE's training step alone, on one batch again and again."""
    trainer, rows = run.trainer(), next(run.source).activations[run.config.site]

    def train() -> int:
        for _ in range(steps):
            trainer.train_on(rows)
        return steps * BATCH

    return Case(train)


def peer_case(model: Any, dataset: list[dict[str, list[int]]], hook: str, buffer: int) -> Case:
    """sae-lens's store with as many rows in its buffer, in its steady state, from one refill to the next."""
    from sae_lens.training.activations_store import ActivationsStore

    contexts = buffer * PROMPTS
    store = ActivationsStore(
        model=model, dataset=dataset, streaming=False, hook_name=hook, hook_head_index=None, context_size=CONTEXT,
        d_in=model.cfg.d_model, n_batches_in_buffer=contexts, total_training_tokens=10**9,
        store_batch_size_prompts=PROMPTS, train_batch_size_tokens=BATCH, prepend_bos=False,
        normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    batches = contexts * CONTEXT // 2 // BATCH  # it serves half of its buffer, and then fills it again

    def run() -> int:
        return sum(len(next(store)) for _ in range(batches))

    run()
    return Case(run)


def bench_forward(options: argparse.Namespace, model: Any, dataset: Any) -> None:
    """The whole source beside the forward that it needs."""
    for hook, layers in ((HOOK, 2), ("blocks.1.hook_resid_post", 2)):
        live = live_case(model, dataset, hook, options.buffer)
        rows = cycle(options.buffer * PROMPTS * CONTEXT) * BATCH
        bare = forward_case(model, dataset, layers, rows // (PROMPTS * CONTEXT))
        title = f"{hook}, a buffer of {options.buffer * PROMPTS} contexts, no prefetch"
        print(title)
        Times({"bare forward": bare, "live source": live}, options.rounds).table("bare forward", title)


def bench_overlap(options: argparse.Namespace, model: Any, dataset: Any) -> None:
    """Forward and training step one after the other, and at the same time."""
    runs = {prefetch: live_run(model, dataset, HOOK, options.buffer, prefetch=prefetch) for prefetch in (True, False)}
    cases = {
        "training step alone": step_case(runs[False], 4),
        "bare forward": forward_case(model, dataset, 2, 8),
        "prefetch = true": training_case(runs[True], options.buffer),
        "prefetch = false": training_case(runs[False], options.buffer),
    }
    title = f"a standard SAE of 4096 features trained on {HOOK}, a buffer of {options.buffer * PROMPTS} contexts"
    print(title)
    Times(cases, options.rounds // 3 or 1).table("prefetch = true", title)


def bench_peer(options: argparse.Namespace, model: Any, dataset: Any) -> None:
    """sae-lens's store beside the live source."""
    if not PEER:
        figures.missing("sae-lens")
        return
    cases = {
        "live source": live_case(model, dataset, HOOK, options.peer_buffer),
        "sae-lens": peer_case(model, dataset, HOOK, options.peer_buffer),
    }
    title = f"{HOOK}, a buffer of {options.peer_buffer * PROMPTS} contexts, no prefetch, beside sae-lens"
    print(title)
    Times(cases, options.rounds // 4 or 1).table("live source", title)


BENCHES = {"forward": bench_forward, "overlap": bench_overlap, "peer": bench_peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--rounds", type=int, default=12, help="a third or a quarter where one takes long")
    parser.add_argument("--buffer", type=int, default=16, help="forwards that fill the buffer")
    parser.add_argument("--peer-buffer", type=int, default=80, help="the same, beside sae-lens")
    parser.add_argument("--quick", action="store_true", help="a small model and one round, to see that it runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # sae-lens warns at every new epoch
    if options.quick:
        options.rounds, options.buffer, options.peer_buffer = 1, 8, 8
    model = language_model(d_model=64 if options.quick else 512)
    dataset = random_contexts(2048)
    print(f"4 layers, d_model {model.cfg.d_model}, forwards of {PROMPTS} x {CONTEXT} tokens, batches of {BATCH} rows")
    for name in options.only:
        BENCHES[name](options, model, dataset)


if __name__ == "__main__":
    main()
