"""Contexts that were made before: what the file beside them says, and whether they are a model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from saekit.config import DatasetConfig
from saekit.data.packer import TokenPolicy
from saekit.data.text import STDLIB
from saekit.data.vocabulary import Vocabulary, tokenizer_here
from saekit.errors import DataError
from saekit.files.storage import read_json
from saekit.hub import within_reach
from saekit.reasons import reason

__all__ = ["DOCUMENT_IDS", "POLICY_DEFAULTS", "PRETOKENIZED", "Packed", "Reader", "held_documents"]

PRETOKENIZED = "saekit.json"
"""The file beside pretokenized contexts that says how they were made."""
_OF_SAE_LENS = "sae_lens.json"
DOCUMENT_IDS = "document_ids"
"""The column of pretokenized contexts that has the documents each is from."""
POLICY_DEFAULTS: Mapping[str, Any] = {
    "context_size": 128,
    "prepend_bos": True,
    "begin_batch_token": "none",
    "begin_sequence_token": "none",
    "sequence_separator_token": "bos",
    "disable_concat_sequences": False,
    "chat_template": False,
}
"""What the options mean where neither the configuration nor the data says."""
_TOKENS = ("begin_batch_token", "begin_sequence_token", "sequence_separator_token")
_BLOCK_CONTEXTS = 8  # in a run of documents that are held out, at least, for at its ends some contexts are lost
_MOST_BLOCKS = 64


@attrs.frozen
class Reader:
    """Whose contexts are to be: a model or a tokenizer."""

    name: str
    """In words, such as ``the model 'gpt2'``."""
    d_vocab: int
    vocabulary: Callable[[], Vocabulary]
    names: frozenset[str] = frozenset()
    """What its tokenizer is called."""


@attrs.frozen(slots=False, eq=False)
class Packed:
    """How the contexts at ``path`` were made."""

    path: str
    file: str
    policy: Mapping[str, Any]
    """Every option of :data:`POLICY_DEFAULTS`."""
    tokenizer: str | None
    """The name of the tokenizer."""
    vocab_size: int
    """0: not known."""
    token_ids: Mapping[str, int | None] | None
    """Those that were put in."""
    stated: Vocabulary
    """That of the tokenizer, as far as the file says."""
    documents: int
    """How many there were; the column :data:`DOCUMENT_IDS` says which each context is from.  0: that is not known."""
    contexts: int
    """How many there are.  0: not known."""

    @classmethod
    def at(cls, config: DatasetConfig) -> Packed | None:
        """What is said of the contexts at ``config.path``, if they are contexts.

        :class:`DataError` for a file that cannot be read, or says what cannot be.
        """
        if config.path == STDLIB:
            return None
        path = Path(config.path)
        for name in (PRETOKENIZED, _OF_SAE_LENS):
            file = path / name if path.exists() else _on_hub(config, name)
            if file is None or not file.is_file():
                continue
            try:
                made = read_json(file)
                made = _of_sae_lens(made) if name == _OF_SAE_LENS else {**POLICY_DEFAULTS, **made}
                return cls._of(config.path, name, made)
            except (ValueError, TypeError, KeyError, OSError) as error:
                said = f"it does not say {error}" if isinstance(error, KeyError) else reason(error)
                raise DataError(f"{name} of the dataset {config.path!r} cannot be read: {said}") from error
        return None

    @classmethod
    def _of(cls, path: str, file: str, made: Mapping[str, Any]) -> Packed:
        """Metadata, checked as a configuration is."""
        ids, name = made.get("token_ids"), made.get("tokenizer")
        if ids is not None and not isinstance(ids, Mapping):
            raise TypeError(f"token_ids is {ids!r}, expected a table")
        return cls(
            path=path,
            file=file,
            policy=_policy(made),
            tokenizer=None if name is None else str(name),
            vocab_size=_number(made, "vocab_size"),
            token_ids=ids,
            stated=Vocabulary.of_metadata(made),
            documents=_number(made, "documents"),
            contexts=_number(made, "contexts"),
        )

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """That of the tokenizer: as the file says, or that of the tokenizer it names, if this machine has it."""
        if self.stated.known:
            return self.stated
        return None if self.tokenizer is None else tokenizer_here(self.tokenizer)

    def check(self, first: str | Sequence[int] | None, policy: TokenPolicy, reader: Reader) -> None:
        """The contexts must be of ``reader``'s tokenizer, and the ``first`` of them what is said of it."""
        where = f"the contexts of {self.path!r}"
        if self.vocab_size > reader.d_vocab:
            raise DataError(
                f"{where} were made with a tokenizer of {self.vocab_size} tokens, but {reader.name} knows "
                f"{reader.d_vocab}: pretokenize for this model"
            )
        theirs, own = self.token_ids, policy.token_ids()
        if theirs is not None and dict(theirs) != own:
            raise DataError(
                f"{where} were made with the tokenizer {self.tokenizer!r}, and the tokens that were put in "
                f"are {dict(theirs)}; for {reader.name} they are {own}: pretokenize for this model"
            )
        if first is not None and not isinstance(first, str):
            self._check_first(first, policy, reader)
        if self.vocabulary is not None and not self._same_name(reader):
            difference = self.vocabulary.differs_from(reader.vocabulary())
            if difference is not None:
                raise DataError(
                    f"{where} were made with the tokenizer {self.tokenizer!r}, and {reader.name} has another: "
                    f"{difference}. Pretokenize for this model"
                )

    def _check_first(self, first: Sequence[int], policy: TokenPolicy, reader: Reader) -> None:
        if len(first) != policy.context_size:
            raise DataError(
                f"the first context of {self.path!r} has {len(first)} tokens, but the file that "
                f"says how they were made says {policy.context_size}: pretokenize anew"
            )
        if policy.begin_batch is not None and len(first) and first[0] != policy.begin_batch:
            raise DataError(
                f"the first context of {self.path!r} begins with the token {first[0]}, but for {reader.name} "
                f"contexts begin with {policy.begin_batch}: they were made with another tokenizer, so pretokenize for "
                "this model"
            )

    def _same_name(self, reader: Reader) -> bool:
        """Whether a name is all that is known, and it is the reader's; a folder may hold another one by now."""
        name = self.tokenizer
        return not self.stated.known and name in reader.names and not Path(str(name)).exists()

    def doubts(self, reader: Reader) -> list[str]:
        """What cannot be found out about the contexts and ``reader``, in words."""
        if self._same_name(reader) or (self.vocabulary is not None and self.vocabulary.tells(reader.vocabulary())):
            return []
        if self.vocabulary is not None:
            why = f"{reader.name} has no tokenizer to compare with"
        elif self.tokenizer is None:
            why = f"{self.file} does not say which one that was"
        else:
            why = f"{self.file} says {self.tokenizer!r}, and no such tokenizer is on this machine"
        return [
            f"whether the contexts of {self.path!r} were made with the tokenizer of {reader.name} cannot be found out: "
            f"{why}. With another one, the model reads noise"
        ]


