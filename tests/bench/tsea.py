"""Token set enrichment and feature statistics: time and memory.

    python tests/bench/tsea.py [--part ours|booleans|many|statistics] [--d-model 256]

- ``ours`` beside ``booleans``: 50 features and 50 sets in a vocabulary of 50,000.  ``booleans`` is the usual method, by
  its description: which tokens of each feature's order are in each set, as booleans ``[sets, features, V]``; steps of
  ``1/m`` and ``-1/(V - m)``; their cumulative sums; the largest of their absolute values.
- ``many``: 1,000 features and 50 sets, from the weights of an SAE on, permutations too.
- ``statistics``: the moments of the logits of 65,536 features over a vocabulary of 50,000.

Each part runs in a process of its own, whose growth of the resident memory is told: that of the inputs is before it.
Times are the processor's, of one thread, so that others on the machine matter less.  Sets are like those of letters:
from a few tokens to a tenth of the vocabulary.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import figures
import numpy as np
import torch

V, FEATURES, SETS, MANY = 50_000, 50, 50, 1000


PARTS = ("booleans", "ours", "many", "statistics")


def made_sets(seed: int = 0) -> dict[str, Any]:
    """Fifty sets of 10 to 5,000 tokens."""
    random = np.random.default_rng(seed)
    sizes = np.geomspace(10, V // 10, SETS).astype(int)
    return {f"set_{number}": np.sort(random.choice(V, size, replace=False)) for number, size in enumerate(sizes)}


def by_booleans(logits: torch.Tensor, sets: dict[str, Any]) -> torch.Tensor:
    """``[sets, features]``: the usual method."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    member = torch.zeros(len(sets), logits.shape[1], dtype=torch.bool)
    for row, ids in zip(member, sets.values(), strict=True):
        row[torch.as_tensor(ids)] = True
    hits = member[:, order]  # [sets, features, V]
    size = member.sum(1).float()[:, None, None]
    steps = torch.where(hits, 1 / size, -1 / (logits.shape[1] - size))
    return steps.cumsum(-1).abs().amax(-1)


def peak() -> float:
    """The most resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any], rounds: int = 3) -> tuple[Any, float, float]:
    """What it gives, the least seconds of the processor in some rounds, and by how many MB memory grew at most."""
    before, least = peak(), float("inf")
    for _ in range(rounds):
        start = time.process_time()
        found = work()
        least = min(least, time.process_time() - start)
    return found, least, peak() - before


def ours_or_booleans(part: str) -> None:
    from saekit.analysis.tsea import enrichment_scores

    logits = torch.randn(FEATURES, V, generator=torch.Generator().manual_seed(0))
    sets = made_sets()
    small = {name: ids[ids < 300] for name, ids in [*sets.items()][-3:]}  # what is loaded once is not of the method
    enrichment_scores(logits[:2, :300].numpy(), small)
    by_booleans(logits[:2, :300], small)
    if part == "ours":
        found, seconds, grown = timed(lambda: enrichment_scores(logits.numpy(), sets).unsigned)
    else:
        found, seconds, grown = timed(lambda: by_booleans(logits, sets).numpy())
    each = seconds / FEATURES / SETS * 1e6
    told = {"processor, s": seconds, "µs per feature and set": each, "memory, MB more": grown}
    figures.row(f"{FEATURES} features, {SETS} sets, a vocabulary of {V:,}", part, told)
    print(f"{part}: {seconds:.2f} s, {each:.0f} µs per feature and set, {grown:,.0f} MB more; mean {found.mean():.6f}")


def many(d_model: int) -> None:
    import attrs

    import saekit
    from saekit.analysis.tsea import enrich
    from saekit.testing import FakeBackend

    class Large(FakeBackend):
        d_vocab, d_model = V, 0

    backend = Large()
    backend.d_model = d_model
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": d_model, "d_sae": MANY})
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site(hook_name="blocks.0.hook_resid_post")))
    backend.unembedding()
    sets, before = made_sets(), peak()
    for permutations in (0, 1000):
        found, seconds, grown = timed(
            lambda n=permutations: enrich(sae, sets, backend=backend, features="all", permutations=n), 1
        )
        figures.row(
            f"{MANY:,} features, {SETS} sets",
            f"{permutations:,} permutations",
            {"processor, s": seconds, "memory, MB more": grown},
        )
        print(
            f"{MANY:,} features, {permutations:,} permutations: {seconds:.1f} s, {grown:,.0f} MB more; "
            f"{before:,.0f} MB before, {peak():,.0f} MB at most; {found.values.signed.shape}"
        )


def statistics(d_model: int) -> None:
    from saekit.analysis.moments import row_moments

    rows, columns = torch.randn(65_536, d_model), torch.randn(d_model, V)
    before = peak()
    _, seconds, grown = timed(lambda: row_moments(lambda part: rows[part], len(rows), columns), 1)
    figures.row(
        "moments of logits", f"65,536 features, d_model {d_model}", {"processor, s": seconds, "memory, MB more": grown}
    )
    print(
        f"65,536 features, d_model {d_model}: {seconds:.0f} s, {grown:,.0f} MB more; {before:,.0f} MB before, "
        f"{peak():,.0f} MB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--d-model", type=int, default=256)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part is None:
        for part in asked.parts:
            subprocess.run([sys.executable, __file__, "--part", part, "--d-model", str(asked.d_model)], check=True)
    elif asked.part == "many":
        many(asked.d_model)
    elif asked.part == "statistics":
        statistics(asked.d_model)
    else:
        ours_or_booleans(asked.part)


if __name__ == "__main__":
    main()
