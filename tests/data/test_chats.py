"""Conversations become tokens by a chat template: nothing that it writes is lost, and BOS is not doubled."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import hooked_transformer, run_config, tokenizer

import saekit
from saekit.backends.base import Backend
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus
from saekit.data.chats import chat_tokenizer
from saekit.data.documents import Conversation
from saekit.errors import ConfigError, DataError
from saekit.testing import FakeBackend

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + PLAIN
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {n}? " * (n % 4 + 1)},
            {"role": "assistant", "content": f"it is {n}"},
        ]
    }
    for n in range(40)
]


class Chatting(FakeBackend):
    """The fake model with the embedded model's tokenizer, which has a chat template here."""

    name = "chatting"
    d_vocab = 2048

    def __init__(self, template: str | None = WITH_BOS) -> None:
        super().__init__()
        self.tokenizer = copy.deepcopy(tokenizer())
        self.tokenizer.chat_template = template
        self.special_tokens = {"bos": self.tokenizer.bos_token_id, "eos": None, "sep": None}

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def corpus(records: Any, **options: Any) -> Corpus:
    return Corpus.of(DatasetConfig(**({"context_size": 16} | options)), EvalsConfig(held_out_every=5), records)


def ids_of(backend: Any, messages: Any, template: str | None = None) -> list[int]:
    """By the library itself, as text and then as tokens."""
    text = backend.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    return list(backend.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template", [WITH_BOS, PLAIN])
def test_contexts_have_every_token_of_the_template_once(template: str) -> None:
    backend = Chatting(template)
    bos = backend.tokenizer.bos_token_id
    found = corpus(CHATS, chat_template=True, on_exhausted="stop").contexts(backend).take(10**6)
    flat = found.tokens.flatten().tolist()
    wanted: list[int] = []
    for number, record in enumerate(CHATS):
        if number % 5 == 4:
            continue  # held out
        ids = ids_of(backend, record["messages"])
        assert (ids[0] == bos) == (template == WITH_BOS)
        separated = ids if ids[0] == bos or not number else [bos, *ids]
        for token in separated:
            if len(wanted) % 16 == 0 and token != bos:
                wanted.append(bos)
            wanted.append(token)
    assert flat == wanted[: len(flat)]
    assert len(wanted) - len(flat) < 16
    twice = [pair for row in found.tokens.tolist() for pair in itertools.pairwise(row) if pair == (bos, bos)]
    assert not twice


words = st.text("ab <>{}%\n", max_size=12)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": words}), min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(messages, min_size=1, max_size=6), st.booleans(), st.integers(0, 6))
def test_any_conversations_in_contexts_of_their_own_and_together(chats: Any, alone: bool, stop: int) -> None:
    backend = BACKEND
    made = [ids_of(backend, one, PLAIN) for one in chats]
    options = {"chat_template": PLAIN, "disable_concat_sequences": alone, "context_size": 8, "on_exhausted": "stop"}
    whole = Corpus.of(DatasetConfig(**options), EvalsConfig(run=(), held_out_every=0), [{"messages": c} for c in chats])
    as_ids = Corpus.of(
        DatasetConfig(**(options | {"chat_template": None})), EvalsConfig(run=(), held_out_every=0),
        [{"tokens": ids} for ids in made],
    )  # fmt: skip
    stream, truth = whole.contexts(backend), as_ids.contexts(backend)
    first = stream.take(stop)
    again = whole.contexts(backend)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    wanted = truth.take(999).tokens
    for going_on in (stream, again):
        rest = going_on.take(999)
        assert np.array_equal(np.concatenate([first.tokens, rest.tokens]), wanted)
        assert (going_on.left_out, going_on.cut) == (truth.left_out, truth.cut)


BACKEND = Chatting()


@pytest.mark.parametrize(
    ("records", "template", "words"),
    [
        ([*CHATS[:2], {"messages": "hello"}], PLAIN, "document 2 of the dataset is 'hello', expected a conversation"),
        ([*CHATS[:2], {"messages": [{"content": "x"}]}], PLAIN, "message 0 of document 2 .* has no role; its fields"),
        ([*CHATS[:2], {"messages": [{"role": "user"}]}], PLAIN, "message 0 of document 2 .*, by 'user', has no"),
        ([*CHATS[:2], {"messages": [{"role": "user", "content": 3}]}], PLAIN, "the content of message 0 of document 2"),
        ([*CHATS[:2], {"messages": [{"role": "bot", "content": "x"}]}], STRICT, "document 2: the chat template"),
        (CHATS, "{{ messages | nothing }}", "document 0: the chat template does not take it: .*nothing"),
        ([{"conversations": [{"from": "human", "value": "x"}]}], PLAIN, "has no role; its fields are 'from', 'value'"),
        ([{"text": "a"}], PLAIN, "has none of the columns messages, conversations; it has 'text'"),
        (["a text", "another"], PLAIN, "has none of the columns messages, conversations"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(records: Any, template: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        corpus(records, chat_template=template).contexts(BACKEND).take(99)


def test_a_column_that_holds_texts_is_named() -> None:
    with pytest.raises(
        DataError, match="column 'text' of the dataset holds str, and dataset.chat_template asks for con"
    ):
        corpus([{"text": "a"}], chat_template=True, column="text").contexts(BACKEND)
    hint = r"Conversations, as in 'messages', become text with dataset\.chat_template=true"
    with pytest.raises(DataError, match=hint):
        corpus(CHATS).contexts(BACKEND)
    with pytest.raises(DataError, match=hint):
        corpus(CHATS, column="messages").contexts(BACKEND)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="is true, and the tokenizer of the model 'chatting' has no chat template; give"
    ):
        corpus(CHATS, chat_template=True).contexts(Chatting(None))
    with pytest.raises(ConfigError, match="needs a Hugging Face tokenizer, and the model 'fake' has none"):
        corpus(CHATS, chat_template=True).contexts(FakeBackend())


def test_fields_that_one_message_lacks_are_not_there_for_the_template() -> None:
    """A file of records has the fields of all messages in each."""
    template = "{% for m in messages %}{{ m.tool is defined }} {{ m.content }} {% endfor %}"
    ids = chat_tokenizer(BACKEND.tokenizer, template, "it")(
        Conversation([{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "tool": "x"}])
    )
    assert BACKEND.tokenizer.decode(ids) == "False a True b "
    records = [{"messages": [{"role": "user", "content": "a", "tool": None}]}]
    read = next(iter(corpus(records, chat_template=True).documents()))
    assert isinstance(read, Conversation)
    assert read.messages == [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def model() -> Any:
    made = hooked_transformer()
    made.tokenizer.chat_template = WITH_BOS
    yield made
    made.tokenizer.chat_template = None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of conversations, whose messages do not all have the same fields."""
    import datasets

    folder = tmp_path_factory.mktemp("chats")
    lines = [json.dumps(record) for record in CHATS]
    lines[3] = json.dumps({"messages": [{"role": "user", "content": "why? " * 9, "name": "me"}]})
    (folder / "chats.jsonl").write_text("\n".join(lines))
    datasets.Dataset.from_list(CHATS).to_parquet(folder / "chats.parquet")
    return folder


def test_it_trains_caches_and_measures_on_conversations(tmp_path: Path, model: Any, files: Path) -> None:
    chosen = {"path": str(files / "chats.jsonl"), "chat_template": True, "context_size": 16}
    run = run_config(
        tmp_path, dataset=chosen, evals={"split": None, "held_out_every": 5, "n_contexts": 2}, model={"name": "tiny"},
        site={"hook_name": "blocks.0.hook_resid_post"}, tokens={"exclude_special_tokens": True},
        training={"training_tokens": 600, "train_batch_size_tokens": 128},
        activations={"cache": {"folder": str(tmp_path / "cache"), "tokens": 600}},
    )  # fmt: skip
    result = saekit.train(run, model=model)
    about = saekit.SAE.load(result.folder / "sae").info.metadata
    assert about["chat_template"] is True
    assert result.held_out is not None
    assert "<user>what" in model.tokenizer.decode(result.held_out[0])
    manifest = saekit.cache_activations(run, model=model)
    assert manifest.identity["dataset.chat_template"].startswith("its tokenizer's, ")
    cached = run | {"activations": {"source": {"name": "cached", "folder": str(tmp_path / "cache")}}}
    with pytest.raises(DataError, match=r"dataset\.chat_template: the cache has .*, the run '"):
        saekit.train(cached | {"dataset": chosen | {"chat_template": PLAIN}}, model=model)
    planned = saekit.plan(run | {"dataset": chosen | {"disable_concat_sequences": True}}, model=model)
    assert planned.problems == []
    assert "one in each context; of the first " in planned.facts["documents"]


@pytest.mark.parametrize("processes", [1, 2])
def test_pretokenize_writes_the_same_contexts_and_says_how(tmp_path: Path, files: Path, processes: int) -> None:
    config = {
        "dataset": {"path": str(files / "chats.parquet"), "chat_template": PLAIN, "context_size": 16},
        "folder": str(tmp_path / "contexts"), "verbose": False, "shuffle": False, "num_proc": processes,
    }  # fmt: skip
    saekit.pretokenize(config, model=hooked_transformer())
    said = json.loads((tmp_path / "contexts/saekit.json").read_text())
    assert said["chat_template"] == PLAIN
    whole = Corpus.of(
        DatasetConfig(path=str(files / "chats.parquet"), chat_template=PLAIN, context_size=16, on_exhausted="stop"),
        EvalsConfig(run=(), held_out_every=0),
    )
    backend: Backend = Chatting()
    made = Corpus.of(
        DatasetConfig(path=str(tmp_path / "contexts"), on_exhausted="stop"), EvalsConfig(run=(), held_out_every=0)
    )
    assert made.config.chat_template == PLAIN
    assert made.chats is False, "they are tokens by now"
    assert np.array_equal(made.contexts(backend).take(999).tokens, whole.contexts(backend).take(999).tokens)