def held_documents(packed: Packed, every: int) -> Callable[[int], bool]:
    """Which documents are held out: one in ``every`` or a few more, in runs of neighbors, of at least that many.

    Contexts in which documents of both sides meet are for neither, and there are few of them with runs.
    """
    documents = packed.documents
    runs = max(min(packed.contexts // (every * _BLOCK_CONTEXTS), _MOST_BLOCKS, documents // every), 1)
    length = -(-documents // (runs * every))

    def held(document: int) -> bool:
        run = document * runs // documents  # each is in the middle of its stretch, for the last document may be cut
        begin, end = -(-run * documents // runs), -(-(run + 1) * documents // runs)
        return 0 <= document - begin - (end - begin - length) // 2 < length

    return held


def _policy(made: Mapping[str, Any]) -> dict[str, Any]:
    policy = {name: made[name] for name in POLICY_DEFAULTS}
    if None in policy.values():
        raise ValueError(f"{next(name for name, value in policy.items() if value is None)} is null")
    for name in ("prepend_bos", "disable_concat_sequences"):
        if not isinstance(policy[name], bool):
            raise TypeError(f"{name} is {policy[name]!r}, expected true or false")
    if not isinstance(policy["chat_template"], (bool, str)):
        raise TypeError(f"chat_template is {policy['chat_template']!r:.60}, expected true, false or a template")
    DatasetConfig(**policy)
    for name, value in policy.items():
        if name in ("context_size", *_TOKENS) and (
            isinstance(value, (bool, float)) or not isinstance(value, (int, str))
        ):
            raise TypeError(f"{name} is {value!r}, which is no number of tokens and no token")
    return policy


def _number(made: Mapping[str, Any], name: str) -> int:
    value = made.get(name)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise TypeError(f"{name} is {value!r:.80}, expected a whole number")
    return value


def _on_hub(config: DatasetConfig, name: str) -> Path | None:
    """A file of a dataset repository, if the path names one that has it."""
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        with within_reach():
            return Path(hf_hub_download(config.path, name, repo_type="dataset", revision=config.revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # an answer, and not that there is no such file
            raise DataError(
                f"whether {config.path!r} holds pretokenized contexts cannot be found out: asked for {name}, the Hub "
                f"answers {str(error.__cause__).splitlines()[0]}. Try again"
            ) from error
        return None  # whatever is wrong with the repository, opening the dataset says it


def _of_sae_lens(made: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that sae-lens writes beside the contexts of its own pretokenizer."""
    tokens = {name: "none" if made.get(name) is None else made[name] for name in _TOKENS}
    begins = {"context_size": made["context_size"], "prepend_bos": tokens["begin_batch_token"] == "bos"}
    begins |= {"disable_concat_sequences": made.get("disable_concat_sequences", False), "chat_template": False}
    return begins | tokens | {"tokenizer": made.get("tokenizer_name")}
