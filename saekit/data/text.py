"""Stage one: documents, from wherever they are."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from saekit.config import DatasetConfig
from saekit.data.dealing import Before, Dealer
from saekit.data.documents import CONVERSATIONS, Document, Form, messages_of
from saekit.data.in_memory import in_memory_records, may_be_on_hub
from saekit.data.pool import Pool
from saekit.data.reader import DocumentReader, Owners, is_int
from saekit.data.stdlib import stdlib_documents
from saekit.errors import DataError
from saekit.garbage import uncollected
from saekit.hub import within_reach
from saekit.reasons import reason

__all__ = ["DocumentReader", "Documents", "check_place"]

STDLIB = "saekit/python-stdlib"
_FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".py"), "text"),
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv",
}  # fmt: skip


class Documents:
    """The documents of a dataset in order, each a text or a list of token ids; can be read again and again.

    With a ``form``, they may be conversations, or have a mask.  ``keep(index)`` chooses documents by their position in
    the dataset, and ``owners`` records that are parts of documents by those.  Without a ``column``, a record is a
    document."""

    def __init__(
        self,
        records: Iterable[Any],
        column: str | None = None,
        keep: Callable[[int], bool] | None = None,
        *,
        seekable: bool = False,
        where: str = "the dataset",
        first: Any = None,
        owners: Owners | None = None,
        form: Form | None = None,
    ) -> None:
        self._part: tuple[int, int] = (0, 1)
        self._before: Before = ()
        self._order: Sequence[int] | None = None
        self._records = records
        self._form = form or Form()
        self._keep, self._owners = keep, owners
        self._seekable = seekable
        self._where = where
        self.column = column
        self.first = first
        """The dataset's first document, where it has been looked at."""

    @classmethod
    def open(
        cls,
        config: DatasetConfig,
        *,
        split: str | None = None,
        dataset: Any = None,
        keep: Callable[[int], bool] | None = None,
        owners: Owners | None = None,
        mask: str | None = None,
    ) -> Documents:
        """The documents of ``config``, or of ``dataset``, which is in memory: see :mod:`saekit.data.in_memory`.

        The column ``mask`` says which of their tokens count.
        Raises :class:`DataError` for a path, split or column that is not there, before anything else is done.
        """
        if dataset is not None:
            records, where = in_memory_records(dataset, split, config.split), "the dataset"
        else:
            records = _open(config, split or config.split)
            where = f"the dataset {config.path!r} (split {split or config.split!r})"
        # A stream that was opened here has no shuffle buffer, whose contents its saved position would lose.
        seekable = dataset is None and hasattr(records, "load_state_dict")
        first = _first(_copied(records) if seekable else records, where)
        form = Form(bool(config.chat_template), mask)
        column = _column(first, config.column, where, form)
        if owners is not None and owners[0] not in first:
            raise DataError(
                f"{where} has no column {owners[0]!r}, which is said to have the documents that its contexts are from; "
                "pretokenize anew, or name a split of its own in evals.split"
            )
        if hasattr(records, "select_columns"):  # a HF dataset: decode what is read, and nothing else
            others = [] if owners is None else [owners[0]]
            records = records.select_columns([column, *others, *([] if mask is None else [mask])])
            if dataset is None and not isinstance(first[column], str) and not form.chat:
                records = records.with_format("numpy")
        known = None if form.chat else first[column]  # of a conversation, nothing is told before it is written out
        return cls(records, column, keep, seekable=seekable, where=where, first=known, owners=owners, form=form)

    def __iter__(self) -> Iterator[Document]:
        return (document for _, document in self.read())

    @property
    def size(self) -> int | None:
        """How many records there are, held-out ones included, if the dataset knows."""
        return len(self._records) if isinstance(self._records, Sized) else None

    def part(self, number: int, parts: int) -> Documents:
        """Of those that are chosen every ``parts``-th, from ``number`` on; together, ``parts`` such have each once.

        :class:`DataError` where there are fewer documents than parts.
        """
        if parts == 1:
            return self
        found = sum(1 for _ in itertools.islice(self.read(), parts))
        if found < parts:
            raise DataError(
                f"{self._where} has {found} documents to train on, and {parts} processes share them; give it as more "
                "and smaller documents, or start fewer processes"
            )
        own = copy.copy(self)
        own._part = (number, parts)
        return own

    def pool(self, bound: int) -> Pool | None:
        """What :meth:`shuffled` draws from, of at most ``bound`` characters; None: it can be read at any place."""
        if self._anywhere:
            return None
        columns = [name for name in (self.column, self._form.mask, *(self._owners or ())[:1]) if isinstance(name, str)]
        records = _copied(self._records) if self._seekable else self._records
        return Pool(records, columns if self.column is not None else [], self._where, bound)

    def shuffled(self, seed: int, most: int, pool: Pool | None) -> tuple[Documents, int, bool]:
        """At most so many in an order that ``seed`` draws, of how many these were drawn, and whether they are all.

        They are from all over a dataset that can be read at any place, and from the beginning of any other, which
        ``pool`` holds.
        """
        own, records = copy.copy(self), self._records
        if pool is None:
            size = len(records)  # type: ignore[arg-type]  # it is such a one
            whole = size <= most
        else:
            pool.grow(most)
            own._records, own._seekable, size, whole = pool.records, False, len(pool.records), pool.whole
        own._order = random.Random(seed).sample(range(size), min(size, most))
        return own, size, whole

    @property
    def _anywhere(self) -> bool:
        return isinstance(self._records, Sized) and hasattr(self._records, "__getitem__")

    @property
    def place(self) -> tuple[int, int]:
        """Which of how many parts these are."""
        return self._part

    @property
    def before(self) -> Before:
        """See :meth:`dealt_anew`."""
        return self._before

    def dealt_anew(self, before: Before) -> Documents:
        """The part that this is of what other readers have left, who had come to the places ``before``."""
        own = copy.copy(self)
        own._before = before
        return own

    def read(self, reading: int = 0) -> DocumentReader:
        """The documents from the first, with a position that can be saved; ``reading``: how often they were read."""
        alone = self._part == (0, 1) and not self._before
        return self._read(None if alone else Dealer(*self._part, self._before, reading))

    def all_from(self, state: Mapping[str, Any]) -> DocumentReader:
        """Documents whosever they are, from where a reader of any part was, whose ``state`` this is."""
        reader = self._read(None)
        reader.load_state_dict(state)
        return reader

    def _read(self, dealer: Dealer | None) -> DocumentReader:
        records = _copied(self._records) if self._seekable else self._records  # the position is in the object
        return DocumentReader(
            records, self.column, self._keep, seekable=self._seekable, where=self._where, owners=self._owners,
            form=self._form, dealer=dealer, order=self._order,
        )  # fmt: skip


