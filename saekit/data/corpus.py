"""The text of a run: what is read, how it becomes contexts, and what of it is held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.config import DatasetConfig, EvalsConfig
from saekit.data.contexts import ContextStream, TokenPolicy
from saekit.data.text import STDLIB, Documents
from saekit.errors import ConfigError, DataError
from saekit.protocols import ModelBackend

__all__ = ["POLICY_DEFAULTS", "PRETOKENIZED", "Corpus"]

PRETOKENIZED = "saekit.json"
"""The file beside pretokenised contexts that says how they were made."""
_OF_SAE_LENS = "sae_lens.json"
POLICY_DEFAULTS: Mapping[str, Any] = {
    "context_size": 128,
    "prepend_bos": True,
    "begin_batch_token": "none",
    "begin_sequence_token": "none",
    "sequence_separator_token": "bos",
}
"""What the options mean where neither the configuration nor the data says."""
_TOKENIZER = ("tokenizer", "vocab_size", "token_ids")


@attrs.frozen
class Corpus:
    """The dataset of a run, with every option about tokens settled."""

    config: DatasetConfig
    evals: EvalsConfig
    dataset: Any = None
    """A dataset in memory, in place of ``config.path``."""
    packed: Mapping[str, Any] | None = None
    """Of pretokenised contexts, what is known of their tokenizer: ``tokenizer``, ``vocab_size``, and ``token_ids`` that
    were put in; else None."""

    @classmethod
    def of(cls, config: DatasetConfig, evals: EvalsConfig, dataset: Any = None) -> Corpus:
        """The corpus of a configuration.  Contexts that are pretokenised say themselves how they were made.

        :class:`ConfigError` names each option that contradicts them.
        """
        made = None if dataset is not None else _pretokenized(config)
        stated = {name: getattr(config, name) for name in POLICY_DEFAULTS}
        if made is not None and (problems := _contradictions(config.path, stated, made)):
            raise ConfigError(problems)
        settled = made or POLICY_DEFAULTS
        chosen = {name: settled[name] if stated[name] is None else stated[name] for name in POLICY_DEFAULTS}
        packed = None if made is None else {name: made.get(name) for name in _TOKENIZER}
        return cls(attrs.evolve(config, **chosen), evals, dataset, packed)

    @property
    def context_size(self) -> int:
        """Tokens in a context."""
        assert self.config.context_size is not None
        return self.config.context_size

    def policy(self, special_tokens: Mapping[str, int | None]) -> TokenPolicy:
        """The tokens that are put in, as ids of a tokenizer."""
        return TokenPolicy.of(self.config, special_tokens)

    def stream(
        self,
        documents: Documents,
        tokenize: Callable[[str], Sequence[int]],
        special_tokens: Mapping[str, int | None],
        *,
        d_vocab: int,
        reader: str,
        repeat: bool,
    ) -> ContextStream:
        """The contexts of ``documents``, which this corpus has opened, by a tokenizer.

        :class:`DataError` says what does not fit ``reader``, whose vocabulary has ``d_vocab`` tokens.
        """
        policy = self.policy(special_tokens)
        if self.packed is not None:  # the contexts are whole, with their tokens put in
            self._check_packed(documents, policy, d_vocab, reader)
            policy = attrs.evolve(policy, begin_sequence=None, separator=None)
        _check_ids(documents, policy, d_vocab, reader)
        return ContextStream(documents, tokenize, policy, d_vocab=d_vocab, repeat=repeat)

    def _check_packed(self, documents: Documents, policy: TokenPolicy, d_vocab: int, reader: str) -> None:
        """Pretokenised contexts must be of ``reader``'s tokenizer, and be what is said of them."""
        assert self.packed is not None
        where = f"the contexts of {self.config.path!r}"
        if (self.packed["vocab_size"] or 0) > d_vocab:
            raise DataError(
                f"{where} were made with a tokenizer of {self.packed['vocab_size']} tokens, but {reader} knows "
                f"{d_vocab}: pretokenise for this model"
            )
        theirs, own = self.packed["token_ids"], policy.token_ids()
        if theirs is not None and dict(theirs) != own:
            raise DataError(
                f"{where} were made with the tokenizer {self.packed['tokenizer']!r}, and the tokens that were put in "
                f"are {dict(theirs)}; for {reader} they are {own}: pretokenise for this model"
            )
        first = documents.first
        if first is None or isinstance(first, str):
            return
        if len(first) != policy.context_size:
            raise DataError(
                f"the first context of {self.config.path!r} has {len(first)} tokens, but the file that "
                f"says how they were made says {policy.context_size}: pretokenise anew"
            )
        if policy.begin_batch is not None and len(first) and first[0] != policy.begin_batch:
            raise DataError(
                f"the first context of {self.config.path!r} begins with the token {first[0]}, but for {reader} "
                f"contexts begin with {policy.begin_batch}: they were made with another tokenizer, so pretokenise for "
                "this model"
            )

    def contexts(self, backend: ModelBackend) -> ContextStream:
        """The training contexts, without the documents that are held out."""
        every = self.evals.held_out_every if self.evals.split is None else 0
        documents = Documents.open(
            self.config,
            dataset=self.dataset,
            keep=(lambda index: index % every != every - 1) if every else None,
        )
        return self._stream(backend, documents, repeat=self.config.on_exhausted == "repeat")

    def held_out(self, backend: ModelBackend, seed: int) -> Tensor:
        """``[n, context_size]`` token ids that training never sees, from a stretch of text eight times as long."""
        every, split = self.evals.held_out_every, self.evals.split
        if self.config.path == STDLIB and self.dataset is None and split and "all" in (split, self.config.split):
            raise ConfigError([("evals.split", f"{STDLIB} 'all' holds its other splits; use 'train' and 'heldout'")])
        documents = Documents.open(
            self.config,
            split=split,
            dataset=self.dataset,
            keep=None if split is not None else (lambda index: index % every == every - 1),
        )
        contexts = self._stream(backend, documents, repeat=False).take(8 * self.evals.n_contexts).tokens
        if not len(contexts):
            raise DataError(
                f"the held-out text does not fill one context of {self.context_size} tokens. Lower "
                "evals.held_out_every, name a split of its own in evals.split, use more or smaller documents, or "
                "measure nothing: evals.run = []"
            )
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(len(contexts), generator=generator)[: self.evals.n_contexts]
        return torch.from_numpy(contexts)[picked.sort().values]

    def _stream(self, backend: ModelBackend, documents: Documents, *, repeat: bool) -> ContextStream:
        return self.stream(
            documents, backend.tokenize, backend.special_tokens,
            d_vocab=backend.d_vocab, reader=f"the model {backend.name!r}", repeat=repeat,
        )  # fmt: skip


