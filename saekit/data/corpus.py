"""The text of a run: what is read, how it becomes contexts, and what of it is held out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.config import DatasetConfig, EvalsConfig
from saekit.data.contexts import ContextStream, TokenPolicy
from saekit.data.text import STDLIB, Documents, is_saved_to_disk
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


@attrs.frozen
class Corpus:
    """The dataset of a run, with every option about tokens settled."""

    config: DatasetConfig
    evals: EvalsConfig
    dataset: Any = None
    """A dataset in memory, in place of ``config.path``."""
    packed_vocabulary: int | None = None
    """Of pretokenised contexts, the size of their tokenizer's vocabulary (0 if unknown); else None."""

    @classmethod
    def of(cls, config: DatasetConfig, evals: EvalsConfig, dataset: Any = None) -> Corpus:
        """The corpus of a configuration.  Contexts that are pretokenised say themselves how they were made.

        :class:`ConfigError` names each option that contradicts them.
        """
        made = None if dataset is not None else _pretokenized(config)
        stated = {name: getattr(config, name) for name in POLICY_DEFAULTS}
        if made is not None:
            problems = [
                (f"dataset.{name}", f"is {stated[name]!r}, but the contexts of {config.path!r} were made with "
                 f"{made[name]!r}; leave it out, or pretokenise anew")
                for name in POLICY_DEFAULTS
                if stated[name] is not None and stated[name] != made[name]
            ]  # fmt: skip
            if problems:
                raise ConfigError(problems)
        settled = made or POLICY_DEFAULTS
        chosen = {name: settled[name] if stated[name] is None else stated[name] for name in POLICY_DEFAULTS}
        vocabulary = None if made is None else int(made.get("vocab_size") or 0)
        return cls(attrs.evolve(config, **chosen), evals, dataset, vocabulary)

    @property
    def context_size(self) -> int:
        """Tokens in a context."""
        assert self.config.context_size is not None
        return self.config.context_size

    def policy(self, special_tokens: Mapping[str, int | None]) -> TokenPolicy:
        """The tokens that are put in, as ids of a tokenizer."""
        return TokenPolicy.of(self.config, special_tokens)

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
        policy = self.policy(backend.special_tokens)
        if self.packed_vocabulary is not None:  # the contexts are whole, with their tokens put in
            if self.packed_vocabulary > backend.d_vocab:
                raise DataError(
                    f"the contexts of {self.config.path!r} were made with a tokenizer of {self.packed_vocabulary} "
                    f"tokens, but the model {backend.name!r} knows {backend.d_vocab}: pretokenise for this model"
                )
            policy = attrs.evolve(policy, begin_sequence=None, separator=None)
        return ContextStream(documents, backend.tokenize, policy, d_vocab=backend.d_vocab, repeat=repeat)

    def identity(self, backend: ModelBackend) -> dict[str, Any]:
        """What decides the training contexts, by option path: two runs that agree on it read the same tokens."""
        config, policy = self.config, self.policy(backend.special_tokens)
        return {
            "dataset.path": config.path if self.dataset is None else "in memory",
            "dataset.name": config.name,
            "dataset.split": config.split,
            "dataset.revision": config.revision,
            "dataset.column": config.column,
            "dataset.context_size": config.context_size,
            "dataset.begin_batch_token": policy.begin_batch,
            "dataset.begin_sequence_token": policy.begin_sequence,
            "dataset.sequence_separator_token": policy.separator,
            "evals.held_out_every": self.evals.held_out_every if self.evals.split is None else 0,
        }


def _pretokenized(config: DatasetConfig) -> dict[str, Any] | None:
    """How the contexts at ``config.path`` were made, if they are contexts."""
    if config.path == STDLIB:
        return None
    path = Path(config.path)
    for name in (PRETOKENIZED, _OF_SAE_LENS):
        file = path / name if is_saved_to_disk(path) else _on_hub(config, name)
        if file is None or not file.is_file():
            continue
        try:
            made = json.loads(file.read_text(encoding="utf-8"))
            return _of_sae_lens(made) if name == _OF_SAE_LENS else {**POLICY_DEFAULTS, **made}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{name} of the dataset {config.path!r} cannot be read: {error}") from error
    return None


def _on_hub(config: DatasetConfig, name: str) -> Path | None:
    """A file of a dataset repository, if the path names one that has it."""
    if Path(config.path).exists() or config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(config.path, name, repo_type="dataset", revision=config.revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None  # whatever is wrong with the repository, opening the dataset says it


def _of_sae_lens(made: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that sae-lens writes beside the contexts of its own pretokeniser."""
    tokens = {
        name: "none" if made.get(name) is None else made[name]
        for name in ("begin_batch_token", "begin_sequence_token", "sequence_separator_token")
    }
    return {"context_size": made["context_size"], "prepend_bos": tokens["begin_batch_token"] == "bos", **tokens}