def _copied(records: Any) -> Any:
    """An ``IterableDataset`` with a position of its own.

    Each holds the table of all of the Hub's file systems, which grows when one is copied in another thread: that stays.
    """
    from huggingface_hub import HfFileSystem

    table = getattr(HfFileSystem, "_cache", None)
    return copy.deepcopy(records, {id(table): table})


def _first(records: Any, where: str) -> Any:
    try:
        first = next(iter(records), None)
    except DataError:
        raise
    except Exception as error:  # a streamed dataset is first read here, and its library raises what it likes
        raise DataError(f"{where} cannot be read: {reason(error)}") from error
    if first is None:
        raise DataError(f"{where} has no documents")
    return first


def _column(record: Any, wanted: str | None, where: str, form: Form) -> str:
    if not isinstance(record, Mapping):
        raise DataError(f"{where} holds {type(record).__name__} records, expected mappings such as {{'text': ...}}")
    if wanted is not None and wanted not in record:
        raise DataError(f"{where} has no column {wanted!r}; it has {', '.join(map(repr, record))}")
    column = wanted or next((name for name in form.columns if name in record), None)
    chats = "" if form.chat else _of_chats(record, wanted)
    if column is None:
        raise DataError(
            f"{where} has none of the columns {', '.join(form.columns)}; it has {', '.join(map(repr, record))}. "
            f"Name the one to read: dataset.column{chats}"
        )
    form.check_first(record, column, where)
    value = record[column]
    if value is None or form.chat:
        return column
    if not isinstance(value, str) and not (hasattr(value, "__len__") and all(is_int(item) for item in value)):
        raise DataError(
            f"column {column!r} of {where} holds {type(value).__name__}, expected texts or lists of token ids{chats}"
        )
    return column


def _of_chats(record: Mapping[str, Any], wanted: str | None) -> str:
    """A hint where conversations are there, or are asked for by their column."""
    names = CONVERSATIONS if wanted is None else (wanted,)
    there = [name for name in names if name in record and messages_of(record[name])]
    return f". Conversations, as in {there[0]!r}, become text with dataset.chat_template=true" if there else ""


