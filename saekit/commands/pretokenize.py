"""``saekit pretokenize``: text to shuffled contexts on disk or on the Hub, by the packer that training uses."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from saekit._version import __version__
from saekit.abilities import HasTokenizer
from saekit.ambient import ambient
from saekit.backends.around import built_backend
from saekit.backends.special import special_tokens
from saekit.commands.targets import WITH_A_TOKEN, check_target, check_tokenizer
from saekit.config import EvalsConfig, PretokenizeConfig
from saekit.data.chats import chat_tokenizer
from saekit.data.contexts import Contexts
from saekit.data.corpus import Corpus
from saekit.data.documents import Conversation
from saekit.data.faults import check_all
from saekit.data.packed import DOCUMENT_IDS, POLICY_DEFAULTS, PRETOKENIZED, Reader
from saekit.data.text import Documents
from saekit.data.vocabulary import Vocabulary
from saekit.errors import DataError, ModelError, StorageError
from saekit.files.storage import new_folder
from saekit.garbage import uncollected
from saekit.hub import within_reach
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager
from saekit.progress import ProgressDisplay
from saekit.reasons import reason
from saekit.runs.opening import check_context_size

__all__ = ["Pretokenized", "write_contexts"]

COLUMN = "input_ids"
_DOCUMENTS_AT_ONCE = 64  # to a process that tokenizes
_CONTEXTS_AT_ONCE = 1000  # to the disk


@attrs.frozen
class _Made:
    contexts: int
    documents: int
    """How many there were; 0: that is not known."""
    left_out: int
    """Documents that were too short for a context of their own, where each has one."""
    cut: int
    """Documents that were longer."""


@attrs.frozen
class Pretokenized:
    """What was written, and where."""

    contexts: int
    context_size: int
    folder: str | None
    hub_repo_id: str | None


@ambient()
def write_contexts(
    config: PretokenizeConfig, plugins: PluginManager, model: object | None, dataset: object | None
) -> Pretokenized:
    """The work of :func:`saekit.pretokenize`."""
    with uncollected():
        from datasets import Dataset
    check_target(config)
    corpus = Corpus.of(config.dataset, EvalsConfig(), dataset)
    tokenizer, documents = _opened(config, plugins, model, corpus)
    with _quiet_datasets(), _storage_errors(config), _work_folder(config.folder) as work:
        file = work / "contexts.arrow"
        made = _write(config, corpus, documents, tokenizer, file)
        packed = Dataset.from_file(str(file))
        if config.shuffle:
            packed = packed.shuffle(seed=config.seed, keep_in_memory=True)
        text = json.dumps(_metadata(config, corpus, documents, tokenizer, made), indent=2) + "\n"
        if config.folder is not None:
            with new_folder(Path(config.folder), replace=False) as folder:
                packed.save_to_disk(folder)
                (folder / PRETOKENIZED).write_text(text, encoding="utf-8")
        if config.hub_repo_id is not None:
            _push(config, packed, text)
    return Pretokenized(made.contexts, corpus.context_size, config.folder, config.hub_repo_id)


@contextmanager
def _work_folder(target: str | None) -> Iterator[Path]:
    """A temporary folder beside ``target``; of the folders made for it, those that stay empty go with it."""
    beside = Path(target).absolute().parent if target is not None else None
    made: list[Path] = []
    while beside is not None and not (folder := made[-1].parent if made else beside).exists():
        made.append(folder)
    try:
        if beside is not None:
            beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saekit-", dir=beside) as work:
            yield Path(work)
    finally:
        with suppress(OSError):  # it is not empty
            for folder in made:
                folder.rmdir()


def _opened(
    config: PretokenizeConfig, plugins: PluginManager, model: object | None, corpus: Corpus
) -> tuple[Any, Documents]:
    """A Hugging Face tokenizer, the one that is named or the model's, and the text.

    The model must take contexts of that size, and the tokenizer have the tokens that are put in; all that does not fit
    is told at once.
    """
    checks: list[Callable[[], object]] = []
    if config.tokenizer is not None:
        check_tokenizer(config.tokenizer)
        tokenizer = _named_tokenizer(config.tokenizer, plugins)
    else:
        backend = built_backend(config.model, plugins, model)
        tokenizer = backend.tokenizer if isinstance(backend, HasTokenizer) else None
        if tokenizer is None:
            raise ModelError(
                f"the model {backend.name!r} has no Hugging Face tokenizer; name one (tokenizer = a folder, or a name "
                "on the Hub)"
            )
        checks.append(lambda: check_context_size(backend, corpus.context_size))
    checks.append(lambda: corpus.policy(special_tokens(tokenizer)))
    checks.append(lambda: corpus.tokenize_by(lambda text: [], tokenizer, _named(config)))
    opened: list[Documents] = []
    check_all(*checks, lambda: opened.append(corpus.documents()))
    return tokenizer, opened[0]


def _named_tokenizer(name: str, plugins: PluginManager) -> Any:
    """Of a folder, of a model that comes with a backend, or of the Hub."""
    with uncollected():
        from transformers import AutoTokenizer
    backends = [item.entry for item in plugins.registry(MODEL_BACKENDS).items]
    folder = next((entry.ships[name] for entry in backends if name in entry.ships), name)
    with within_reach(unless=str(folder)):
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the library raises whatever the files of a tokenizer make it stumble on
            raise ModelError(f"the tokenizer {name!r} cannot be loaded: {reason(error)}") from error


def _write(config: PretokenizeConfig, corpus: Corpus, documents: Documents, tokenizer: Any, file: Path) -> _Made:
    """Write every context to an Arrow file, with the documents it is from where they are known."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    texts = documents
    if config.num_proc > 1:
        tokenized = _Tokenized(documents, tokenizer, config.num_proc, corpus.chats)
        texts = Documents(tokenized, first=documents.first)
    reader = Reader(
        _named(config),
        len(tokenizer),
        lambda: Vocabulary.of_tokenizer(tokenizer),
    )
    stream = corpus.stream(
        texts,
        corpus.tokenize_by(
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            tokenizer,
            _named(config),
        ),
        special_tokens(tokenizer),
        reader,
        repeat=False,
    )
    owners = _owners(corpus)
    columns = {COLUMN: List(Value("int32"))} | ({} if owners is None else {DOCUMENT_IDS: List(Value("int64"))})
    done, limit, last = 0, config.max_contexts, -1
    with (
        ArrowWriter(path=str(file), features=Features(columns)) as writer,
        ProgressDisplay(limit, doing="packing", unit="contexts", verbose=config.verbose) as progress,
    ):
        while limit is None or done < limit:
            asked = _CONTEXTS_AT_ONCE if limit is None else min(_CONTEXTS_AT_ONCE, limit - done)
            contexts = stream.take(asked)
            if len(contexts):
                ids = [] if owners is None else owners(contexts)
                last = max([last, *(max(row, default=-1) for row in ids)])
                written = {COLUMN: contexts.tokens.astype("int32")} | ({} if owners is None else {DOCUMENT_IDS: ids})
                writer.write_batch(written)
            done += len(contexts)
            progress.update(done)
            if len(contexts) < asked:
                break
        if not done:
            raise DataError(f"the data does not fill one context of {corpus.context_size} tokens")
        writer.finalize()
    if limit is not None and done < limit and config.dataset.on_exhausted == "error":
        raise DataError(
            f"the data ended after {done:,} contexts, and {limit:,} were asked for (max_contexts). Ask for fewer, or "
            'set dataset.on_exhausted to "stop"'
        )
    return _Made(done, last + 1, stream.left_out, stream.cut)


