"""A feature store as it is read: without a model, and each number when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.features.feature import Feature, Histogram, Logits, Partner
from saekit.features.manifest import AboutSAE, StoreManifest
from saekit.files.paths import as_path

__all__ = ["FeatureStore", "SAEFeatures"]


@attrs.frozen(eq=False, slots=False)
class FeatureStore:
    """What features of one or several SAEs of a model do on the same contexts; :func:`saekit.collect_features` makes
    it."""

    folder: Path
    manifest: StoreManifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | None = None) -> Self:
        """The store in ``folder``.

        Sizes of files are compared with what was written, and checksums of small files; ``verify`` compares all, or
        none (False).  :class:`saekit.errors.DataError` for what is damaged, :class:`saekit.errors.PlaceError` for a
        folder that is no store.
        """
        place = as_path(folder)
        manifest = StoreManifest.load(place)
        manifest.check_files(place, whole=verify)
        return cls(place, manifest)

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
        return _arrays(self.folder / "contexts.safetensors")["contexts"]

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The text of every token id."""
        return tuple(json.loads((self.folder / "vocabulary.json").read_text(encoding="utf-8")))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of token ids."""
        return [self.vocabulary[number] for number in ids]

    @cached_property
    def saes(self) -> dict[str, SAEFeatures]:
        """The SAEs by name."""
        return {about.name: SAEFeatures(self, about) for about in self.manifest.saes}

    @property
    def sae(self) -> SAEFeatures:
        """The only SAE; :class:`ConfigError` where there are several."""
        if len(self.saes) != 1:
            raise ConfigError(f"the store has several SAEs, {', '.join(self.saes)}: choose one, store.saes[NAME]")
        return next(iter(self.saes.values()))

    def feature(self, index: int) -> Feature:
        """A feature of the only SAE."""
        return self.sae.feature(index)


@attrs.frozen(eq=False, slots=False)
class SAEFeatures:
    """What a store has of one SAE.  It has a length, the features' number, and yields them one by one."""

    store: FeatureStore = attrs.field(repr=False)
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

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Feature]:
        return (Feature(self, int(index), row) for row, index in enumerate(self.indices))

    def feature(self, index: int) -> Feature:
        """The feature of this number; :class:`ConfigError` for one that the SAE, or the store, has not."""
        row = int(np.searchsorted(self.indices, index))
        if row < len(self) and self.indices[row] == index:
            return Feature(self, int(index), row)
        if not 0 <= index < self.about.d_sae:
            raise ConfigError([("feature", f"must be 0 to {self.about.d_sae - 1:,} for {self.name}, found {index}")])
        raise ConfigError(
            [("feature", f"{index} of {self.name} is not in the store, which has {len(self):,} of its "
              f"{self.about.d_sae:,}; collect it, too")]
        )  # fmt: skip

    # ---- tables, a number for each feature of the store

    def table(self, file: str, name: str) -> NDArray[Any]:
        """``[len(self), ...]``: a table of one of its files, in memory that is the file's."""
        return self._tables(file)[name]

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
        return self.indices[self.fired == 0]

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
        starts, tables = self.table("index", "starts"), self._tables("activations")
        part = slice(int(starts[row]), int(starts[row + 1]))
        contexts, positions = (tables[name][part].astype(np.int64) for name in ("contexts", "positions"))
        sampled = np.ones(len(contexts), np.bool_)
        if "sampled" in tables:
            sampled = tables["sampled"][part].copy()
        return contexts, positions, tables["values"][part].copy(), sampled

    def complete_above(self, row: int) -> float:
        """The activation above which all of a feature's are stored."""
        return float(self.table("index", "complete_above")[row])

    def partners_of(self, row: int, which: str) -> list[Partner]:
        """What stands of a feature in one of the tables of what is active together."""
        numbers = self.table("together", f"{which}_index")[row]
        names = [name for name in ("pearson", "cosine", "jaccard") if f"{which}_{name}" in self._tables("together")]
        columns = {name: self.table("together", f"{which}_{name}")[row].tolist() for name in names}
        return [
            Partner(index, **{name: column[i] for name, column in columns.items()})
            for i, index in enumerate(numbers.tolist())
            if index >= 0
        ]

    def logits_of(self, row: int) -> Logits | None:
        """What a feature does to the logits."""
        if self.why_no_logits is not None:
            return None
        of = {name: values[row] for name, values in self._tables("logits").items()}
        texts = self.store.texts
        top, bottom = (
            tuple(zip(of[f"{end}_ids"].tolist(), texts(of[f"{end}_ids"].tolist()), of[end].tolist(), strict=True))
            for end in ("top", "bottom")
        )
        edges = np.linspace(float(of["low"]), float(of["high"]), len(of["histogram"]) + 1)
        return Logits(top, bottom, Histogram(edges, of["histogram"]), float(of["mean"]), float(of["std"]))

    def _tables(self, file: str) -> dict[str, NDArray[Any]]:
        if file not in self._opened:
            self._opened[file] = _arrays(self.store.folder / self.about.folder / f"{file}.safetensors")
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
