"""Text from wherever it is, and clear words when it is not there."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import datasets
import pytest

import saekit
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


def test_some_files_of_a_dataset(tmp_path: Path) -> None:
    for number, record in enumerate(RECORDS):
        datasets.Dataset.from_list([record]).to_parquet(tmp_path / f"part-{number}.parquet")
    chosen = ("part-0.parquet", "part-2.parquet")
    for streaming in (True, False):
        config = DatasetConfig(path=str(tmp_path), data_files=chosen, streaming=streaming)
        assert read(config) == ["one", "three"]
    builder = DatasetConfig(path="parquet", data_files=(str(tmp_path / "part-[12].parquet"),))
    assert read(builder) == ["two", "three"]
    assert saekit.load_config({"dataset": {"data_files": list(chosen)}}).dataset.data_files == chosen
    with pytest.raises(DataError, match="data_files chooses files of a folder or a Hub dataset, and .* is neither"):
        read(attrs.evolve(config, path=str(tmp_path / "part-0.parquet")))
    with pytest.raises(DataError, match=r"\['part-9.parquet'\] .*cannot be opened"):
        read(attrs.evolve(config, data_files=("part-9.parquet",)))


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


def test_a_text_file_is_open_only_while_a_piece_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes("".join(f"line\r\n{n} é\n" for n in range(20_000)).encode())
    documents = iter(Documents.open(DatasetConfig(path=str(path))))
    next(documents)
    opened = [one for one in gc.get_objects() if type(one) is io.TextIOWrapper and one.name == str(path)]
    assert all(one.closed for one in opened), "nobody says when the last piece was read"
    pieces = read(DatasetConfig(path=str(path)))
    assert "".join(pieces) == path.read_text()


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
        (DatasetConfig(), [b"one"], "holds bytes records"),
        (DatasetConfig(), iter(RECORDS), "can be read only once"),
    ],
)
def test_what_is_wrong_is_said(config: DatasetConfig, dataset: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(config, dataset=dataset)


def test_data_that_is_damaged_further_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 5)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"^document 5 of the dataset '.*' \(split 'train'\) cannot be read: "):
        read(DatasetConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match="document 3 of the dataset has no column 'text'; it has 'body'"):
        read(dataset=[*RECORDS, {"body": "four"}])
    with pytest.raises(DataError, match="document 3 of the dataset has no column 'text'; it is 'four'"):
        read(dataset=[*RECORDS, "four"])

    class Broken:
        def __iter__(self) -> Iterator[dict]:
            yield from RECORDS
            raise OSError("the disk has gone")

    with pytest.raises(DataError, match="document 3 of the dataset cannot be read: the disk has gone"):
        read(dataset=Broken())


SOURCES = [
    "list",
    "dataset",
    "iterable",
    "disk",
    "one parquet file",
    "parquet",
    "unstreamed",
    "tokens",
    "jsonl",
    "text",
]


def source(kind: str, folder: Path) -> tuple[DatasetConfig, object]:
    """23 documents, of which some are empty, in several files where there can be several."""
    texts = [f"document {n} " * (n % 4) for n in range(23)]
    hf = datasets.Dataset.from_dict({"text": texts, "n": list(range(23))})
    if kind in ("list", "dataset", "iterable"):
        records = {"list": hf.to_list(), "dataset": hf, "iterable": hf.to_iterable_dataset(num_shards=3)}
        return DatasetConfig(), records[kind]
    if kind == "disk":
        hf.save_to_disk(folder / kind, num_shards=2)
    elif kind == "text":
        (folder / kind).with_suffix(".txt").write_text("".join(f"line {n}\n" for n in range(2500)))
        return DatasetConfig(path=str(folder / "text.txt")), None
    else:
        (folder / kind).mkdir()
        if kind == "tokens":
            hf = datasets.Dataset.from_dict({"tokens": [[n] * (n % 5) for n in range(23)]})
        for begin, end in ((0, 7), (7, 8), (8, 20), (20, 23)):
            part = hf.select(range(begin, end))
            if kind == "jsonl":
                part.to_json(folder / kind / f"{begin:02}.jsonl")
            else:
                part.to_parquet(folder / kind / f"{begin:02}.parquet", batch_size=3)
    path = folder / "one parquet file/08.parquet" if kind == "one parquet file" else folder / kind
    return DatasetConfig(path=str(path), streaming=kind != "unstreamed"), None


@pytest.mark.parametrize("kind", SOURCES)
def test_a_saved_position_goes_on_with_the_very_next_document(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config, dataset = source(kind, tmp_path)
    for keep in (None, lambda index: index % 3 != 2, lambda index: index % 3 == 2):
        documents, anew = (Documents.open(config, dataset=dataset, keep=keep) for _ in range(2))
        whole = plain(documents.read())
        assert len(whole) >= 4
        assert [index for index, _ in whole] == [n for n in range(whole[-1][0] + 1) if keep is None or keep(n)]
        for position in range(0, len(whole) + 1, 1 if keep is None else 3):
            first, second, third = documents.read(), anew.read(), anew.read()
            begun = plain(next(first) for _ in range(position))
            state = json.loads(json.dumps(first.state_dict()))
            second.load_state_dict(state)
            third.load_state_dict(second.state_dict())  # nothing was read in between
            assert begun + plain(first) == begun + plain(second) == begun + plain(third) == whole


def plain(read: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(index, document if isinstance(document, str) else list(document)) for index, document in read]


def test_a_position_in_a_stream_is_one_in_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two runs, ``dataset.streaming`` may change."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config, _ = source("parquet", tmp_path)
    streamed, loaded = (Documents.open(attrs.evolve(config, streaming=flag)) for flag in (True, False))
    for one, other in ((streamed, loaded), (loaded, streamed)):
        first, second = one.read(), other.read()
        begun = [next(first) for _ in range(9)]
        second.load_state_dict(first.state_dict())
        assert begun + list(second) == list(one.read())


@pytest.mark.parametrize("every", [1, 5])
def test_a_saved_position_in_the_standard_library(every: int) -> None:
    documents = Documents.open(DatasetConfig(split="heldout"), keep=lambda index: index % every == every - 1)
    whole = list(documents.read())
    for position in (0, 1, 5, len(whole)):
        first = documents.read()
        begun = [next(first) for _ in range(position)]
        second = documents.read()
        second.load_state_dict(first.state_dict())
        assert begun + list(second) == whole


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
