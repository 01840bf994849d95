"""The texts that features fire on most, and what the features promote, as objects that show themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from saekit.analysis.choosing import readable_contexts, striking_features
from saekit.analysis.examples import FeaturePeaks, feature_examples, feature_peaks
from saekit.analysis.feature_texts import FeatureTexts, Promoted, TopTexts
from saekit.analysis.promoting import output_logits, why_no_logits
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites

__all__ = ["find_top_texts"]

_PROMOTED = 10  # tokens
_AT_ONCE = 64  # features, of whose logits for the whole vocabulary as many are held


def find_top_texts(
    sae: SAEModule,
    *,
    backend: ModelBackend,
    sites: Sites,
    contexts: Tensor,
    features: Sequence[int] | Literal["best", "random"] = "best",
    k: int = 5,
    texts: int = 5,
    diverse: bool = False,
    seed: int = 0,
    report: Callable[[int], object] = lambda tokens: None,
) -> TopTexts:
    """Of ``features``, or of ``k`` that are chosen, the ``texts`` of ``contexts [n, t]`` on which each fires most.

    ``best`` are those that :func:`saekit.analysis.choosing.striking_features` finds, on text that people can read;
    ``random`` are drawn, by ``seed``, among those that fire.  ``diverse`` takes other tokens before a token again.
    """
    best = features == "best"
    given = contexts.numel()
    contexts = readable_contexts(contexts, backend) if best else contexts
    left_out = given - contexts.numel()
    peaks = feature_peaks(
        sae, backend=backend, sites=sites, contexts=contexts, n=max(12, 2 * texts),
        report=lambda tokens: report(left_out + tokens),
    )  # fmt: skip
    if best:
        chosen = striking_features(peaks, contexts, backend, k)
    elif isinstance(features, str):
        fired = peaks.fired.nonzero()[:, 0]
        order = torch.randperm(len(fired), generator=torch.Generator().manual_seed(seed))
        chosen = sorted(fired[order[:k]].tolist())
    else:
        chosen = list(features)
    places = [_places(feature, peaks, contexts, texts, diverse) for feature in chosen]
    examples = feature_examples(chosen, places, peaks, contexts, sae=sae, backend=backend, sites=sites)
    why = why_no_logits(sae, backend, sites)
    told = [*_logits(sae, chosen, backend, sites)] if why is None else [(None, None)] * len(chosen)
    frequency = peaks.frequency
    found = (
        FeatureTexts(feature, float(frequency[feature]), ones, promotes, suppresses)
        for feature, ones, (promotes, suppresses) in zip(chosen, examples, told, strict=True)
    )
    return TopTexts(tuple(found), peaks.tokens, why)


def _places(feature: int, peaks: FeaturePeaks, contexts: Tensor, n: int, diverse: bool) -> list[int]:
    """Which of its peaks are shown, the strongest first."""
    fires = [place for place, value in enumerate(peaks.values[:, feature].tolist()) if value]
    if not diverse:
        return fires[:n]
    tokens: set[int] = set()
    around: set[tuple[int, ...]] = set()
    chosen: list[int] = []
    again: list[int] = []
    for place in fires:
        row, at = int(peaks.contexts[place, feature]), int(peaks.positions[place, feature])
        token, words = int(contexts[row, at]), tuple(contexts[row, max(at - 3, 0) : at + 4].tolist())
        (again if token in tokens or words in around else chosen).append(place)
        tokens.add(token)
        around.add(words)
    return sorted((chosen + again)[:n])


def _logits(
    sae: SAEModule, features: Sequence[int], backend: ModelBackend, sites: Sites
) -> Iterator[tuple[Promoted, Promoted]]:
    """What each promotes, and what it suppresses."""
    for start in range(0, len(features), _AT_ONCE):
        logits = output_logits(sae, features[start : start + _AT_ONCE], backend, sites)
        for row in logits:
            (most, up), (least, down) = (signed.topk(min(_PROMOTED, len(row))) for signed in (row, -row))
            yield _named(most, up, backend), _named(-least, down, backend)


def _named(values: Tensor, tokens: Tensor, backend: ModelBackend) -> Promoted:
    return tuple(zip(backend.token_texts(tokens.tolist()), values.tolist(), strict=True))
