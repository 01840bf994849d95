"""The mean at each target, for mean ablation: over contexts that are read first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.distributed.group import ONE, Group
from saekit.errors import ConfigError
from saekit.evals.measured import Measured, allowed_in
from saekit.protocols import ModelBackend
from saekit.site import Site
from saekit.tokens import Mask, TokenChoice

__all__ = ["Means", "mean_of", "read_means"]

Means: TypeAlias = Mapping[tuple[Site, TokenChoice, int], Tensor]
"""``[width]`` float64, of each target over the tokens of a choice in so many contexts."""


def mean_of(means: Means, site: Site, subject: Measured, vectors: Tensor) -> Tensor:
    """The mean that ``subject`` asks for, in the shape of ``vectors``."""
    return means[site, subject.tokens, subject.needs.mean].to(vectors).expand_as(vectors)


def read_means(
    subjects: Sequence[Measured],
    *,
    backend: ModelBackend,
    contexts: Tensor,
    mask: Mask | None = None,
    among: Group = ONE,
) -> Means:
    """The mean at each target of SAEs whose evals ask for it, over the first contexts, so many as each says.

    Tokens that do not count for the SAE are left out.  :class:`ConfigError` for more contexts than there are, and where
    no token counts.  Contexts are dealt out ``among`` several processes, all of which must ask.
    """
    wanted = {
        (site, subject.tokens, subject.needs.mean): None
        for subject in subjects if subject.needs.mean for site in subject.sites.targets
    }  # fmt: skip
    if not wanted:
        return {}
    most, size = max(number for _, _, number in wanted), min(subject.needs.batch_size for subject in subjects)
    if most > len(contexts):
        raise ConfigError(f"means are to be read from {most:,} contexts, and there are {len(contexts):,}")
    sums = {key: (torch.zeros((), dtype=torch.float64, device="cpu"), 0) for key in wanted}
    parts: list[tuple[int, dict[tuple[Site, TokenChoice, int], tuple[Tensor, int]]]] = []
    with ambient(), torch.no_grad():
        for batch, start in enumerate(range(0, most, size)):
            if batch % among.size != among.rank:
                continue
            tokens = contexts[start : min(start + size, most)]
            allowed = allowed_in(mask, tokens, slice(start, start + len(tokens)))
            held = backend.run(tokens, read={site.hook_name for site, _, _ in wanted}).held
            parts.append((batch, found := {}))
            for site, choice, number in wanted:
                kept = choice.kept(tokens) if allowed is None else choice.kept(tokens) & allowed
                rows = site.extract(held[site.hook_name]).cpu()[: max(number - start, 0)]
                picked = rows[kept.cpu()[: len(rows)]].double()
                found[site, choice, number] = picked.sum(0), len(picked)
    every = sorted((part for parts in among.objects(parts) for part in parts), key=lambda part: part[0])
    for _, found in every:  # in the order of one process
        for key, (total, count) in found.items():
            sums[key] = sums[key][0] + total, sums[key][1] + count
    if any(not count for _, count in sums.values()):
        raise ConfigError("no token of the contexts that means are read from counts")
    return {key: total / count for key, (total, count) in sums.items()}
