"""Text that is passed in memory: one text, many, tables, and what is none of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch

import saekit
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus, Documents
from saekit.data.in_memory import in_memory_records
from saekit.errors import DataError
from saekit.testing import FakeBackend

TEXTS = ["the first", "the second", "and a third"]
LINES = "".join(f"line {n} of a text\n" for n in range(1000))


def read(dataset: object, config: DatasetConfig | None = None, **options: Any) -> list[Any]:
    return list(Documents.open(config or DatasetConfig(), dataset=dataset, **options))


def test_a_text_is_one_document() -> None:
    assert read(LINES) == [LINES]
    assert read("one short text") == ["one short text"]
    assert read("x" * 300) == ["x" * 300], "no name is as long"


@pytest.mark.parametrize(
    "many",
    [
        TEXTS, tuple(TEXTS), np.array(TEXTS), pandas.Series(TEXTS, index=[5, 6, 7]),
        datasets.Dataset.from_dict({"text": TEXTS})["text"],
        pandas.DataFrame({"text": TEXTS}, index=[5, 6, 7]), pandas.DataFrame({"n": [1, 2, 3], "text": TEXTS}),
    ],
    ids=lambda many: type(many).__name__,
)  # fmt: skip
def test_many_texts_are_many_documents(many: object) -> None:
    assert read(many) == TEXTS
    assert read({"train": many, "other": []}) == TEXTS
    documents = Documents.open(DatasetConfig(), dataset=many)
    reader = documents.read()
    next(reader)
    again = documents.read()
    again.load_state_dict(reader.state_dict())
    assert [text for _, text in again] == TEXTS[1:], "from the middle"


def test_columns_of_a_data_frame() -> None:
    frame = pandas.DataFrame({"title": ["a", "b"], "text": ["x", None], "input_ids": [[1, 2], np.array([3])]})
    assert [list(ids) for ids in read(frame)] == [[1, 2], [3]], "input_ids come before text"
    assert read(frame, DatasetConfig(column="text")) == ["x"], "a missing value is no document"
    assert read(frame, DatasetConfig(column="title")) == ["a", "b"]
    with pytest.raises(DataError, match="none of the columns tokens, input_ids, text; it has 'title'"):
        read(frame[["title"]])
    with pytest.raises(DataError, match="has no documents"):
        read(frame[:0])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("owner/name", "'owner/name' reads like the name of a file or of a dataset. Name it in dataset.path"),
        ("gpt2", "reads like the name of a file or of a dataset"),
        ("my notes.TXT", "reads like the name of a file or of a dataset"),
        (".", "'.' is no text: there is a file or folder of that name. Name it in dataset.path"),
        (Path("book.txt"), r"Path\('book.txt'\) is a path: name it in dataset.path"),
        (b"bytes", "the dataset is a bytes, which holds no documents. It may be a text, a list of texts"),
        (7, "the dataset is an int, which holds no documents"),
        (torch.zeros(2, 3, dtype=torch.long), r"a Tensor of the shape \[2, 3\]; pass its rows as records"),
        (np.zeros((2, 3), dtype=int), r"a ndarray of the shape \[2, 3\]"),
        ({"text": TEXTS}, "a dict with the column 'text', and of such, splits are expected"),
        ({"dev": TEXTS}, "has no split 'train'; it has 'dev'"),
        ([[1, 2], [3]], "the dataset holds lists; pass them as records"),
        ((text for text in TEXTS), "the dataset is a generator, which can be read only once"),
        ([], "has no documents"),
        ("", "has no documents"),
        ([1.5], "the dataset holds float records, expected mappings"),
    ],
    ids=lambda value: "" if isinstance(value, str) and len(value) > 12 else None,
)  # fmt: skip
def test_what_is_no_text(dataset: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(dataset)


@pytest.mark.parametrize("many", [["a text", 5], ("a text", None)])
def test_what_is_no_text_among_texts(many: Any) -> None:
    """It is not left out unseen."""
    said = r"begins with texts, and its item 1 is (an int: 5|a NoneType: None)\. It may be"
    with pytest.raises(DataError, match=said):
        list(in_memory_records(many, None, "train"))


def test_what_is_no_text_shows_before_a_model_is_loaded(tmp_path: Path) -> None:
    config = {"model": {"name": "./nowhere"}, "checkpoints": {"folder": str(tmp_path)}}
    with pytest.raises(saekit.ConfigError, match=r"reads like the name(?s:.*)there is no model folder"):
        saekit.train(config, dataset="owner/name")


def test_the_end_of_one_text_is_held_out() -> None:
    corpus = Corpus.of(DatasetConfig(context_size=16), EvalsConfig(held_out_every=10), LINES)
    (trained,), (held,) = corpus.training_documents(), corpus._held_out_documents()
    assert trained + held == LINES
    assert trained.endswith("\n")
    assert 0.09 < len(held) / len(LINES) < 0.11
    contexts = corpus.held_out(FakeBackend(), seed=0)
    assert contexts.shape[1] == 16
    every = Corpus.of(DatasetConfig(), EvalsConfig(held_out_every=0, run=()), LINES)
    assert list(every.training_documents()) == [LINES]
    words = Corpus.of(DatasetConfig(), EvalsConfig(held_out_every=4), "four words of text " * 8)
    assert next(iter(words.training_documents())).endswith(" ")


@pytest.mark.parametrize("name", ["script.py", "notes.md", "a.text", "b.TEXT", "c.txt"])
def test_files_of_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x = 1\n")
    assert read(None, DatasetConfig(path=tmp_path / name)) == ["x = 1\n"]  # type: ignore[arg-type]
    config = saekit.load_config({"dataset": {"path": tmp_path / name}})
    assert config.dataset.path == str(tmp_path / name)
    with pytest.raises(DataError, match="there is no file or folder"):
        read(None, DatasetConfig(path=str(tmp_path / f"no-{name}")))
