"""Which text is worth reading, and which features are worth showing first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit.analysis.examples import FeaturePeaks
from saekit.errors import ModelError
from saekit.protocols import ModelBackend

__all__ = ["readable_contexts", "striking_features"]

_NUMBER = re.compile(r"(0x|x|u)?[0-9a-f]*\d[0-9a-f]*[lj]?", re.IGNORECASE)
_MOST_NUMBERS = 0.12  # of the letters and digits of a text that is read; in tables of characters they are a third
_LETTERS = re.compile(r"[^\W\d_]{2}")
_FREQUENT, _RARE = 0.1, 1e-4
_MOST_CANDIDATES = 4096
_ALIKE = 0.34  # of the tokens of two features, from which they are one for those who look


def readable_contexts(contexts: Tensor, backend: ModelBackend) -> Tensor:
    """Those of ``contexts [n, t]`` that people can read: without tables of characters and lists of numbers.

    All of them, if hardly any would be left.
    """
    texts = _texts_of(contexts, backend)
    kept = [_share_of_numbers("".join(texts[token] for token in row)) <= _MOST_NUMBERS for row in contexts.tolist()]
    return contexts[torch.tensor(kept)] if sum(kept) >= 0.3 * len(kept) else contexts


def _share_of_numbers(text: str) -> float:
    """Of letters and digits, how many are in numbers, hexadecimal ones included."""
    words = re.findall(r"\w+", text)
    return sum(len(word) for word in words if _NUMBER.fullmatch(word)) / max(sum(map(len, words)), 1)


def _texts_of(tokens: Tensor, backend: ModelBackend) -> dict[int, str]:
    ids = tokens.unique().tolist()
    return dict(zip(ids, backend.token_texts(ids), strict=True))


@attrs.frozen
class _Look:
    """What a feature shows at its peaks."""

    feature: int
    words: frozenset[str]
    """The tokens, as far as case and spaces say nothing."""
    whole: float
    """How many of them are words, or the ends of words."""
    meaning: float
    """How alike the model takes them to be: the mean cosine of their unembedding vectors."""
    around: float
    """How often the most frequent neighbor stands before them, or after them."""
    contrast: float
    """How much stronger the peaks are than the mean of all that fires."""

    @property
    def score(self) -> float:
        return self.meaning + 0.25 * self.around + 0.01 * min(self.contrast, 10)


def striking_features(peaks: FeaturePeaks, contexts: Tensor, backend: ModelBackend, n: int) -> list[int]:
    """``n`` features worth showing first: each fires on different words that mean something alike.

    They fire on 0.01 % to 10 % of tokens and in as many contexts as there are peaks of each.  Then come those with
    fewer words, and those that fire on anything.  No two fire on much the same words.
    """
    looks = sorted(_looks(peaks, contexts, backend), key=lambda look: look.score, reverse=True)
    tiers: list[Callable[[_Look], bool]] = [
        lambda look: len(look.words) >= 4 and look.whole >= 0.75,
        lambda look: len(look.words) >= 3 and look.whole >= 0.5,
        lambda look: bool(look.words),
    ]
    taken: list[_Look] = []
    for fits in tiers:
        for look in looks:
            if len(taken) < n and look not in taken and fits(look) and not any(_alike(look, one) for one in taken):
                taken.append(look)
    others = [number for number in peaks.fired.argsort(descending=True).tolist() if peaks.fired[number]]
    chosen = [look.feature for look in taken]
    return (chosen + [number for number in others if number not in chosen])[:n]


def _alike(one: _Look, other: _Look) -> bool:
    return len(one.words & other.words) > _ALIKE * min(len(one.words), len(other.words))


def _looks(peaks: FeaturePeaks, contexts: Tensor, backend: ModelBackend) -> Iterator[_Look]:
    frequency, mean = peaks.frequency, peaks.total / peaks.fired.clamp(min=1)
    contrast = peaks.values.abs().mean(0) / mean.clamp(min=1e-12)
    fits = (frequency > _RARE) & (frequency < _FREQUENT) & (peaks.fired_contexts >= len(peaks.values))
    found = fits.nonzero()[:, 0]
    if len(found) > _MOST_CANDIDATES:
        found = found[contrast[found].topk(_MOST_CANDIDATES).indices]
    texts, meaning_of = _texts_of(contexts, backend), _meaning(backend)
    for feature in found.tolist():
        places = [*zip(peaks.contexts[:, feature].tolist(), peaks.positions[:, feature].tolist(), strict=True)]
        tokens = [int(contexts[row, at]) for row, at in places]
        before = [texts[int(contexts[row, at - 1])] for row, at in places]
        after = [texts[int(contexts[row, at + 1])] if at + 1 < contexts.shape[1] else "" for row, at in places]
        words = {_word(texts[token]): token for token in tokens if _LETTERS.search(texts[token])}
        whole = [
            _word(texts[token]) in words and not re.match(r"\w", text)
            for token, text in zip(tokens, after, strict=True)
        ]
        around = max(_most_common(before), _most_common(after))
        meaning = meaning_of([*words.values()])
        yield _Look(feature, frozenset(words), sum(whole) / len(whole), meaning, around, float(contrast[feature]))


def _word(token: str) -> str:
    return token.strip().casefold()


def _most_common(texts: Sequence[str]) -> float:
    return Counter(map(_word, texts)).most_common(1)[0][1] / len(texts)


def _meaning(backend: ModelBackend) -> Callable[[Sequence[int]], float]:
    """How alike the model takes tokens to be; 0 for one alone, and where the model has no unembedding to ask."""
    try:
        vectors = backend.unembedding()[0].detach().float()
    except ModelError:
        return lambda tokens: 0.0
    center = vectors.mean(1, keepdim=True)

    def alike(tokens: Sequence[int]) -> float:
        if len(tokens) < 2:
            return 0.0
        unit = normalize((vectors[:, list(tokens)] - center), dim=0)
        pairs = len(tokens) * (len(tokens) - 1)
        return float((unit.T @ unit).sum() - len(tokens)) / pairs

    return alike
