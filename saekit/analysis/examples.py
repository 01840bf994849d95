"""Where each feature fires most, and the text around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.evals.pieces import at_once
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.tokens import TokenChoice, special_ids

__all__ = ["Example", "FeaturePeaks", "feature_examples", "feature_peaks"]


@attrs.frozen
class Example:
    """A stretch of text in which a feature fires."""

    tokens: Sequence[str]
    """The text, token by token."""
    activations: Sequence[float]
    """The feature's activation on each of them."""
    at: int
    """Which of them it fires on most."""

    @property
    def activation(self) -> float:
        """The largest activation."""
        return self.activations[self.at]

    @property
    def token(self) -> str:
        """The token of the largest activation."""
        return self.tokens[self.at]

    @property
    def before(self) -> str:
        """The text before that."""
        return "".join(self.tokens[: self.at])

    @property
    def after(self) -> str:
        """The text after it."""
        return "".join(self.tokens[self.at + 1 :])


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
    total: Tensor
    """``[d_sae]``: the sum of its activations' sizes."""
    tokens: int
    """Tokens that were looked at."""

    @property
    def frequency(self) -> Tensor:
        """``[d_sae]``: the fraction of tokens on which a feature fires."""
        return self.fired.float() / self.tokens

    def tokens_at(self, contexts: Tensor, features: Tensor) -> Tensor:
        """``[k, features]``: the ids of the tokens at the peaks, of the ``contexts`` that they are in."""
        return contexts[self.contexts[:, features], self.positions[:, features]]


@ambient()
@torch.no_grad()
def feature_peaks(
    sae: SAEModule,
    *,
    backend: ModelBackend,
    sites: Sites | Site,
    contexts: Tensor,
    n: int = 12,
    batch_size: int = 32,
    report: Callable[[int], object] = lambda tokens: None,
) -> FeaturePeaks:
    """Each feature's peaks in the ``n`` of ``contexts [contexts, context_size]`` where it fires most.

    The first token of a context (BOS) has outlying activations in most models and means nothing, so it counts as one
    on which nothing fires.  Tokens that did not count when the SAE was trained do not count here.  ``report`` is told
    how many tokens were looked at.
    """
    if not len(contexts):
        raise ValueError("there are no contexts to look at")
    sites = Sites.one(sites) if isinstance(sites, Site) else sites
    fired = torch.zeros(sae.d_sae, dtype=torch.long)
    fired_contexts, total = torch.zeros_like(fired), torch.zeros(sae.d_sae, dtype=torch.float64)
    best: tuple[Tensor, ...] = (torch.empty(0, sae.d_sae), fired.new_empty(0, sae.d_sae), fired.new_empty(0, sae.d_sae))
    start = 0
    choice = _choice(sae, backend)
    for tokens in contexts.split(batch_size):
        for vectors, kept in _pieces(sae, backend, sites, tokens, choice):
            features = _features(sae, vectors, kept)
            sizes = features.abs()  # some architectures have features below zero
            fired += (sizes > 0).sum((0, 1)).cpu()
            total += sizes.sum((0, 1)).cpu()
            largest, positions = sizes.max(1)
            values = features.gather(1, positions[:, None]).squeeze(1)
            fired_contexts += (largest > 0).sum(0).cpu()
            numbers = torch.arange(start, start + len(vectors))[:, None].expand_as(positions)
            best = _strongest(best, (values.float().cpu(), numbers, positions.cpu()), n)
            start += len(vectors)
            del features, sizes  # before the next ones are made
        report(start * contexts.shape[1])
    values, numbers, positions = best
    looked_at = contexts.numel() if choice is None else max(int(choice.kept(contexts).sum()), 1)
    return FeaturePeaks(values, numbers, positions, fired, fired_contexts, total.float(), looked_at)


def _choice(sae: SAEModule, backend: ModelBackend) -> TokenChoice | None:
    """Which tokens count for ``sae``; None: all."""
    choice = TokenChoice.of_metadata(sae.info.metadata, special_ids(backend))
    return None if choice.takes_all else choice


def _pieces(
    sae: SAEModule, backend: ModelBackend, sites: Sites, tokens: Tensor, choice: TokenChoice | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The inputs ``[b, t, d_in]`` on ``tokens [batch, t]``, so many at a time as have few enough features, and which
    of them count."""
    held = sites.input_of(backend.run(tokens, read={site.hook_name for site in sites.inputs}).held)
    size = at_once(sae, held.shape[1])
    kept = itertools.repeat(None) if choice is None else iter(choice.kept(tokens).split(size))
    return zip(held.split(size), kept, strict=False)


def _features(sae: SAEModule, vectors: Tensor, kept: Tensor | None) -> Tensor:
    features = sae.encode(vectors.to(sae.device))
    features[:, 0] = 0
    if kept is not None:
        features[~kept.to(features.device)] = 0
    return features


def _strongest(one: tuple[Tensor, ...], two: tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    """Of values (and what belongs to them) ``[i, d_sae]`` and ``[j, d_sae]`` the ``n`` largest of each, by size."""
    values, *others = (torch.cat(pair) for pair in zip(one, two, strict=True))
    order = values.abs().topk(min(n, len(values)), dim=0).indices
    return tuple(each.gather(0, order) for each in (values, *others))


@ambient()
@torch.no_grad()
def feature_examples(
    features: Sequence[int],
    places: Sequence[Sequence[int]],
    peaks: FeaturePeaks,
    contexts: Tensor,
    *,
    sae: SAEModule,
    backend: ModelBackend,
    sites: Sites | Site,
    width: int = 12,
    batch_size: int = 32,
) -> list[list[Example]]:
    """For each of ``features`` the text at some ``places`` of its ``peaks``, with ``width`` tokens on each side.

    The model runs again on the contexts that these places are in, for the activations of all the tokens around.
    """
    sites = Sites.one(sites) if isinstance(sites, Site) else sites
    bos, choice = backend.special_tokens.get("bos"), _choice(sae, backend)
    wanted: dict[int, list[tuple[int, int, int]]] = {}  # by context: the feature's number here, its place, where
    for index, feature in enumerate(features):
        for place in places[index]:
            row, at = int(peaks.contexts[place, feature]), int(peaks.positions[place, feature])
            wanted.setdefault(row, []).append((index, place, at))
    found: list[dict[int, Example]] = [{} for _ in features]
    for rows in torch.tensor(sorted(wanted), dtype=torch.long).split(batch_size):
        left = rows.tolist()
        for vectors, kept in _pieces(sae, backend, sites, contexts[rows], choice):
            activations = _features(sae, vectors, kept)
            for row, values in zip(left, activations, strict=False):
                first = int(contexts[row, 0]) == bos  # which is no text
                for index, place, at in wanted[row]:
                    start = max(at - width, int(first))
                    around = slice(start, at + width + 1)
                    texts = backend.token_texts(contexts[row, around].tolist())
                    of_feature = values[around, features[index]].float().tolist()
                    found[index][place] = Example(tuple(texts), tuple(of_feature), at - start)
            left = left[len(vectors) :]
            del activations
    return [[ones[place] for place in sorted(ones)] for ones in found]
