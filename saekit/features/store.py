"""A feature store as it is read: without a model, and each number when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeGuard, overload

import attrs
import numpy as np

from saekit.errors import ConfigError
from saekit.features.feature import Feature
from saekit.features.manifest import StoreManifest, is_store
from saekit.features.tables import SAETables, StoreFiles
from saekit.files.paths import as_path
from saekit.plugins.text import short

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["FeatureStore", "SAEFeatures"]


@attrs.frozen(eq=False, slots=False, repr=False)
class FeatureStore(StoreFiles):
    """What features of one or several SAEs of a model do on the same contexts; :func:`saekit.collect_features` makes
    it.

    ``store["NAME"]`` is an SAE of several, ``store[3]`` the feature of its only SAE with the number 3, which is no
    place in a row: a store may have few of an SAE's features.  It yields the features of all, and their number is its
    length; to choose any of them, take ``list(store)``.  ``in`` asks for a name, a feature's number, or a feature.
    """

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

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Whether ``folder`` says that it is a store, which may be damaged."""
        return is_store(as_path(folder))

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

    def __len__(self) -> int:
        return sum(len(one) for one in self.saes.values())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Feature]:
        return (feature for one in self.saes.values() for feature in one)

    @overload
    def __getitem__(self, which: str) -> SAEFeatures: ...

    @overload
    def __getitem__(self, which: int) -> Feature: ...

    def __getitem__(self, which: int | str) -> Feature | SAEFeatures:
        if not isinstance(which, str):
            return self.feature(which)
        if which not in self.saes:
            raise ConfigError([("sae", f"must be one of the store's, {', '.join(self.saes)}; found {which!r}")])
        return self.saes[which]

    def __contains__(self, which: object) -> bool:
        """Whether there is an SAE of this name, a feature of this number, or this feature.

        :class:`ConfigError` for a number where there are several SAEs, as for ``store[3]``.
        """
        if isinstance(which, str):
            return which in self.saes
        return any(which in one for one in self.saes.values()) if isinstance(which, Feature) else which in self.sae

    __reversed__: ClassVar[None] = None
    """By numbers from the length down it would be, and a feature's number is no place."""

    def __repr__(self) -> str:
        number, tokens = len(self), self.n_contexts * self.context_size
        saes = f"{len(self.saes)} SAE{'s' if len(self.saes) > 1 else ''}"
        return f"FeatureStore({str(self.folder)!r}: {number:,} features of {saes} on {tokens:,} tokens)"


@attrs.frozen(eq=False, slots=False, repr=False)
class SAEFeatures(SAETables):
    """What a store has of one SAE.  It has a length, the features' number, and yields them one by one.

    ``[3]`` is the feature with the number 3 in the SAE, and no place in a row: a store may have few of its features.
    ``in`` asks for a number, or a feature.
    """

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"SAEFeatures({self.name!r}: {len(self):,} features on {self.tokens_counted:,} tokens)"

    def __getitem__(self, index: int) -> Feature:
        return self.feature(index)

    def __contains__(self, which: object) -> bool:
        """Whether there is a feature of this number, or this feature."""
        if isinstance(which, Feature):
            return which.sae is self
        return _is_whole(which) and 0 <= which < self.about.d_sae and self._row_of(int(which)) is not None

    __reversed__: ClassVar[None] = None

    def __iter__(self) -> Iterator[Feature]:
        return (Feature(self, int(index), row) for row, index in enumerate(self.indices))

    def statistics(self, *, logits: bool = True) -> DataFrame:
        """The table of :func:`saekit.feature_statistics` of the features in the store: how often each fires is of its
        text.  ``attrs["left_out"]`` says why there is no such column, by column."""
        from saekit.features.statistics import statistics

        return statistics(self, logits=logits)

    def feature(self, index: int, option: str = "feature") -> Feature:
        """The feature of this number; :class:`ConfigError` for one that the SAE, or the store, has not.

        ``option`` is what the error calls that in which the number was given.
        """
        if not _is_whole(index) or not 0 <= index < self.about.d_sae:
            last = self.about.d_sae - 1
            raise ConfigError([(option, f"must be 0 to {last:,} for {self.name}, found {short(index)}")])
        if (row := self._row_of(int(index))) is not None:
            return Feature(self, int(index), row)
        raise ConfigError(
            [(option, f"{index} of {self.name} is not in the store, which has {len(self):,} of its "
              f"{self.about.d_sae:,}; collect it, too")]
        )  # fmt: skip

    def _row_of(self, index: int) -> int | None:
        row = int(np.searchsorted(self.indices, index))
        return row if row < len(self) and self.indices[row] == index else None


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