def _split_of(splits: Mapping[str, Any], split: str, where: str) -> Any:
    if split not in splits:
        raise DataError(f"{where} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return splits[split]


class _Stdlib:
    def __init__(self, split: str) -> None:
        if split not in ("train", "heldout", "all"):
            raise DataError(f"{STDLIB} has no split {split!r}; it has 'train', 'heldout' and 'all'")
        self._split = split

    def __iter__(self) -> Iterator[dict[str, str]]:
        return stdlib_documents(self._split)


def _open(config: DatasetConfig, split: str) -> Any:
    check_place(config, split)
    path = Path(config.path)
    if config.path == STDLIB:
        return _Stdlib(split)
    if is_saved_to_disk(path):
        return _saved_to_disk(path, split, split != config.split)
    if path.is_file():
        return _local_file(path)
    files = {"data_files": list(config.data_files)} if config.data_files else {}
    options = {"split": split, "revision": config.revision, "streaming": config.streaming, **files}
    with within_reach(unless=path):
        return _load(config.path, config.name, **options)


def check_place(config: DatasetConfig, split: str) -> None:
    """:class:`DataError` for what is wrong with ``config.path`` as far as its name and the file system tell."""
    path = Path(config.path)
    if config.data_files and (config.path == STDLIB or is_saved_to_disk(path) or path.is_file()):
        raise DataError(
            f"dataset.data_files chooses files of a folder or a Hub dataset, and {config.path!r} is neither; leave "
            "it out"
        )
    if config.path == STDLIB:
        _Stdlib(split)
    elif path.is_file() and not is_saved_to_disk(path):
        if path.suffix.lower() not in _FORMATS:
            raise DataError(f"{path} is not a dataset: the name must end in {', '.join(_FORMATS)}")
        if split != "train":
            raise DataError(f"the file {str(path)!r} has no split {split!r}; a single file has only 'train'")
    elif not path.exists() and (path.suffix in _FORMATS or not may_be_on_hub(config.path)):
        raise DataError(f"there is no file or folder {config.path!r} (dataset.path)")


def is_saved_to_disk(path: Path) -> bool:
    """Whether ``save_to_disk`` made this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_to_disk(path: Path, split: str, another: bool) -> Any:
    with uncollected():
        from datasets import load_from_disk
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # whatever a damaged file of the folder makes the library stumble on
        raise DataError(
            f"the dataset {str(path)!r}, which save_to_disk wrote, is damaged or not whole: {reason(error)}"
        ) from error
    if isinstance(loaded, Mapping):
        return _split_of(loaded, split, f"the dataset {str(path)!r}")
    if another:  # all of it is what dataset.split trains on
        raise DataError(f"the dataset {str(path)!r} was saved without splits, so it has no split {split!r}")
    return loaded


def _local_file(path: Path) -> Any:
    kind = _FORMATS[path.suffix.lower()]
    if kind == "text":
        return _TextFile(path)
    return _load(kind, None, data_files=str(path), split="train", streaming=True)


class _TextFile:
    """One text file as pieces, cut at line ends, so that some can be held out: at least 40 of a file of 40 kB."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._piece = min(32_768, max(1024, path.stat().st_size // 40))

    def __iter__(self) -> Iterator[dict[str, str]]:
        position: int | None = 0
        while position is not None:
            try:
                text, position = self._piece_from(position)
            except UnicodeDecodeError as error:
                raise DataError(f"the file {str(self._path)!r} is not UTF-8 text: {error}") from error
            if text:
                yield {"text": text}

    def _piece_from(self, position: int) -> tuple[str, int | None]:
        """The lines from ``position`` on, and where the next piece begins: no file stays open in between, since nobody
        says when the last piece was read."""
        lines: list[str] = []
        length = 0
        with self._path.open(encoding="utf-8") as file:
            file.seek(position)
            while length <= self._piece:
                line = file.readline()
                if not line:
                    return "".join(lines), None
                lines.append(line)
                length += len(line)
            return "".join(lines), file.tell()


def _load(path: str, name: str | None, **options: Any) -> Any:
    with uncollected():
        from datasets import load_dataset
    try:
        return load_dataset(path, name, **options)
    except Exception as error:  # the library raises a dozen unrelated types for what is one thing here
        elsewhere = "" if "data_files" in options else " (and there is no local file or folder of that name)"
        raise DataError(
            f"the dataset {options.get('data_files', path)!r} (split {options['split']!r}) cannot be opened: "
            f"{reason(error)}{elsewhere}"
        ) from error