def _named(config: PretokenizeConfig) -> str:
    return f"the tokenizer {config.tokenizer or config.model.name!r}"


def _owners(corpus: Corpus) -> Callable[[Contexts], list[list[int]]] | None:
    """For contexts in order the documents that each is from; None where that is not known."""
    if corpus.packed is None:
        return lambda contexts: [np.unique(row).tolist() for row in contexts.documents]
    if not corpus.packed.documents:
        return None  # they are parts of documents that nobody has noted
    noted: Iterator[Any] = iter(
        attrs.evolve(corpus, config=attrs.evolve(corpus.config, column=DOCUMENT_IDS)).documents()
    )
    return lambda contexts: [[int(number) for number in next(noted)] for _ in range(len(contexts))]


class _Tokenized:
    """Documents whose texts become token ids, by ``num_proc`` processes, in their order; None for one left out."""

    def __init__(self, documents: Documents, tokenizer: Any, num_proc: int, template: bool | str) -> None:
        self._documents, self._tokenizer, self._num_proc = documents, tokenizer, num_proc
        self._template = template

    def __iter__(self) -> Iterator[Any]:
        # Forked, a process has the tokenizer without importing the caller's main module again.
        method = "fork" if sys.platform == "linux" else "spawn"
        pool = ProcessPoolExecutor(
            self._num_proc,
            mp_context=multiprocessing.get_context(method),
            initializer=_start_tokenizing,
            initargs=(self._tokenizer, self._template),
        )
        try:
            with warnings.catch_warnings():  # of threads, which the processes have no part in
                warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
                pool.submit(int)  # the first one starts the processes
            pending: deque[Future[list[Any]]] = deque()
            for batch in _batched(self._numbered(), _DOCUMENTS_AT_ONCE):
                pending.append(pool.submit(_tokenize, batch))
                if len(pending) > 2 * self._num_proc:  # the text may be endless
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenizes was ended from outside, perhaps for want of memory; lower num_proc"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _numbered(self) -> Iterator[Any]:
        """Every document in its place."""
        place = 0
        for number, document in self._documents.read():
            yield from itertools.repeat(None, number - place)
            yield document
            place = number + 1


