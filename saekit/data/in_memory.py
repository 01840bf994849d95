"""Text that is passed as ``dataset=``: what it may be, as records that documents are read from.  Imports no library."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from saekit.errors import DataError

__all__ = ["check_in_memory", "in_memory_records", "is_name", "is_one_text", "may_be_on_hub", "part_of_text"]

_LONGEST_NAME = 255
_FILE = re.compile(r".*\.(txt|text|md|py|jsonl?|parquet|csv|arrow|zst|gz)", re.IGNORECASE)
_TAKEN = (
    "It may be a text, a list of texts, a list of records such as {'text': ...}, a pandas DataFrame, or a Hugging Face "
    "Dataset, IterableDataset or DatasetDict"
)


def check_in_memory(dataset: object) -> None:
    """:class:`DataError` for what cannot be a dataset, as far as can be told without reading it."""
    if isinstance(dataset, str):
        _check_is_text(dataset)
    elif isinstance(dataset, os.PathLike):
        raise DataError(f"dataset= takes data in memory, and {dataset!r} is a path: name it in dataset.path")
    elif isinstance(dataset, bytes) or not isinstance(dataset, Iterable):
        raise DataError(f"the dataset is {_a(dataset)}, which holds no documents. {_TAKEN}")
    elif isinstance(dataset, Mapping):
        _check_splits(dataset)
    elif len(getattr(dataset, "shape", ())) > 1 and not (_is_frame(dataset) or _is_hugging_face(dataset)):
        raise DataError(
            f"the dataset is {_a(dataset)} of the shape {list(dataset.shape)}; pass its rows as records: "  # type: ignore[attr-defined]
            "[{'tokens': row} for row in array]"
        )
    elif iter(dataset) is iter(dataset):
        raise DataError(
            f"the dataset is a {type(dataset).__name__}, which can be read only once; pass a list, a Dataset or an "
            "IterableDataset"
        )


def in_memory_records(dataset: Any, asked: str | None, default: str) -> Any:
    """``dataset`` as records with named columns; a text alone, and each of several, is a document.

    ``asked`` is the split that is wanted beside the ``default`` one.
    """
    check_in_memory(dataset)
    if isinstance(dataset, Mapping):  # a DatasetDict
        split = asked or default
        if split not in dataset:
            raise DataError(f"the dataset has no split {split!r}; it has {', '.join(map(repr, dataset))}")
        return in_memory_records(dataset[split], None, default)
    if asked is not None:
        raise DataError(
            f"evals.split is {asked!r}, but the dataset passed in memory has no splits. Pass a DatasetDict, or leave "
            "evals.split out to keep one document in evals.held_out_every from training"
        )
    if isinstance(dataset, str):
        return [{"text": dataset}] if dataset else []
    if _is_frame(dataset):
        return _Frame(dataset)
    if _is_hugging_face(dataset):
        return dataset
    first = next(iter(dataset), None)
    if isinstance(first, (list, tuple)):
        raise DataError(
            f"the dataset holds {type(first).__name__}s; pass them as records: [{{'tokens': ids}} for ids in ...], or "
            "{'text': ...} where they are texts"
        )
    if not isinstance(first, str):
        return dataset
    return _Texts(dataset) if isinstance(dataset, Sequence) else _TextsInTurn(dataset)


def is_one_text(dataset: object) -> bool:
    """Whether it is one document, of which a part must be held out where something is."""
    return isinstance(dataset, str)


def part_of_text(text: str, every: int, *, held: bool) -> str:
    """The last of ``every`` parts of ``text``, cut where a line or at least a word ends; or all before it."""
    start = len(text) - len(text) // every
    for mark in ("\n", " "):
        if (end := text.find(mark, start, start + 2000)) >= 0:
            start = end + 1
            break
    return text[start:] if held else text[:start]


def may_be_on_hub(name: str) -> bool:
    """Whether this can be the name of a dataset on the Hub: ``name`` or ``owner/name``."""
    return "://" in name or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def is_name(text: str) -> bool:
    """Whether this is the name of a file or of a dataset on the Hub, and no text that anybody would read."""
    if not text or len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return False
    there = os.path.exists(text)  # noqa: PTH110 - Path.exists raises for names that no file can have
    return there or may_be_on_hub(text) or _FILE.fullmatch(text) is not None


def _check_is_text(text: str) -> None:
    if is_name(text):
        there = os.path.exists(text)  # noqa: PTH110 - as above
        known = "there is a file or folder of that name" if there else "reads like the name of a file or of a dataset"
        raise DataError(
            f"dataset= takes data in memory, and {text!r} {'is no text: ' * there}{known}. Name it in dataset.path; "
            "where it is all the text that there is, pass it in a list"
        )


def _check_splits(splits: Mapping[Any, Any]) -> None:
    """A table of columns is not one of splits."""
    columns = [name for name in ("tokens", "input_ids", "text") if name in splits]
    if columns and all(isinstance(value, (list, tuple)) for value in splits.values()):
        raise DataError(
            f"the dataset is a {type(splits).__name__} with the column {columns[0]!r}, and of such, splits are "
            f"expected: {{'train': ...}}. Pass a list, of texts or of records such as {{'text': ...}}, or "
            "datasets.Dataset.from_dict(...)"
        )


def _a(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[:1] in "aeiouAEIO" else f"a {name}"


def _is_frame(dataset: object) -> bool:
    pandas = sys.modules.get("pandas")  # who passes one has imported it
    return pandas is not None and isinstance(dataset, pandas.DataFrame)


def _is_hugging_face(dataset: object) -> bool:
    return hasattr(dataset, "column_names")


class _Texts(Sequence[dict[str, str]]):
    """A list of texts, each a document."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return _document(self._texts[index], index)


class _TextsInTurn(Iterable[dict[str, str]]):
    """Others that can be read again and again."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (_document(text, index) for index, text in enumerate(self._texts))


def _document(text: object, index: int) -> dict[str, str]:
    """:class:`DataError` for what is no text among texts: to leave it out would go unseen."""
    if not isinstance(text, str):
        raise DataError(f"the dataset begins with texts, and its item {index} is {_a(text)}: {text!r:.60}. {_TAKEN}")
    return {"text": text}


class _Frame(Sequence[Mapping[str, Any]]):
    """The rows of a pandas DataFrame, of which only the column that is read is looked at."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return _Row(self._frame, index)


class _Row(Mapping[str, Any]):
    def __init__(self, frame: Any, index: int) -> None:
        self._frame, self._index = frame, index

    def __getitem__(self, column: str) -> Any:
        value = self._frame[column].iloc[self._index]
        missing = value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)
        return None if missing else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._frame.columns)

    def __len__(self) -> int:
        return len(self._frame.columns)
