"""The text of a run: what is read, how it becomes contexts, and what of it is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.abilities import HasTokenizer, TokenizesElsewhere
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data.chats import DocumentIds, Tokenize, chat_tokenizer
from saekit.data.contexts import Contexts, ContextStream, Piece
from saekit.data.in_memory import is_one_text, part_of_text
from saekit.data.packed import DOCUMENT_IDS, POLICY_DEFAULTS, PRETOKENIZED, Packed, Reader, held_documents
from saekit.data.packer import TokenPolicy
from saekit.data.text import STDLIB, Documents
from saekit.data.vocabulary import Vocabulary
from saekit.errors import ConfigError, DataError
from saekit.protocols import ModelBackend

__all__ = ["POLICY_DEFAULTS", "PRETOKENIZED", "Corpus", "drawn", "reader_of"]


@attrs.frozen
class Corpus:
    """The dataset of a run, with every option about tokens settled."""

    config: DatasetConfig
    evals: EvalsConfig
    dataset: Any = None
    """A dataset in memory, in place of ``config.path``."""
    packed: Packed | None = None
    """How pretokenized contexts were made; else None."""
    mask: str | None = None
    """The column that says which tokens count (``tokens.mask_column``)."""
    part: tuple[int, int] = (0, 1)
    """Of the documents that are trained on, every so many-th, from which on: those of this process, and of how many."""

    @classmethod
    def of(cls, config: DatasetConfig, evals: EvalsConfig, dataset: Any = None, mask: str | None = None) -> Corpus:
        """The corpus of a configuration.  Contexts that are pretokenized say themselves how they were made.

        :class:`ConfigError` names each option that contradicts them.
        """
        packed = None if dataset is not None else Packed.at(config)
        stated = {name: getattr(config, name) for name in POLICY_DEFAULTS}
        if packed is not None and (problems := _contradictions(config.path, stated, packed.policy)):
            raise ConfigError(problems)
        settled = POLICY_DEFAULTS if packed is None else packed.policy
        chosen = {name: settled[name] if stated[name] is None else stated[name] for name in POLICY_DEFAULTS}
        return cls(attrs.evolve(config, **chosen), evals, dataset, packed, mask)

    @property
    def context_size(self) -> int:
        """Tokens in a context."""
        assert self.config.context_size is not None
        return self.config.context_size

    def policy(self, special_tokens: Mapping[str, int | None]) -> TokenPolicy:
        """The tokens that are put in, as ids of a tokenizer."""
        return TokenPolicy.of(self.config, special_tokens)

    @property
    def chats(self) -> bool | str:
        """The chat template by which documents become tokens; of contexts that are pretokenized, they have."""
        return False if self.packed is not None else self.config.chat_template or False

    def documents(self, **chosen: Any) -> Documents:
        """The documents of the dataset, all or those that are ``chosen``, as :meth:`Documents.open` takes it."""
        config = attrs.evolve(self.config, chat_template=self.chats)
        return Documents.open(config, **{"dataset": self.dataset, "mask": self.mask, **chosen})

    def tokenize(self, backend: ModelBackend) -> DocumentIds:
        """A document that is no list of token ids as such, by the tokenizer of a model."""
        tokenizer = backend.tokenizer if isinstance(backend, HasTokenizer) else None
        elsewhere = backend.tokenizing() if isinstance(backend, TokenizesElsewhere) else None
        ids = self.tokenize_by(elsewhere or backend.tokenize, tokenizer, f"the model {backend.name!r}")
        return attrs.evolve(ids, elsewhere=elsewhere is not None)

    def tokenize_by(self, texts: Callable[[str], Sequence[int]], tokenizer: Any, of: str) -> DocumentIds:
        """The same, by what makes ids of ``texts``, and the ``tokenizer`` of a Hugging Face model for conversations.

        :class:`ConfigError` where there are conversations, and no template.
        """
        return DocumentIds(texts, chat_tokenizer(tokenizer, self.chats, of) if self.chats else None)

    def stream(
        self,
        documents: Documents,
        tokenize: Tokenize,
        special_tokens: Mapping[str, int | None],
        reader: Reader,
        *,
        repeat: bool,
        piece: Piece | None = None,
    ) -> ContextStream:
        """The contexts of ``documents``, which this corpus has opened, by a tokenizer; of each only a ``piece``.

        :class:`DataError` says what does not fit ``reader``.
        """
        policy = self.policy(special_tokens)
        if self.packed is not None:  # the contexts are whole, with their tokens put in
            self.packed.check(documents.first, policy, reader)
            policy = attrs.evolve(policy, begin_sequence=None, separator=None, one_document=False)
        _check_ids(documents, policy, reader)
        masked, d_vocab = self.mask is not None, reader.d_vocab
        return ContextStream(documents, tokenize, policy, d_vocab=d_vocab, repeat=repeat, masked=masked, piece=piece)

    def contexts(self, backend: ModelBackend) -> ContextStream:
        """The training contexts, without the documents that are held out."""
        return self._stream(backend, self.training_documents(), repeat=self.config.on_exhausted == "repeat")

    def packed_from(self, backend: ModelBackend, documents: Documents, piece: Piece | None) -> ContextStream:
        """Those of ``documents``, which this corpus has opened: of each only a ``piece``, where one is asked for."""
        return self._stream(backend, documents, repeat=False, piece=piece)

    def training_documents(self) -> Documents:
        """What is trained on: all documents, or all that are not held out; of several processes, this one's part."""
        return self._trained_on().part(*self.part)

    def _trained_on(self) -> Documents:
        every = self.evals.held_out_every if self.evals.split is None else 0
        if not every:
            return self.documents()
        if is_one_text(self.dataset):
            return self._part(held=False)
        if self.holds_out_documents:
            assert self.packed is not None
            held = held_documents(self.packed, every)
            owners = (DOCUMENT_IDS, lambda ids: not any(map(held, ids)))
            return self.documents(owners=owners)
        return self.documents(keep=lambda index: index % every != every - 1)

    @property
    def holds_out_documents(self) -> bool:
        """Whether the documents of pretokenized contexts are known, and enough, so that whole ones can be held out."""
        return self.packed is not None and self.packed.documents >= max(self.evals.held_out_every, 1)

    def held_out(self, backend: ModelBackend, seed: int) -> Tensor:
        """``[n, context_size]`` token ids that training never sees, from a stretch of text eight times as long."""
        return self.held_out_masked(backend, seed)[0]

    def held_out_masked(self, backend: ModelBackend, seed: int) -> tuple[Tensor, Tensor | None]:
        """The same with their mask, ``[n, context_size]`` bool, where the data has one."""
        contexts = self._stream(backend, self._held_out_documents(), repeat=False).take(8 * self.evals.n_contexts)
        if not len(contexts):
            raise DataError(
                f"the held-out text does not fill one context of {self.context_size} tokens. Lower "
                "evals.held_out_every, name a split of its own in evals.split, use more or smaller documents, or "
                "measure nothing: evals.run=[]"
            )
        found = drawn(contexts, self.evals.n_contexts, seed)
        return torch.from_numpy(found.tokens), None if found.counts is None else torch.from_numpy(found.counts)

    def _held_out_documents(self) -> Documents:
        every, split = self.evals.held_out_every, self.evals.split
        if split is not None:
            if self.config.path == STDLIB and self.dataset is None and "all" in (split, self.config.split):
                raise ConfigError(
                    [("evals.split", f"{STDLIB} 'all' holds its other splits; use 'train' and 'heldout'")]
                )
            return self.documents(split=split)
        if is_one_text(self.dataset):
            return self._part(held=True)
        if self.holds_out_documents:
            assert self.packed is not None
            held = held_documents(self.packed, every)
            owners = (DOCUMENT_IDS, lambda ids: all(map(held, ids)))
            return self.documents(owners=owners)
        return self.documents(keep=lambda index: index % every == every - 1)

    def _part(self, *, held: bool) -> Documents:
        """Of a text that is one document, what is held out, or what is trained on."""
        part = part_of_text(self.dataset, self.evals.held_out_every, held=held)
        return self.documents(dataset=[part])

    def held_out_doubts(self, contexts: int) -> list[str]:
        """What to know of the ``contexts`` that :meth:`held_out` has found, in words."""
        doubts, wanted = [], self.evals.n_contexts
        if contexts < wanted:
            doubts.append(
                f"the held-out text fills {contexts:,} contexts of {self.context_size} tokens, and {wanted:,} were "
                "asked for (evals.n_contexts): evals measure on those. Lower evals.held_out_every, or name a split of "
                "its own in evals.split"
            )
        if self.packed is not None and self.evals.split is None and not self.holds_out_documents:
            why, instead = f"{self.packed.file} does not say which documents they are from", "Pretokenize anew, which "
            instead += "notes the documents, or name a split of its own in evals.split"
            if known := self.packed.documents:
                why = f"they are from {known:,} documents in all, too few to hold out one in that many"
                instead = "Name a split of its own in evals.split, or lower evals.held_out_every"
            doubts.append(
                f"the {contexts:,} held-out contexts are single ones of {self.config.path!r}, one in "
                f"{self.evals.held_out_every}, and {why}: what surrounds them in their documents is trained on, so "
                f"evals come out better than on new text. {instead}"
            )
        return doubts

    def doubts(self, backend: ModelBackend) -> list[str]:
        """What cannot be found out about the contexts and the model, in words."""
        return [] if self.packed is None else self.packed.doubts(reader_of(backend))

    def _stream(
        self, backend: ModelBackend, documents: Documents, *, repeat: bool, piece: Piece | None = None
    ) -> ContextStream:
        by, reader = self.tokenize(backend), reader_of(backend)
        return self.stream(documents, by, backend.special_tokens, reader, repeat=repeat, piece=piece)