def _contradictions(path: str, stated: Mapping[str, Any], made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each option of ``stated`` that says something else than how the contexts were made."""
    same_begin = _begin(stated) == _begin(made)
    return [
        (f"dataset.{name}", f"is {value!r}, but the contexts of {path!r} were made with {made[name]!r}; leave it out, "
         "or pretokenise anew")
        for name, value in stated.items()
        if value is not None and value != made[name]
        and not (same_begin and name in ("prepend_bos", "begin_batch_token"))
    ]  # fmt: skip


def _begin(policy: Mapping[str, Any]) -> Any:
    """What begins every context; ``prepend_bos`` and ``begin_batch_token`` can say the same."""
    return "bos" if policy["prepend_bos"] else policy["begin_batch_token"]


def _check_ids(documents: Documents, policy: TokenPolicy, d_vocab: int, reader: str) -> None:
    """Before anything is packed, the ids that are known: those that are put in, and the first document's."""
    put_in = (policy.begin_batch, policy.begin_sequence, policy.separator)
    if (largest := max((token for token in put_in if token is not None), default=0)) >= d_vocab:
        raise DataError(f"dataset puts in the token id {largest}, but the vocabulary of {reader} ends at {d_vocab - 1}")
    first = documents.first
    if first is None or isinstance(first, str) or not len(first):
        return
    if max(first) >= d_vocab or min(first) < 0:
        raise DataError(
            f"document 0 holds the token id {max(first) if max(first) >= d_vocab else min(first)}, but the vocabulary "
            f"of {reader} ends at {d_vocab - 1}: the data was tokenised for another model"
        )


def _pretokenized(config: DatasetConfig) -> dict[str, Any] | None:
    """How the contexts at ``config.path`` were made, if they are contexts."""
    if config.path == STDLIB:
        return None
    path = Path(config.path)
    for name in (PRETOKENIZED, _OF_SAE_LENS):
        file = path / name if path.exists() else _on_hub(config, name)
        if file is None or not file.is_file():
            continue
        try:
            made = json.loads(file.read_text(encoding="utf-8"))
            return _settled(_of_sae_lens(made) if name == _OF_SAE_LENS else {**POLICY_DEFAULTS, **made})
        except (ValueError, TypeError, KeyError) as error:
            missing = "it does not say " if isinstance(error, KeyError) else ""
            raise DataError(f"{name} of the dataset {config.path!r} cannot be read: {missing}{error}") from error
    return None


def _settled(made: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with every option of how contexts are made, checked as a configuration is."""
    policy = {name: made[name] for name in POLICY_DEFAULTS}
    if None in policy.values():
        raise ValueError(f"{next(name for name, value in policy.items() if value is None)} is null")
    DatasetConfig(**policy)
    ids = made.get("token_ids")
    if ids is not None and not isinstance(ids, Mapping):
        raise TypeError(f"token_ids is {ids!r}, expected a table")
    known = {"tokenizer": made.get("tokenizer"), "vocab_size": int(made.get("vocab_size") or 0)}
    return {**policy, **known, "token_ids": ids}


def _on_hub(config: DatasetConfig, name: str) -> Path | None:
    """A file of a dataset repository, if the path names one that has it."""
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(config.path, name, repo_type="dataset", revision=config.revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # an answer, and not that there is no such file
            raise DataError(
                f"whether {config.path!r} holds pretokenised contexts cannot be found out: asked for {name}, the Hub "
                f"answers {str(error.__cause__).splitlines()[0]}. Try again"
            ) from error
        return None  # whatever is wrong with the repository, opening the dataset says it


def _of_sae_lens(made: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that sae-lens writes beside the contexts of its own pretokeniser."""
    tokens = {
        name: "none" if made.get(name) is None else made[name]
        for name in ("begin_batch_token", "begin_sequence_token", "sequence_separator_token")
    }
    return {"context_size": made["context_size"], "prepend_bos": tokens["begin_batch_token"] == "bos", **tokens}
