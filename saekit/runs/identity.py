"""What decides a run's activations, to tell a cache that was made for it from one that was not."""

from __future__ import annotations

import itertools
import json
import platform
from hashlib import blake2b
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from saekit.abilities import HasTokenizer
from saekit.config import LATER, TrainConfig
from saekit.config.files import plain_config
from saekit.data.corpus import Corpus
from saekit.data.documents import Conversation, Document, Masked
from saekit.data.in_memory import is_one_text
from saekit.data.text import STDLIB
from saekit.errors import DataError
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.tokens import token_choice

__all__ = ["run_identity"]

_DOCUMENTS = 8  # at the start of the text, which are compared


def run_identity(config: TrainConfig, corpus: Corpus, plugins: PluginManager, backend: ModelBackend) -> dict[str, Any]:
    """Option paths to plain values (JSON's); two runs that agree on all of it have the same activations.

    Folders and files count by their names and contents, not by where they are.  Where the text cannot be read, its
    contents are None.
    """
    chosen = plugins.bound(MODEL_BACKENDS, config.model.backend)
    dataset, policy = corpus.config, corpus.policy(backend.special_tokens)
    column, contents = _text(corpus)
    table = {
        "model.name": _place(backend.name),
        "model.weights": backend.fingerprint(),
        "model.backend": {"name": chosen.key, **_options(chosen.options, plugins)},
        "model.dtype": config.model.dtype,
        "model.autocast": config.model.autocast,
        "dataset.path": "in memory" if corpus.dataset is not None else _place(dataset.path),
        "dataset.contents": contents,
        "dataset.name": dataset.name,
        "dataset.split": dataset.split,
        "dataset.revision": dataset.revision,
        "dataset.data_files": list(dataset.data_files),
        "dataset.column": column,
        "dataset.context_size": dataset.context_size,
        "dataset.begin_batch_token": policy.begin_batch,
        "dataset.begin_sequence_token": policy.begin_sequence,
        "dataset.sequence_separator_token": policy.separator,
        "evals.held_out_every": _held_out(corpus),
        **_chosen(config, corpus, backend),
    }
    plain: dict[str, Any] = json.loads(json.dumps(table, default=repr))
    return plain


def _options(options: Any, plugins: PluginManager) -> dict[str, Any]:
    """A backend's, of which those that came :data:`LATER` are there only where they are chosen."""
    usual = {
        field.name
        for field in attrs.fields(type(options))
        if field.metadata.get(LATER) and getattr(options, field.name) == field.default
    }
    return {name: value for name, value in plain_config(options, plugins).items() if name not in usual}


def _chosen(config: TrainConfig, corpus: Corpus, backend: ModelBackend) -> dict[str, Any]:
    """What is there only where something is chosen: so earlier caches and checkpoints fit where nothing is."""
    choice = token_choice(config.tokens, backend)
    said = {
        "dataset.disable_concat_sequences": corpus.config.disable_concat_sequences,
        "dataset.chat_template": corpus.chats and _template(corpus.chats, backend),
        "tokens.exclude_special_tokens": sorted(choice.exclude),
        "tokens.seqpos_slice": list(choice.seqpos_slice) if choice.chooses_places else None,
        "tokens.mask_column": corpus.mask,
    }
    return {name: value for name, value in said.items() if value}


def _template(chosen: bool | str, backend: ModelBackend) -> str:
    """The template by a hash of what is in it, as far as that is known here."""
    own = getattr(backend.tokenizer, "chat_template", None) if isinstance(backend, HasTokenizer) else None
    if chosen is True or (isinstance(own, dict) and chosen in own):
        name, text = ("its tokenizer's" if chosen is True else str(chosen)), json.dumps(own, sort_keys=True)
    else:
        name, text = "its own", str(chosen)
    return f"{name}, {blake2b(text.encode(), digest_size=8).hexdigest()}"


def _held_out(corpus: Corpus) -> int | str:
    every = corpus.evals.held_out_every if corpus.evals.split is None else 0
    if every and is_one_text(corpus.dataset):
        return f"{every}, the end of the text"
    return f"{every}, whole documents of contexts" if every and corpus.holds_out_documents else every


def _place(name: str) -> str:
    """A name on the Hub as it is, a local path by its last part: it may be elsewhere on another machine."""
    return Path(name).name if Path(name).exists() else name


def _text(corpus: Corpus) -> tuple[str | None, str | None]:
    """The column that is read, and a hash of the beginning of the text and of its size where that is known."""
    try:
        documents = corpus.documents()
        first = [document for _, document in itertools.islice(documents.read(), _DOCUMENTS)]
    except DataError:
        return corpus.config.column, None
    digest = blake2b(digest_size=8)
    for document in first:
        raw = _bytes(document)
        digest.update(len(raw).to_bytes(8, "little") + raw)
        if isinstance(document, Masked):
            digest.update(document.counts.tobytes())
    path = Path(corpus.config.path)
    if corpus.dataset is None and corpus.config.path == STDLIB:
        size = f"Python {platform.python_version()}"
    elif corpus.dataset is None and path.is_file():
        size = f"{path.stat().st_size} bytes"
    else:
        size = f"{documents.size} documents" if documents.size is not None else "a stream"
    return documents.column, f"{size}, beginning {digest.hexdigest()}"


def _bytes(document: Document) -> bytes:
    if isinstance(document, str):
        return document.encode()
    if isinstance(document, Conversation):
        return json.dumps(list(document.messages), default=repr).encode()
    ids = document.tokens if isinstance(document, Masked) else document
    return np.asarray(ids, dtype=np.int64).tobytes()
