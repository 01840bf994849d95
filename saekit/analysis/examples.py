"""The text that fires a feature most."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.protocols import ModelBackend
from saekit.sae.module import SAE
from saekit.site import Site

__all__ = ["Example", "FeatureExamples", "feature_activations", "striking_features", "top_examples"]


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


@ambient()
@torch.no_grad()
def feature_activations(
    sae: SAE, *, backend: ModelBackend, site: Site, contexts: Tensor, batch_size: int = 32
) -> Tensor:
    """``[n, context_size, d_sae]`` feature activations on ``contexts [n, context_size]``, zero at position 0.

    The first token of a context (BOS) has outlying activations in most models and means nothing.
    """
    parts = []
    for tokens in contexts.split(batch_size):
        held = backend.activations(tokens, {site.hook_name})[site.hook_name]
        parts.append(sae.encode(site.extract(held).to(sae.W_enc.device)).float().cpu())
    activations = torch.cat(parts)
    activations[:, 0] = 0
    return activations


def striking_features(activations: Tensor, contexts: Tensor, n: int, *, among: int = 12) -> list[int]:
    """``n`` features worth showing first: sparse, strong, and clear about what they are for.

    Candidates fire on 0.02 % to 2 % of tokens and in at least ``among`` contexts.  First come those whose ``among``
    strongest contexts mostly peak on one token, the strongest first; each token stands for one feature only.
    """
    flat, tokens = activations.flatten(0, 1), contexts.flatten()
    frequency = (flat > 0).float().mean(0)
    peaks = activations.amax(1)  # [n, d_sae]
    candidates = ((frequency > 2e-4) & (frequency < 0.02) & ((peaks > 0).sum(0) >= among)).nonzero()[:, 0]
    if len(candidates) < n:
        candidates = frequency.topk(min(n, len(frequency))).indices
    rows = peaks[:, candidates].topk(min(among, len(peaks)), dim=0).indices  # [among, candidates]
    positions = activations[rows, :, candidates].argmax(-1)
    modal = contexts[rows, positions].mode(dim=0)
    share = (contexts[rows, positions] == modal.values).float().mean(0)
    score = (share >= 0.5).float() * 1e6 + flat[:, candidates].amax(0)
    taken: list[int] = []
    seen: set[int] = set()
    for index in score.argsort(descending=True).tolist():
        feature, token = int(candidates[index]), int(tokens[flat[:, candidates[index]].argmax()])
        if token not in seen:
            seen.add(token)
            taken.append(feature)
    return taken[:n]


def top_examples(
    feature: int, activations: Tensor, contexts: Tensor, backend: ModelBackend, *, n: int = 5, width: int = 12
) -> FeatureExamples:
    """The ``n`` strongest activations of ``feature``, at most one per context, with ``width`` tokens on each side."""
    values = activations[:, :, feature]
    strongest, positions = values.max(dim=1)
    examples = []
    for row in strongest.argsort(descending=True)[:n].tolist():
        if strongest[row] <= 0:
            break
        at = int(positions[row])
        texts = backend.token_texts(contexts[row, max(at - width, 0) : at + width + 1].tolist())
        middle = min(at, width)
        before, after = "".join(texts[:middle]), "".join(texts[middle + 1 :])
        examples.append(Example(float(strongest[row]), before, texts[middle], after))
    return FeatureExamples(feature, float((values > 0).float().mean()), examples)
