"""The packer with masks and with one document in each context, against an obvious one; and states that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saekit
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import ContextStream, Corpus, TokenPolicy
from saekit.data.documents import Form
from saekit.data.text import Documents
from saekit.errors import DataError
from saekit.testing import FakeBackend

token = st.one_of(st.none(), st.integers(0, 3))
policies = st.builds(
    TokenPolicy,
    context_size=st.integers(2, 6),
    begin_batch=token,
    begin_sequence=token,
    separator=token,
    one_document=st.booleans(),
)
masked_document = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=15)
Context = list[tuple[int, int, bool]]


def slow(documents: list[list[tuple[int, bool]]], policy: TokenPolicy) -> tuple[list[Context], int, int]:
    """Contexts of ``(token, document, counts)``, one token after the other; documents left out, and cut."""
    contexts: list[Context] = []
    current: Context = []
    left_out = cut = 0
    begun = False
    for number, document in enumerate(documents):
        given = [(token, number, counts) for token, counts in document]
        if not given:
            continue
        if policy.begin_sequence is not None and given[0][0] != policy.begin_sequence:
            given.insert(0, (policy.begin_sequence, number, False))
        if policy.separator is not None and begun and not policy.one_document and given[0][0] != policy.separator:
            given.insert(0, (policy.separator, number, False))
        begun = True
        if policy.one_document:
            if policy.begin_batch is not None and given[0][0] != policy.begin_batch:
                given.insert(0, (policy.begin_batch, number, False))
            left_out += len(given) < policy.context_size
            cut += len(given) > policy.context_size
            contexts += [given[: policy.context_size]] if len(given) >= policy.context_size else []
            continue
        for one in given:
            if not current and policy.begin_batch is not None and one[0] != policy.begin_batch:
                current.append((policy.begin_batch, number, False))
            current.append(one)
            if len(current) == policy.context_size:
                contexts.append(current)
                current = []
    return contexts, left_out, cut


def stream_of(documents: list[list[tuple[int, bool]]], policy: TokenPolicy, *, masked: bool) -> ContextStream:
    records = [
        {"tokens": [token for token, _ in document], "mask": [int(counts) for _, counts in document]}
        for document in documents
    ]
    read = Documents(records, "tokens", form=Form(mask="mask" if masked else None))
    return ContextStream(read, list, policy, d_vocab=9, repeat=False, masked=masked)


def taken(stream: ContextStream, sizes: Iterator[int]) -> Iterator[Context]:
    for size in sizes:
        contexts = stream.take(size)
        masks = np.ones_like(contexts.tokens, dtype=bool) if contexts.counts is None else contexts.counts
        for columns in zip(contexts.tokens.tolist(), contexts.documents.tolist(), masks.tolist(), strict=True):
            yield list(zip(*columns, strict=True))
        if len(contexts) < size:
            return


@settings(max_examples=150)
@given(
    documents=st.lists(masked_document, max_size=8),
    policy=policies,
    masked=st.booleans(),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    stop=st.integers(0, 6),
)
def test_any_documents_are_packed_as_one_token_after_the_other(
    documents: Any, policy: TokenPolicy, masked: bool, sizes: list[int], stop: int
) -> None:
    wanted, left_out, cut = slow(documents, policy)
    if not masked:
        wanted = [[(token, number, True) for token, number, _ in context] for context in wanted]
    stream = stream_of(documents, policy, masked=masked)
    begun = list(taken(stream, iter(sizes[:1] * stop)))
    state = json.loads(json.dumps(stream.state_dict()))
    again = stream_of(documents, policy, masked=masked)
    again.load_state_dict(state)
    for going_on in (stream, again):
        assert begun + list(taken(going_on, iter(sizes * 200))) == wanted
        if policy.one_document:
            assert (going_on.left_out, going_on.cut) == (left_out, cut)


def test_no_token_is_padded_and_none_is_of_two_documents() -> None:
    texts = [[n] * length for n, length in enumerate([3, 8, 20, 7], start=1)]
    stream = ContextStream(
        texts, list, TokenPolicy(context_size=8, begin_batch=0, separator=0, one_document=True), d_vocab=9, repeat=False
    )
    assert stream.take(9).tokens.tolist() == [[0] + [2] * 7, [0] + [3] * 7, [0] + [4] * 7]
    assert (stream.left_out, stream.cut) == (1, 2)


@pytest.mark.parametrize("repeat", [True, False])
def test_only_short_documents_are_an_error_and_no_endless_reading(repeat: bool) -> None:
    policy = TokenPolicy(context_size=8, one_document=True)
    stream = ContextStream([[1, 2], [3]], list, policy, d_vocab=9, repeat=repeat)
    if repeat:
        with pytest.raises(DataError, match=r"all 2 documents are too short .* \(dataset\.disable_concat_sequences\)"):
            stream.take(1)
    else:
        assert not len(stream.take(1))


@pytest.mark.parametrize("change", [{"left_out": -1}, {"left_out": "one"}, {"cut": None}])
def test_a_damaged_state_is_seen(change: dict[str, Any]) -> None:
    policy = TokenPolicy(context_size=4, one_document=True)
    stream = ContextStream([[1, 2]], list, policy, d_vocab=9, repeat=False)
    state = stream.state_dict()
    with pytest.raises(ValueError, match="of a saved state is"):
        stream.load_state_dict(state | {"packer": state["packer"] | change})
    masked = stream_of([[(1, True)]], TokenPolicy(context_size=4), masked=True)
    masked.take(1)
    state = masked.state_dict()
    with pytest.raises(ValueError, match="expected 1 times true or false"):
        masked.load_state_dict(state | {"packer": state["packer"] | {"counts": [1]}})


RECORDS = [{"tokens": [1, 2, 3], "mask": [1, 0, 1]}, {"tokens": [4, 5], "mask": [True, False]}]


def opened(records: Any, **config: Any) -> Documents:
    corpus = Corpus.of(DatasetConfig(**config), EvalsConfig(run=()), records, "mask")
    return corpus.documents()


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            [{"text": "abc", "mask": [1, 0, 1]}],
            r"tokens\.mask_column is 'mask', .* and column 'text' of .* holds texts",
        ),
        ([{"tokens": [1, 2]}], r"the dataset has no column 'mask' \(tokens\.mask_column\); it has 'tokens'"),
        (
            [*RECORDS, {"tokens": [1, 2], "mask": [1]}],
            "the mask of document 2 of the dataset has 1 numbers, and it has 2",
        ),
        (
            [*RECORDS, {"tokens": [1, 2], "mask": [1, 2]}],
            r"document 2 .* is \[1, 2\], expected a 0 or 1 for each token",
        ),
        ([*RECORDS, {"tokens": [1, 2], "mask": None}], "document 2 of the dataset is None, expected a 0 or 1"),
        ([*RECORDS, {"tokens": [1, 2], "mask": [0.5, 1]}], "expected a 0 or 1 for each token"),
        ([*RECORDS, {"tokens": [1, 2]}], r"document 2 of the dataset has no column 'mask' \(tokens\.mask_column\)"),
        ([*RECORDS, {"tokens": "ab", "mask": [1, 0]}], "document 2 of the dataset is a text, which no mask fits"),
    ],
)
def test_a_mask_that_fits_no_tokens_is_refused(records: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(opened(records))


def test_a_mask_of_a_hugging_face_dataset_is_read() -> None:
    import datasets

    policy = {"context_size": 5, "prepend_bos": False, "sequence_separator_token": "none"}
    records = datasets.Dataset.from_list(RECORDS[:1] * 5)
    corpus = Corpus.of(DatasetConfig(**policy), EvalsConfig(run=(), held_out_every=0), records, "mask")
    found = corpus.contexts(FakeBackend()).take(2)
    assert found.tokens.tolist() == [[1, 2, 3, 1, 2], [3, 1, 2, 3, 1]]
    assert found.counts is not None
    assert found.counts.tolist() == [[True, False, True, True, False], [True, True, False, True, True]]


def test_what_is_put_in_does_not_count_and_a_documents_own_token_does() -> None:
    corpus = Corpus.of(DatasetConfig(context_size=4), EvalsConfig(run=(), held_out_every=0), RECORDS, "mask")
    bos = FakeBackend().special_tokens["bos"]
    assert bos is not None
    found = corpus.contexts(FakeBackend()).take(1)
    assert found.counts is not None
    assert found.tokens.tolist() == [[bos, 1, 2, 3]]
    assert found.counts.tolist() == [[False, True, False, True]]
    own = Corpus.of(DatasetConfig(context_size=4), EvalsConfig(run=(), held_out_every=0),
                    [{"tokens": [bos, 1, 2, 3], "mask": [1, 1, 0, 0]}], "mask")  # fmt: skip
    counts = own.contexts(FakeBackend()).take(1).counts
    assert counts is not None
    assert counts.tolist() == [[True, True, False, False]]


def test_pretokenized_contexts_have_what_they_were_made_with(tmp_path: Any) -> None:
    texts = ["word " * n for n in (2, 30, 60)]
    config = {
        "tokenizer": str(saekit_tokenizer()), "folder": str(tmp_path / "c"), "verbose": False, "shuffle": False,
        "dataset": {"context_size": 12, "disable_concat_sequences": True},
    }  # fmt: skip
    made = saekit.pretokenize(config, dataset=texts)
    said = json.loads((tmp_path / "c/saekit.json").read_text())
    assert made.contexts == 2
    assert (said["documents_left_out"], said["documents_cut"]) == (1, 2)
    assert said["disable_concat_sequences"] is True
    corpus = Corpus.of(DatasetConfig(path=str(tmp_path / "c")), EvalsConfig(run=()))
    assert corpus.config.disable_concat_sequences is True
    with pytest.raises(saekit.ConfigError, match=r"dataset\.disable_concat_sequences: is False, but the contexts of"):
        Corpus.of(DatasetConfig(path=str(tmp_path / "c"), disable_concat_sequences=False), EvalsConfig(run=()))


def saekit_tokenizer() -> Any:
    from support.tiny import TOKENIZER

    return TOKENIZER
