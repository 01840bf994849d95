"""The text that fires a feature most."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.evals.pieces import at_once
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites

__all__ = ["Example", "FeatureExamples", "FeaturePeaks", "feature_peaks", "striking_features", "top_examples"]


@attrs.frozen
class Example:
    """One place where a feature fires."""

    activation: float
    before: str
    token: str
    after: str


@attrs.frozen
class FeatureExamples:
    """A feature and the places where it fires most, the strongest first."""

    feature: int
    frequency: float
    """The fraction of tokens on which it fires."""
    examples: Sequence[Example]


@attrs.frozen(eq=False)
class FeaturePeaks:
    """Where each feature fires most: its strongest contexts, and how often it fires.

    As large for many contexts as for few.
    """

    values: Tensor
    """``[k, d_sae]``: the largest activations of a feature in different contexts, the strongest first."""
    contexts: Tensor
    """``[k, d_sae]``: which contexts those are in."""
    positions: Tensor
    """``[k, d_sae]``: and where in them."""
    fired: Tensor
    """``[d_sae]``: tokens on which the feature fires."""
    fired_contexts: Tensor
    """``[d_sae]``: contexts in which it does."""
    tokens: int
    """Tokens that were looked at."""

    @property
    def frequency(self) -> Tensor:
        """``[d_sae]``: the fraction of tokens on which a feature fires."""
        return self.fired.float() / self.tokens


@ambient()
@torch.no_grad()
def feature_peaks(
    sae: SAEModule, *, backend: ModelBackend, sites: Sites | Site, contexts: Tensor, n: int = 12, batch_size: int = 32
) -> FeaturePeaks:
    """Each feature's peaks in the ``n`` of ``contexts [contexts, context_size]`` where it fires most.

    The first token of a context (BOS) has outlying activations in most models and means nothing, so it counts as one
    on which nothing fires.
    """
    if not len(contexts):
        raise ValueError("there are no contexts to look at")
    sites = Sites.one(sites) if isinstance(sites, Site) else sites
    fired = torch.zeros(sae.d_sae, dtype=torch.long)
    fired_contexts = torch.zeros(sae.d_sae, dtype=torch.long)
    best: tuple[Tensor, ...] = (torch.empty(0, sae.d_sae), fired.new_empty(0, sae.d_sae), fired.new_empty(0, sae.d_sae))
    start = 0
    for tokens in contexts.split(batch_size):
        held = sites.input_of(backend.run(tokens, read={site.hook_name for site in sites.inputs}).held)
        for vectors in held.split(at_once(sae, held.shape[1])):
            features = sae.encode(vectors.to(sae.device))
            features[:, 0] = 0
            fired += (features > 0).sum((0, 1)).cpu()
            values, positions = features.max(1)
            fired_contexts += (values > 0).sum(0).cpu()
            numbers = torch.arange(start, start + len(vectors))[:, None].expand_as(positions)
            best = _strongest(best, (values.float().cpu(), numbers, positions.cpu()), n)
            start += len(vectors)
            del features  # before the next ones are made
    values, numbers, positions = best
    return FeaturePeaks(values, numbers, positions, fired, fired_contexts, contexts.numel())


def _strongest(one: tuple[Tensor, ...], two: tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    """Of values (and what belongs to them) ``[i, d_sae]`` and ``[j, d_sae]`` the ``n`` largest of each feature."""
    values, *others = (torch.cat(pair) for pair in zip(one, two, strict=True))
    values, order = values.topk(min(n, len(values)), dim=0)
    return values, *(other.gather(0, order) for other in others)


def striking_features(peaks: FeaturePeaks, contexts: Tensor, n: int) -> list[int]:
    """``n`` features worth showing first: sparse, strong, and clear about what they are for.

    Candidates fire on 0.02 % to 2 % of tokens and in at least as many contexts as there are peaks of each.  First come
    those whose peaks are mostly on one token, the strongest first; each token stands for one feature only.
    """
    frequency = peaks.frequency
    enough = peaks.fired_contexts >= len(peaks.values)
    candidates = ((frequency > 2e-4) & (frequency < 0.02) & enough).nonzero()[:, 0]
    if len(candidates) < n:
        candidates = frequency.topk(min(n, len(frequency))).indices
    tokens = contexts[peaks.contexts[:, candidates], peaks.positions[:, candidates]]  # [k, candidates]
    share = (tokens == tokens.mode(dim=0).values).float().mean(0)
    score = (share >= 0.5).float() * 1e6 + peaks.values[0, candidates]
    taken: list[int] = []
    seen: set[int] = set()
    for index in score.argsort(descending=True).tolist():
        token = int(tokens[0, index])
        if token not in seen:
            seen.add(token)
            taken.append(int(candidates[index]))
    return taken[:n]


def top_examples(
    feature: int, peaks: FeaturePeaks, contexts: Tensor, backend: ModelBackend, *, n: int = 5, width: int = 12
) -> FeatureExamples:
    """The ``n`` strongest activations of ``feature`` (as many as ``peaks`` has), with ``width`` tokens on each side."""
    examples = []
    for value, row, at in zip(
        *(tensor[:n, feature].tolist() for tensor in (peaks.values, peaks.contexts, peaks.positions)), strict=True
    ):
        if value <= 0:
            break
        texts = backend.token_texts(contexts[row, max(at - width, 0) : at + width + 1].tolist())
        middle = min(at, width)
        before, after = "".join(texts[:middle]), "".join(texts[middle + 1 :])
        examples.append(Example(value, before, texts[middle], after))
    return FeatureExamples(feature, float(peaks.frequency[feature]), examples)
