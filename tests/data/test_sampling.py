"""Contexts that are a sample of a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit.config import DatasetConfig, EvalsConfig
from saekit.data.corpus import Corpus
from saekit.data.sampling import Sample, sampled
from saekit.data.text import Documents
from saekit.errors import DataError
from saekit.testing import FakeBackend

SIZE = 8
LONG = "a b c d e f g h " * 400


class InTurn:
    """Texts that can only be read from the first."""

    def __init__(self, texts: list[Any]) -> None:
        self._texts = texts
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for text in self._texts:
            self.read += 1
            yield text


def sample(dataset: Any, n: int, seed: int = 0, **options: Any) -> Sample:
    config = DatasetConfig(context_size=SIZE, prepend_bos=False, **options)
    return sampled(Corpus.of(config, EvalsConfig(held_out_every=0), dataset), FakeBackend(), n, seed)


def texts(count: int) -> list[str]:
    return [f"word{index} " * 40 for index in range(count)]


def test_contexts_are_from_all_over_the_text_and_of_a_seed() -> None:
    found = sample([LONG, *texts(200)], 32)
    again, other = sample([LONG, *texts(200)], 32), sample([LONG, *texts(200)], 32, seed=1)
    assert found.first is None
    assert found.contexts.tokens.shape == (32, SIZE)
    assert np.array_equal(found.contexts.tokens, again.contexts.tokens)
    assert not np.array_equal(found.contexts.tokens, other.contexts.tokens)
    documents = {*found.contexts.documents.reshape(-1).tolist()}
    assert len(documents) > 10
    assert max(documents) > 100, "positions are those in the dataset"


def test_of_a_long_document_a_piece_is_read_that_goes_on_within_it() -> None:
    words = [str(number) for number in range(4000)]
    found = [sample([" ".join(words)], 16, seed=seed).contexts.tokens for seed in (0, 1)]
    whole = FakeBackend().tokenize(" ".join(words))
    for tokens in found:
        assert len(tokens) == 16
        text = np.array(whole)
        windows = np.lib.stride_tricks.sliding_window_view(text, SIZE)
        assert all((windows == row).all(1).any() for row in tokens), "each context is a stretch of the document"
    assert not np.array_equal(*found)


def test_texts_that_are_short_give_all_that_they_have() -> None:
    found = sample(["a b c d e f g h i j k l m n o p"], 5)
    assert 0 < len(found.contexts) <= 5
    many = sample(texts(3), 30)
    assert len(many.contexts) == 30, "three documents fill it, each with more than its share"


def test_what_is_read_in_turn_is_drawn_from_its_beginning_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.data.sampling._FIRST_POOL", 20)
    found = sample(InTurn(texts(100)), 4)
    assert found.first == 20
    assert found.contexts.documents.max() < 20
    assert sample(InTurn(texts(15)), 4).first is None, "that is all of it"
    short = sample(InTurn(["a b c d e f g h"] * 400), 100)
    assert len(short.contexts) == 100
    assert (short.first or 0) > 20, "more where these are too few"
    assert sample(texts(100), 4).first is None


def test_what_is_read_in_turn_is_read_once_as_far_as_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.data.sampling._FIRST_POOL", 20)
    text = InTurn(["a b c d e f g h"] * 2000)  # 15 tokens
    assert len(sample(text, 200).contexts) == 200
    assert 200 * SIZE / 15 < text.read < 140, "the second pool is as large as the first says, and goes on from it"


def test_of_what_is_read_in_turn_little_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": text, "id": np.array(5), "vector": torch.ones(3), "other": "x" * 10**6} for text in texts(30)]
    pool = Documents.open(DatasetConfig(), dataset=InTurn(records)).pool(10**9)
    assert pool is not None
    pool.grow(20)
    assert pool.records == [{"text": text} for text in texts(20)]
    assert not pool.whole
    pool.grow(40)
    assert pool.whole
    monkeypatch.setattr("saekit.data.sampling._HELD", 2000)
    monkeypatch.setattr("saekit.data.sampling._PER_TOKEN", 0)
    text = InTurn(texts(3000))
    found = sample(text, 400)
    assert found.first == 9
    assert 60 < len(found.contexts) < 400, "all that they have, and no more is held than the bound"
    assert text.read < 14


def test_each_document_begins_its_context_where_contexts_are_of_one() -> None:
    found = sample([*texts(30), LONG], 12, disable_concat_sequences=True).contexts
    assert len(found) == 12
    assert all(len({*row}) == 1 for row in found.documents.tolist())
    start = FakeBackend().tokenize(texts(30)[int(found.documents[0, 0])])[:SIZE]
    assert found.tokens[0].tolist() == start


def test_a_record_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(3)) + '{"text": 5}\n')
    with pytest.raises(DataError):
        sample(None, 4, path=str(path))
    with pytest.raises(DataError, match="document 3 has int 5"):
        sample([*({"text": text} for text in texts(3)), {"text": 5}], 400)
