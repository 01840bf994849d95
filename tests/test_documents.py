"""Text from wherever it is, and clear words when it is not there."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from saekit.config import DatasetConfig
from saekit.data import Documents
from saekit.data.stdlib import stdlib_documents
from saekit.errors import DataError

RECORDS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "three", "n": 3}]


def read(config: DatasetConfig | None = None, **options: object) -> list:
    return list(Documents.open(config or DatasetConfig(), **options))  # type: ignore[arg-type]


def test_in_memory() -> None:
    hf = datasets.Dataset.from_list(RECORDS)
    assert (
        read(dataset=RECORDS) == read(dataset=hf) == read(dataset=hf.to_iterable_dataset()) == ["one", "two", "three"]
    )
    assert read(dataset=RECORDS, keep=lambda index: index % 2 == 0) == ["one", "three"]
    assert read(DatasetConfig(column="input_ids"), dataset=[{"text": "x", "input_ids": [1, 2]}]) == [[1, 2]]
    assert read(dataset=datasets.DatasetDict(train=hf)) == ["one", "two", "three"]


def test_local_files(tmp_path: Path) -> None:
    hf = datasets.Dataset.from_list(RECORDS)
    hf.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict(train=hf, dev=hf.select([0])).save_to_disk(tmp_path / "dict")
    hf.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "d.txt").write_text("one line\nand another")
    for name in ("disk", "dict", "d.parquet", "d.jsonl"):
        assert read(DatasetConfig(path=str(tmp_path / name))) == ["one", "two", "three"]
    assert read(DatasetConfig(path=str(tmp_path / "dict"), split="dev")) == ["one"]
    assert read(DatasetConfig(path=str(tmp_path / "d.txt"))) == ["one line\nand another"]
    (tmp_path / "long.txt").write_text("".join(f"line {n}\n" for n in range(20_000)))
    pieces = read(DatasetConfig(path=str(tmp_path / "long.txt")))
    assert len(pieces) >= 40
    assert "".join(pieces) == (tmp_path / "long.txt").read_text()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read(DatasetConfig(path=str(tmp_path / "latin.txt")))
    with pytest.raises(DataError, match="was saved without splits, so it has no split 'dev'"):
        read(DatasetConfig(path=str(tmp_path / "disk")), split="dev")
    with pytest.raises(DataError, match="has no split 'test'; it has 'train', 'dev'"):
        read(DatasetConfig(path=str(tmp_path / "dict"), split="test"))
    with pytest.raises(DataError, match="a single file has only 'train'"):
        read(DatasetConfig(path=str(tmp_path / "d.txt"), split="test"))


@pytest.mark.parametrize(
    ("config", "dataset", "message"),
    [
        (DatasetConfig(path="./nowhere"), None, "there is no file or folder './nowhere'"),
        (DatasetConfig(path="some/unknown-dataset"), None, "'some/unknown-dataset' .*cannot be opened"),
        (DatasetConfig(path="saekit/python-stdlib", split="test"), None, "it has 'train', 'heldout' and 'all'"),
        (DatasetConfig(column="body"), RECORDS, "no column 'body'; it has 'text', 'n'"),
        (DatasetConfig(), [{"body": "x"}], "none of the columns tokens, input_ids, text; it has 'body'"),
        (DatasetConfig(column="n"), RECORDS, "column 'n' of the dataset holds int"),
        (DatasetConfig(), [], "has no documents"),
        (DatasetConfig(), ["one"], "holds str records"),
        (DatasetConfig(), iter(RECORDS), "can be read only once"),
    ],
)
def test_what_is_wrong_is_said(config: DatasetConfig, dataset: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(config, dataset=dataset)


def test_the_standard_library() -> None:
    train = {document["path"] for document in stdlib_documents("train")}
    held = {document["path"] for document in stdlib_documents("heldout")}
    assert len(train) > 300
    assert 10 < len(held) < len(train) / 10
    assert not train & held
    assert train | held == {document["path"] for document in stdlib_documents("all")}
    assert "ast.py" in train | held
    assert not any("/test/" in f"/{path}" for path in train | held)
    assert any("def " in text for text in read(DatasetConfig(split="heldout")))
