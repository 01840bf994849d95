"""How text becomes contexts: by the configuration, or by what pretokenized data says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus, TokenPolicy
from saekit.errors import ConfigError, DataError
from saekit.testing import FakeBackend

TOKENS = ("begin_batch_token", "begin_sequence_token", "sequence_separator_token")
SPECIAL = {"bos": 0, "eos": 1, "sep": 2}
DEFAULTS = {
    "context_size": 128, "prepend_bos": True, "begin_batch_token": "none", "begin_sequence_token": "none",
    "sequence_separator_token": "bos",
}  # fmt: skip
OTHERS = {"disable_concat_sequences": False, "chat_template": False}
"""What is settled beside them."""


def corpus_of(path: Path | str, evals: EvalsConfig | None = None, **stated: Any) -> Corpus:
    return Corpus.of(DatasetConfig(path=str(path), **stated), evals or EvalsConfig())


def valid(policy: dict[str, Any]) -> bool:
    try:
        DatasetConfig(**policy)
    except ConfigError:
        return False
    return True


token = st.sampled_from(["none", "bos", "eos", "sep", 3])
policies = st.fixed_dictionaries(
    {"context_size": st.integers(2, 4), "prepend_bos": st.booleans()} | dict.fromkeys(TOKENS, token)
).filter(valid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contexts")


@settings(max_examples=200)
@given(made=policies, other=policies, names=st.sets(st.sampled_from(sorted(DEFAULTS))))
def test_pretokenized_data_settles_every_option(folder: Path, made: dict, other: dict, names: set[str]) -> None:
    (folder / "saekit.json").write_text(json.dumps(made | {"vocab_size": 50}))
    agreeing = {name: made[name] for name in names}
    if valid(agreeing):
        assert corpus_of(folder, **agreeing).config == DatasetConfig(path=str(folder), **DEFAULTS | OTHERS | made)
    stated = {name: other[name] for name in names}
    if not valid(stated):
        return
    different = {f"dataset.{name}" for name in stated if stated[name] != made[name]}
    try:
        corpus = corpus_of(folder, **stated)
    except ConfigError as error:
        named = {name for name, _ in error.problems}
        assert named
        assert named <= different
        assert different - named <= {"dataset.prepend_bos", "dataset.begin_batch_token"}, "the two can say the same"
    else:
        assert corpus.policy(SPECIAL) == TokenPolicy.of(DatasetConfig(**made), SPECIAL)
        assert corpus.packed is not None
        assert (corpus.packed.tokenizer, corpus.packed.vocab_size, corpus.packed.token_ids) == (None, 50, None)


@settings(max_examples=100)
@given(other=policies, names=st.sets(st.sampled_from(sorted(DEFAULTS))))
def test_text_has_the_defaults(other: dict, names: set[str]) -> None:
    stated = {name: other[name] for name in names}
    if valid(stated):
        corpus = corpus_of("some.txt", **stated)
        assert {name: getattr(corpus.config, name) for name in DEFAULTS} == DEFAULTS | stated
        assert corpus.packed is None


def test_what_contradicts_the_contexts_is_named(tmp_path: Path) -> None:
    (tmp_path / "saekit.json").write_text('{"context_size": 24}')
    contrary = {"context_size": 48, "begin_sequence_token": 7, "sequence_separator_token": "none"}
    with pytest.raises(ConfigError) as caught:
        corpus_of(tmp_path, **contrary)
    contexts, advice = f"the contexts of {str(tmp_path)!r}", "leave it out, or pretokenize anew"
    assert caught.value.problems == [
        (f"dataset.{name}", f"is {value!r}, but {contexts} were made with {was!r}; {advice}")
        for (name, value), was in zip(contrary.items(), (24, "none", "bos"), strict=True)
    ]
    assert corpus_of(tmp_path, prepend_bos=False, begin_batch_token="bos").policy(SPECIAL).begin_batch == 0
    with pytest.raises(ConfigError, match=r"^dataset.prepend_bos: is False, but .* made with True; leave it out"):
        corpus_of(tmp_path, prepend_bos=False)


@pytest.mark.parametrize("file", ["saekit.json", "sae_lens.json"])
def test_a_copy_of_a_dataset_repository(tmp_path: Path, file: str) -> None:
    """As git or ``hf download`` makes one: parquet files, which save_to_disk has not written."""
    rows = [[0, n, n + 1, n + 2] for n in range(40)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n")
    (tmp_path / file).write_text('{"context_size": 4, "begin_batch_token": "bos"}')
    corpus = corpus_of(tmp_path)
    assert corpus.context_size == 4
    assert corpus.contexts(FakeBackend()).take(19).tokens.tolist() == rows[:19]


SAE_LENS = {
    "sae_lens_version": "6.0.0", "tokenizer_name": "some/one", "original_dataset": "somebody/text", "context_size": 12,
    "shuffled": True, "seed": None, "begin_batch_token": "bos", "begin_sequence_token": None,
    "sequence_separator_token": "eos", "disable_concat_sequences": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "begin"),
    [(("bos", None, "bos"), 0), ((None, "bos", None), None), (("eos", 3, 9), 1), ((0, "eos", "sep"), 0)],
)
def test_contexts_of_sae_lens(tmp_path: Path, tokens: tuple, begin: int | None) -> None:
    rows = [[9 if begin is None else begin, *range(n, n + 11)] for n in range(60)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path)
    (tmp_path / "sae_lens.json").write_text(json.dumps(SAE_LENS | dict(zip(TOKENS, tokens, strict=True))))
    corpus = corpus_of(tmp_path)
    assert corpus.config.prepend_bos == (tokens[0] == "bos")
    assert [getattr(corpus.config, name) for name in TOKENS] == ["none" if t is None else t for t in tokens]
    assert (corpus.context_size, corpus.policy(SPECIAL).begin_batch) == (12, begin)
    backend = FakeBackend()
    backend.special_tokens = SPECIAL
    contexts = corpus.contexts(backend).take(57).tokens.tolist()
    assert contexts == [row for number, row in enumerate(rows) if number % 20 != 19], "whole, with nothing put in"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("saekit.json", "{", "saekit.json of the dataset '.*' cannot be read: Expecting property name"),
        ("saekit.json", "[]", "saekit.json of the dataset .* cannot be read: 'list' object is not a mapping"),
        ("saekit.json", '{"context_size": null}', "cannot be read: context_size is null"),
        ("saekit.json", '{"begin_sequence_token": "cls"}', "begin_sequence_token: must be \"bos\".*found 'cls'"),
        ("sae_lens.json", '{"begin_batch_token": "bos"}', "cannot be read: it does not say 'context_size'"),
        ("sae_lens.json", '{"context_size": "long"}', "cannot be read: context_size: must be 2 or more, found 'long'"),
        ("sae_lens.json", '{"context_size": 16}', "first context of '.*' has 12 tokens, but the file .* says 16"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, file: str, text: str, message: str) -> None:
    datasets.Dataset.from_dict({"input_ids": [[1] * 12] * 60}).save_to_disk(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        corpus_of(tmp_path).contexts(FakeBackend())


def test_a_token_that_the_model_does_not_know() -> None:
    corpus = corpus_of("saekit/python-stdlib", begin_sequence_token=300)
    with pytest.raises(DataError, match="puts in the token id 300, but the vocabulary of the model 'fake' ends at 127"):
        corpus.contexts(FakeBackend())