def _batched(items: Iterable[Any], n: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n)):
        yield batch


_PR_SET_PDEATHSIG = 1
_worker_tokenizer: Any = None
_worker_chats: Callable[[Conversation], Sequence[int]] | None = None


def _start_tokenizing(tokenizer: Any, template: bool | str) -> None:
    global _worker_tokenizer, _worker_chats
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that started this ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes enough
    if sys.platform == "linux":  # end with the process that started this, however that ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _worker_tokenizer = tokenizer
    _worker_chats = chat_tokenizer(tokenizer, template, "pretokenize") if template else None


def _tokenize(documents: Sequence[Any]) -> list[Any]:
    if _worker_chats is not None:
        return [document if document is None else _worker_chats(document) for document in documents]
    texts = [document for document in documents if isinstance(document, str)]
    ids = iter(_worker_tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    return [next(ids) if isinstance(document, str) else document for document in documents]


def _metadata(
    config: PretokenizeConfig, corpus: Corpus, documents: Documents, tokenizer: Any, made: _Made
) -> dict[str, Any]:
    import datasets
    import transformers

    dataset = corpus.config
    return {
        "saekit_version": __version__,
        "datasets_version": datasets.__version__,
        "transformers_version": transformers.__version__,
        "tokenizer": config.tokenizer or config.model.name,
        "vocab_size": tokenizer.vocab_size,
        **Vocabulary.of_tokenizer(tokenizer).metadata(),
        "token_ids": corpus.policy(special_tokens(tokenizer)).token_ids(),
        "dataset": dataset.path if corpus.dataset is None else None,
        "dataset_name": dataset.name,
        "split": dataset.split,
        "revision": dataset.revision,
        "data_files": list(dataset.data_files),
        "column": documents.column,
        **{name: getattr(dataset, name) for name in POLICY_DEFAULTS},
        "shuffle": config.shuffle,
        "seed": config.seed if config.shuffle else None,
        "contexts": made.contexts,
        "documents": made.documents,
        **(
            {"documents_left_out": made.left_out, "documents_cut": made.cut} if dataset.disable_concat_sequences else {}
        ),
    }


def _push(config: PretokenizeConfig, packed: Any, metadata: str) -> None:
    from huggingface_hub import HfApi

    repo, revision = config.hub_repo_id, config.hub_revision
    kept = f"; the contexts are in {config.folder!r}" if config.folder else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # between the library and its own dependencies
            api = HfApi()
            api.create_repo(str(repo), repo_type="dataset", private=config.hub_private, exist_ok=True)
            if revision is not None:
                api.create_branch(str(repo), repo_type="dataset", branch=revision, exist_ok=True)
            # First what says how the contexts are made: without it they would be taken for any token ids.
            api.upload_file(
                path_or_fileobj=metadata.encode(), path_in_repo=PRETOKENIZED, repo_id=str(repo), repo_type="dataset",
                revision=revision,
            )  # fmt: skip
            packed.push_to_hub(repo, private=config.hub_private, revision=revision)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted while pushing to {repo!r}{kept}") from error
    except Exception as error:  # of the library, of the one below it, or of the network
        raise StorageError(
            f"cannot push to the dataset repository {repo!r}: {reason(error)}{kept}. {WITH_A_TOKEN}"
        ) from error


@contextmanager
def _storage_errors(config: PretokenizeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = config.folder or tempfile.gettempdir()
        raise StorageError(f"cannot write the contexts to {where!r}: {error.strerror or error}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the library's own progress bars: saekit shows one of its own."""
    import datasets

    was_on = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
