"""Packing: no token lost or doubled, every context exact, whatever way the text comes in."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import ContextPacker, ContextStream, Corpus, TokenPolicy
from saekit.errors import DataError

BOS, SEP, SEQ = 0, 1, 2
documents = st.lists(st.lists(st.integers(0, 9), max_size=25), max_size=12)
special = st.one_of(st.none(), st.integers(0, 3))
policies = st.builds(
    TokenPolicy, context_size=st.integers(2, 9), begin_batch=special, begin_sequence=special, separator=special
)


def expected_stream(docs: Sequence[Sequence[int]], policy: TokenPolicy) -> list[int]:
    """One token at a time: everything but the tokens that begin contexts, which depend on the position."""
    out: list[int] = []
    for number, doc in enumerate([doc for doc in docs if len(doc)]):
        wanted = list(doc)
        for token in [policy.begin_sequence, policy.separator if number else None]:
            if token is not None and wanted[0] != token:
                wanted.insert(0, token)
        out += wanted
    return out


@settings(max_examples=150)
@given(documents, policies)
def test_nothing_is_lost_or_doubled(docs: list[list[int]], policy: TokenPolicy) -> None:
    packer = ContextPacker(policy)
    contexts = [context for doc in docs for context, _ in packer.add(doc)]
    wanted = expected_stream(docs, policy)
    position = 0
    for context in contexts:
        assert len(context) == policy.context_size
        body = list(context)
        if policy.begin_batch is not None:
            assert body[0] == policy.begin_batch
            if wanted[position] != policy.begin_batch:
                body = body[1:]
        assert body == wanted[position : position + len(body)]
        position += len(body)
    waiting = packer.state_dict()["tokens"]
    if waiting and policy.begin_batch is not None and wanted[position] != policy.begin_batch:
        waiting = waiting[1:]
    assert waiting == wanted[position:]


@settings(max_examples=100)
@given(documents, policies, st.data())
def test_a_saved_state_goes_on_with_the_very_same_contexts(
    docs: list, policy: TokenPolicy, data: st.DataObject
) -> None:
    def stream() -> ContextStream:
        return ContextStream(docs, list, policy, d_vocab=10, repeat=False)

    def drain(contexts: ContextStream) -> list[list[int]]:
        rows = []
        while len(part := contexts.take(data.draw(st.integers(1, 4)))):
            rows += part.tokens.tolist()
        return rows

    whole = drain(stream())
    first = stream()
    begun = first.take(data.draw(st.integers(0, 6))).tokens.tolist()
    second = stream()
    second.load_state_dict(first.state_dict())
    assert begun + drain(second) == whole


@settings(max_examples=100)
@given(documents, policies, st.data())
def test_documents_may_come_in_any_pieces(docs: list[list[int]], policy: TokenPolicy, data: st.DataObject) -> None:
    whole, pieces = ContextPacker(policy), ContextPacker(policy)
    one = [context for number, doc in enumerate(docs) for context in whole.add(doc, number)]
    two = []
    for number, doc in enumerate(docs):
        begins = True
        while doc:
            cut = data.draw(st.integers(1, len(doc)))
            two += pieces.extend(doc[:cut], number, begins=begins)
            doc, begins = doc[cut:], False
    assert [(t.tolist(), d.tolist()) for t, d in one] == [(t.tolist(), d.tolist()) for t, d in two]
    assert whole.state_dict() == pieces.state_dict()


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(5, 9), max_size=25), max_size=12), st.integers(2, 9), st.booleans())
def test_bos_where_promised_and_only_there(docs: list[list[int]], size: int, separated: bool) -> None:
    policy = TokenPolicy(context_size=size, begin_batch=BOS, separator=BOS if separated else None)
    packer = ContextPacker(policy)
    began: set[int] = set()  # documents of which a token has been seen
    for number, doc in enumerate(docs):
        for tokens, origins in packer.add(doc, number):
            assert tokens[0] == BOS
            for position in range(1, size):
                first = origins[position] not in began and origins[position] != origins[position - 1]
                separator = separated and first and len(began | set(origins[:position].tolist())) > 0
                assert (tokens[position] == BOS) == bool(separator)
            began |= set(origins.tolist())


@settings(max_examples=100)
@given(documents, policies)
def test_every_token_knows_its_document(docs: list[list[int]], policy: TokenPolicy) -> None:
    """Without the tokens that are put in, the tokens that say they are a document's are that document's."""
    plain = TokenPolicy(context_size=policy.context_size)
    packer = ContextPacker(plain)
    found: dict[int, list[int]] = {}
    for number, doc in enumerate(docs):
        for tokens, origins in packer.add(doc, number):
            for token, origin in zip(tokens.tolist(), origins.tolist(), strict=True):
                found.setdefault(origin, []).append(token)
    for number, tokens in found.items():
        assert tokens == docs[number][: len(tokens)]


@settings(max_examples=100)
@given(documents, policies, st.lists(st.integers(1, 5), max_size=20))
def test_any_calls_give_the_same_contexts(docs: list[list[int]], policy: TokenPolicy, sizes: list[int]) -> None:
    def stream() -> ContextStream:
        return ContextStream(docs, list, policy, d_vocab=10, repeat=False)

    whole = stream().take(10**6)
    parts = stream()
    taken = [parts.take(n) for n in sizes] + [parts.take(10**6)]
    for name in ("tokens", "documents"):
        assert np.concatenate([getattr(part, name) for part in taken]).tolist() == getattr(whole, name).tolist()
    assert not len(parts.take(1))


def test_a_long_document_is_packed_as_it_is_needed() -> None:
    """A state inside a long document is small, and goes on inside it."""
    policy = TokenPolicy(context_size=4, begin_batch=BOS)

    def stream() -> ContextStream:
        return ContextStream([[5] * 3, list(range(1, 10)) * 2000], list, policy, d_vocab=10, repeat=True)

    one, two = stream(), stream()
    one.take(1000)
    state = one.state_dict()
    assert len(json.dumps(state)) < 1000
    two.load_state_dict(json.loads(json.dumps(state)))
    assert one.take(8000).tokens.tolist() == two.take(8000).tokens.tolist(), "to the second reading"
    assert one.readings == 1


def test_bos_begins_every_context_once_also_on_tokenized_data() -> None:
    policy = TokenPolicy(context_size=4, begin_batch=BOS, separator=BOS)
    packer = ContextPacker(policy)
    contexts = packer.add([BOS, 5, 6, 7]) + packer.add([8, 9]) + packer.add([BOS, 4, 4, 4, 4])
    assert [tokens.tolist() for tokens, _ in contexts] == [[0, 5, 6, 7], [0, 8, 9, 0], [0, 4, 4, 4]]


def of(config: DatasetConfig, **tokens: int | None) -> TokenPolicy:
    return TokenPolicy.of(config, tokens)


def settled(**options: object) -> DatasetConfig:
    return Corpus.of(DatasetConfig(**options), EvalsConfig()).config  # type: ignore[arg-type]


def test_policies_from_a_configuration() -> None:
    tokens = {"bos": 7, "eos": 8, "sep": None}
    assert of(settled(context_size=5), **tokens) == TokenPolicy(context_size=5, begin_batch=7, separator=7)
    custom = settled(
        prepend_bos=False, begin_batch_token="eos", begin_sequence_token=3, sequence_separator_token="none"
    )
    assert of(custom, **tokens) == TokenPolicy(context_size=128, begin_batch=8, begin_sequence=3)
    with pytest.raises(
        DataError, match=r"dataset.sequence_separator_token asks for the tokenizer's sep token.*\{'bos': 7"
    ):
        of(settled(sequence_separator_token="sep"), **tokens)


def stream_of(docs: object, repeat: bool = True) -> ContextStream:
    policy = TokenPolicy(context_size=3)
    return ContextStream(docs, lambda text: [ord(c) - 97 for c in text], policy, d_vocab=5, repeat=repeat)  # type: ignore[arg-type]


def test_exhausted_data() -> None:
    assert stream_of(["abcd", "e"], repeat=False).take(9).tokens.tolist() == [[0, 1, 2]]
    # The tail goes on into the next reading.
    assert stream_of(["abcd"]).take(4).tokens.tolist() == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]
    with pytest.raises(DataError, match="documents are not there"):
        stream_of([]).take(1)
    with pytest.raises(DataError, match="hold no tokens"):
        stream_of(["", ""]).take(1)


def test_a_foreign_vocabulary() -> None:
    with pytest.raises(DataError, match=r"token id 25 for document 1, but its vocabulary \(d_vocab\) ends at 4"):
        stream_of(["abc", "z"]).take(9)


def test_token_arrays_are_documents_too() -> None:
    assert stream_of([np.array([1, 2, 3])], repeat=False).take(1).tokens.tolist() == [[1, 2, 3]]
