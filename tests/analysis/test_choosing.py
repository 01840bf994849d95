"""Which features are shown first: those that fire on different words that mean something alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.analysis.choosing import readable_contexts, striking_features
from saekit.analysis.examples import FeaturePeaks
from saekit.testing import FakeBackend

WORDS = [
    " may",
    " will",
    " should",
    " must",
    " the",
    " cat",
    " of",
    "mo",
    "la",
    "ba",
    "ti",
    "ment",
    "(",
    " 0x41",
    " 17",
]
GROUPS = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4])
"""Words of one group have unembedding vectors that are alike."""


class Speaking(FakeBackend):
    d_vocab = len(WORDS)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [WORDS[token] for token in tokens]

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        noise = 0.2 * torch.randn(8, len(WORDS), generator=torch.Generator().manual_seed(0))
        return torch.eye(8)[:, GROUPS] + noise, None


def peaks(*peaks: Sequence[str], after: str = "(") -> tuple[FeaturePeaks, Tensor]:
    """Features that fire on these words, each in a context of its own, with a neighbor behind."""
    k = len(peaks[0])
    contexts = torch.full((k * len(peaks), 3), WORDS.index(" of"))
    for feature, words in enumerate(peaks):
        for place, word in enumerate(words):
            contexts[feature * k + place, 1:] = torch.tensor([WORDS.index(word), WORDS.index(after)])
    numbers = torch.arange(k * len(peaks)).reshape(len(peaks), k).T
    shape = (k, len(peaks))
    fired = torch.full((len(peaks),), 50)
    return FeaturePeaks(
        torch.full(shape, 5.0), numbers, torch.ones(shape, dtype=torch.long), fired, fired, fired.float(), 1000
    ), contexts


MODAL = [" may", " will", " should", " must"]


def test_different_words_of_one_meaning_come_first() -> None:
    found, contexts = peaks([" the"] * 4, [" the", " cat", " of", " may"], MODAL, ["mo", "la", "ba", "ti"])
    chosen = striking_features(found, contexts, Speaking(), 4)
    assert chosen[0] == 2
    assert chosen[-1] == 0, "one word alone comes last"


def test_no_two_fire_on_much_the_same_words() -> None:
    found, contexts = peaks(MODAL, MODAL[::-1], [" the", " cat", " of", " may"])
    assert set(striking_features(found, contexts, Speaking(), 2)) & {0, 1} != {0, 1}
    assert sorted(striking_features(found, contexts, Speaking(), 3)) == [0, 1, 2], "but as many as are wanted"


def test_beginnings_of_words_come_after_whole_ones() -> None:
    pieces, contexts = peaks(["mo", "la", "ba", "ti"], [" the", " cat", " of", " may"], after="ment")
    contexts[4:, 2] = WORDS.index("(")
    assert striking_features(pieces, contexts, Speaking(), 1) == [1]


def test_features_that_fire_everywhere_or_nowhere_are_not_chosen_before_others() -> None:
    found, contexts = peaks(MODAL, [" the", " cat", " of", " may"], ["mo", "la", "ba", "ti"])
    found.fired[0], found.fired[1] = 500, 0
    assert striking_features(found, contexts, Speaking(), 3) == [2, 0], "the second never fires"


def test_tables_of_characters_and_numbers_are_left_out() -> None:
    prose = [WORDS.index(word) for word in [" the", " cat", " of", " may", " will", " should"]]
    table = [WORDS.index(word) for word in [" 0x41", " the", " 17", " 0x41", " 17", " cat"]]
    contexts = torch.tensor([prose, table, prose, prose])
    assert readable_contexts(contexts, Speaking()).tolist() == [prose, prose, prose]
    only = torch.tensor([table, table, table, prose])
    assert torch.equal(readable_contexts(only, Speaking()), only), "else hardly anything would be left"


def test_without_an_unembedding_neighbors_decide() -> None:
    class Silent(Speaking):
        unembedding = FakeBackend.__base__.unembedding  # type: ignore[assignment,union-attr]

    found, contexts = peaks([" the", " cat", " of", " may"], MODAL)
    contexts[:4, 0] = torch.tensor([WORDS.index(word) for word in MODAL])
    contexts[:4, 2] = torch.tensor([WORDS.index(word) for word in ["(", " of", " the", " cat"]])
    assert striking_features(found, contexts, Silent(), 1) == [1]