def drawn(contexts: Contexts, n: int, seed: int) -> Contexts:
    """``n`` of the contexts, or all that there are, in their order."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(contexts), generator=generator)[:n].sort().values.numpy()
    counts = None if contexts.counts is None else contexts.counts[picked]
    return Contexts(contexts.tokens[picked], contexts.documents[picked], counts)


def reader_of(backend: ModelBackend) -> Reader:
    """A model as a reader of contexts."""
    named = getattr(backend.tokenizer, "name_or_path", None) if isinstance(backend, HasTokenizer) else None
    return Reader(
        f"the model {backend.name!r}",
        backend.d_vocab,
        lambda: Vocabulary.of_backend(backend),
        frozenset(name for name in (backend.name, named) if isinstance(name, str) and name),
    )


def _contradictions(path: str, stated: Mapping[str, Any], made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each option of ``stated`` that says something else than how the contexts were made."""
    same_begin = _begin(stated) == _begin(made)
    return [
        (f"dataset.{name}", f"is {value!r}, but the contexts of {path!r} were made with {made[name]!r}; leave it out, "
         "or pretokenize anew")
        for name, value in stated.items()
        if value is not None and value != made[name]
        and not (same_begin and name in ("prepend_bos", "begin_batch_token"))
    ]  # fmt: skip


def _begin(policy: Mapping[str, Any]) -> Any:
    """What begins every context; ``prepend_bos`` and ``begin_batch_token`` can say the same."""
    return "bos" if policy["prepend_bos"] else policy["begin_batch_token"]


def _check_ids(documents: Documents, policy: TokenPolicy, reader: Reader) -> None:
    """Before anything is packed, the ids that are known: those that are put in, and the first document's."""
    put_in, last = (policy.begin_batch, policy.begin_sequence, policy.separator), reader.d_vocab - 1
    if (largest := max((token for token in put_in if token is not None), default=0)) > last:
        raise DataError(f"dataset puts in the token id {largest}, but the vocabulary of {reader.name} ends at {last}")
    first = documents.first
    if first is None or isinstance(first, str) or not len(first):
        return
    if max(first) > last or min(first) < 0:
        raise DataError(
            f"document 0 holds the token id {max(first) if max(first) > last else min(first)}, but the vocabulary "
            f"of {reader.name} ends at {last}: the data was tokenized for another model"
        )
