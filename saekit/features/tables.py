"""The files of a feature store: numbers of all features, in memory that is the files'."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import DataError
from saekit.features.manifest import AboutSAE, StoreManifest, files_listed

__all__ = ["SAETables", "StoreFiles"]


@attrs.frozen(eq=False, slots=False)
class StoreFiles:
    """What a store has that belongs to no SAE."""

    folder: Path
    manifest: StoreManifest

    @property
    def model_name(self) -> str:
        """The model that all SAEs are of."""
        return str(self.manifest.model["name"])

    @property
    def context_size(self) -> int:
        """Tokens in each context."""
        return self.manifest.context_size

    @property
    def n_contexts(self) -> int:
        """Contexts that were looked at."""
        return self.manifest.contexts

    @cached_property
    def contexts(self) -> NDArray[np.int32]:
        """``[n_contexts, context_size]``: token ids."""
        return self.arrays("contexts.safetensors")["contexts"]

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The text of every token id."""
        found = (self.folder / "vocabulary.json").read_text(encoding="utf-8")
        self._check_same()
        return tuple(json.loads(found))

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The tables of one of the store's files, in memory that is the file's.

        :class:`DataError` where another store has come into the folder since this one was opened.
        """
        try:
            found = _arrays(self.folder / name)
        except FileNotFoundError:
            self._check_same()
            raise
        self._check_same()
        return found

    def _check_same(self) -> None:
        """What was opened just now is of this store, if the manifest, which goes first, is as it was."""
        if files_listed(self.folder) != {name: dict(entry) for name, entry in self.manifest.files.items()}:
            raise DataError(
                f"the feature store {str(self.folder)!r} was removed or replaced since it was opened: open it again"
            )

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of token ids."""
        return [self.vocabulary[number] for number in ids]


@attrs.frozen(eq=False, slots=False)
class SAETables:
    """What a store has of one SAE."""

    store: StoreFiles = attrs.field(repr=False)
    about: AboutSAE

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self.about.name

    @property
    def tokens_counted(self) -> int:
        """The tokens that count, of which every fraction is one."""
        return self.about.tokens_counted

    @property
    def why_no_logits(self) -> str | None:
        """Why nothing can be said of logits, in words; None: something can."""
        return self.about.why_no_logits

    @property
    def top_kept(self) -> int:
        """Of a feature of which not all activations are stored, how many of the largest are."""
        return int(self.store.manifest.options["top_kept"])

    # ---- tables, a number for each feature of the store

    def table(self, file: str, name: str) -> NDArray[Any]:
        """``[n, ...]``: a table of one of its files, in memory that is the file's."""
        return self.tables(file)[name]

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """``[n]``: the features' numbers; they rise."""
        return self.table("index", "features")

    @cached_property
    def fired(self) -> NDArray[np.int64]:
        """``[n]``: tokens on which each is not zero."""
        return self.table("index", "fired")

    @property
    def firing_fraction(self) -> NDArray[np.float64]:
        """``[n]``: the same as fractions of the tokens that count."""
        return self.fired / self.tokens_counted

    @cached_property
    def maximum(self) -> NDArray[np.float64]:
        """``[n]``: the largest activation of each; 0 for one that never fires."""
        return self.table("index", "maximum")

    @cached_property
    def minimum(self) -> NDArray[np.float64]:
        """``[n]``: the least that is not zero."""
        return self.table("index", "minimum")

    @property
    def dead(self) -> NDArray[np.int64]:
        """The numbers of those that never fire."""
        never: NDArray[np.bool_] = self.fired == 0
        return self.indices[never]

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """``[n_contexts, context_size]``: the tokens that count."""
        return self.table("kept", "kept")

    @cached_property
    def counted_places(self) -> NDArray[np.int64]:
        """``[tokens_counted]``: context times context size plus position of the tokens that count."""
        return np.flatnonzero(self.kept)

    # ---- of one feature

    def entries(self, row: int) -> tuple[NDArray[Any], ...]:
        """Contexts, positions, values of the activations of a row, and which of them are in the fair sample."""
        starts, tables = self.table("index", "starts"), self.tables("activations")
        part = slice(int(starts[row]), int(starts[row + 1]))
        contexts, positions = (tables[name][part].astype(np.int64) for name in ("contexts", "positions"))
        sampled = np.ones(len(contexts), np.bool_)
        if "sampled" in tables:
            sampled = tables["sampled"][part].copy()
        return contexts, positions, tables["values"][part].copy(), sampled

    def complete_above(self, row: int) -> float:
        """The activation above which all of a feature's are stored."""
        return float(self.table("index", "complete_above")[row])

    def tables(self, file: str) -> dict[str, NDArray[Any]]:
        """The tables of one of its files, by name."""
        if file not in self._opened:
            self._opened[file] = self.store.arrays(f"{self.about.folder}/{file}.safetensors")
        return self._opened[file]

    @cached_property
    def _opened(self) -> dict[str, dict[str, NDArray[Any]]]:
        return {}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file, in memory that is the file's; those in bfloat16, which numpy has not, in float32."""
    import torch

    from saekit.files.mapped import mapped_tensors

    found = mapped_tensors(path)
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in found.items()}
