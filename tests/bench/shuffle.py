"""How well the live source mixes: distinct contexts in a batch, beside rows drawn uniformly from a whole buffer.

    python tests/bench/shuffle.py

Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import statistics
from math import exp, lgamma

from common import BATCH, CONTEXT, Run, cycle, random_contexts
from figures import row, spread

from saekit.testing import FakeBackend


def uniform(contexts: int, rows: int) -> float:
    """Distinct contexts expected among ``rows`` drawn without replacement from ``contexts`` whole ones."""

    def log_choose(n: int) -> float:
        return lgamma(n + 1) - lgamma(rows + 1) - lgamma(n - rows + 1)

    total = contexts * CONTEXT
    return contexts * (1 - exp(log_choose(total - CONTEXT) - log_choose(total)))


def distinct(forwards: int, prompts: int, batches: int) -> list[int]:
    """Distinct contexts in each of ``batches``, once the buffer was filled and refilled."""
    capacity = forwards * prompts * CONTEXT
    warm_up = 2 * cycle(capacity)
    documents = random_contexts(2 * forwards * prompts + (warm_up + batches) * BATCH // CONTEXT, FakeBackend.d_vocab)
    source = {"store_batch_size_prompts": prompts, "n_batches_in_buffer": forwards}
    run = Run(FakeBackend(), documents, "blocks.1.hook_resid_post", source)
    found = []
    for number in range(warm_up + batches):
        origins = next(run.source).documents  # a document is a context
        if number >= warm_up and origins is not None:
            found.append(len(origins.unique()))
    run.source.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--forwards", type=int, default=80, help="that fill the buffer")
    parser.add_argument("--prompts", type=int, default=16, help="contexts in one forward")
    parser.add_argument("--quick", action="store_true", help="5 batches, to see that it runs")
    options = parser.parse_args()
    contexts = options.forwards * options.prompts
    found = distinct(options.forwards, options.prompts, 5 if options.quick else options.batches)
    ideal, median = uniform(contexts, BATCH), statistics.median(found)
    print(f"distinct contexts in a batch of {BATCH} rows, a buffer of {contexts} contexts of {CONTEXT} tokens")
    print(f"  live source, {len(found)} batches: median {median:.0f} ({min(found)}-{max(found)})")
    about = f"distinct contexts in a batch of {BATCH}, a buffer of {contexts} contexts"
    row(about, "live source", {"contexts": spread(found), "of uniform": median / ideal})
    print(f"  uniform from a whole buffer: {ideal:.1f}; the live source has {median / ideal:.1%} of it")


if __name__ == "__main__":
    main()
