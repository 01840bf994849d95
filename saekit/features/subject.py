"""An SAE whose features are collected, and what is summed up of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.analysis.feature_statistics import layer_of
from saekit.errors import ConfigError, DataError
from saekit.features.manifest import AboutSAE
from saekit.kernels.sparse import SparseFeatures
from saekit.plugins.text import short
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.tokens import TokenChoice

__all__ = ["Collected", "Rows", "Sums", "by_number", "checksum", "chosen_features"]


def checksum(sae: SAEModule) -> str:
    """The sha256 of what ``sae`` is and of its weights, as they are saved."""
    about = [sae.info.architecture, sae.saved_options(), sae.info.input_transform]
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(sae.public_tensors().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def chosen_features(features: object, d_sae: int, name: str, option: str = "features") -> NDArray[np.int64]:
    """The numbers that ``features`` are for an SAE, rising and each once; :class:`ConfigError` for those it has not.

    ``option`` is what the error calls that in which they were given.
    """
    if features is None or (isinstance(features, str) and features == "all"):
        return np.arange(d_sae)
    if isinstance(features, (str, bytes, Mapping, Iterator)) or not isinstance(features, Iterable):
        raise ConfigError([(option, f'must be numbers of features or "all", found {features!r}')])
    if isinstance(features, (np.ndarray, Tensor)):
        features = features.tolist() if features.ndim else [features.item()]
    numbers = [one.item() if isinstance(one, (np.integer, Tensor)) and one.ndim == 0 else one for one in features]
    odd = [one for one in numbers if type(one) is not int or not 0 <= one < d_sae]
    if odd or not numbers:
        found = "none" if not numbers else ", ".join(map(short, odd[:5])) + (" ..." if len(odd) > 5 else "")
        raise ConfigError([(option, f"must be numbers from 0 to {d_sae - 1:,} for {name}, found {found}")])
    return np.unique(np.array(numbers, np.int64))


@attrs.frozen(eq=False)
class Collected:
    """An SAE whose features are collected."""

    name: str
    sae: SAEModule
    sites: Sites
    tokens: TokenChoice
    features: NDArray[np.int64]
    """Those that are asked for; they rise."""
    row_of: Tensor
    """``[d_sae]``: the place of a feature among these, -1 for others."""

    @classmethod
    def of(cls, name: str, sae: SAEModule, sites: Sites, tokens: TokenChoice, features: object) -> Self:
        """With the features that are meant."""
        numbers = chosen_features(features, sae.d_sae, name)
        row_of = torch.full((sae.d_sae,), -1, dtype=torch.int64)
        row_of[torch.from_numpy(numbers)] = torch.arange(len(numbers))
        return cls(name, sae, sites, tokens, numbers, row_of)

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations."""
        return self.sae.dtype

    def about(self, number: int) -> AboutSAE:
        """What a manifest says of it, before anything is known of its features."""
        sae, sites = self.sae, self.sites
        return AboutSAE(
            name=self.name,
            folder=f"sae-{number}",
            checksum=checksum(sae),
            architecture=sae.info.architecture,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            d_out=sae.d_out,
            dtype=str(sae.dtype).removeprefix("torch."),
            inputs=[site.name for site in sites.inputs],
            targets=[site.name for site in sites.targets],
            hook=sites.name,
            layer=layer_of(sites),
            tokens=self.tokens.metadata(),
            metadata=json.loads(json.dumps(dict(sae.info.metadata), default=str)),
            features=None if len(self.features) == sae.d_sae else self.features.tolist(),
        )

    @torch.no_grad()
    def active(self, inputs: Tensor, kept: Tensor) -> SparseFeatures:
        """What is not zero of ``inputs [b, t, d_in]`` on tokens that count (``kept [b, t]``), on the CPU.

        The values are those of :meth:`saekit.SAE.encode`, of all features together.
        """
        found = self.sae.encode_sparse(inputs.to(self.sae.device))
        counts = kept.reshape(-1).to(found.rows.device)
        mask = counts[found.rows] & (found.values != 0)
        found = found if bool(mask.all()) else found.kept(mask)
        if not bool(found.values.isfinite().all()):
            raise DataError(
                f"{self.name} gives activations that are no finite numbers: its weights or its inputs are damaged, or "
                f"its type, {found.values.dtype}, is too small for them"
            )
        rows, features, values = (part.cpu() for part in (found.rows, found.features, found.values))
        return SparseFeatures(rows, features, values, found.n, found.d_sae)

    def own(self, found: SparseFeatures) -> SparseFeatures:
        """Those of ``found`` that are asked for, by their places."""
        if len(self.features) == found.d_sae:
            return found
        places = self.row_of[found.features]
        own = attrs.evolve(found, features=places, d_sae=len(self.features))
        return own.kept(places >= 0)


@attrs.define(eq=False)
class Sums:
    """What is summed up of one SAE, in float64, over the tokens that count."""

    tokens: int
    fired: Tensor
    """``[d_sae]`` int64: tokens on which each feature is not zero, those that are not asked for included."""
    total: Tensor
    """``[d_sae]``: their activations."""
    squares: Tensor
    """``[d_sae]``: and the squares of these."""
    neuron_total: Tensor
    """``[d_in]``."""
    neuron_squares: Tensor
    """``[d_in]``."""
    products: Tensor
    """``[features, d_in]``: each feature that is asked for with each neuron."""

    @classmethod
    def of(cls, one: Collected) -> Self:
        """Of nothing."""
        wide, narrow = (torch.zeros(n, dtype=torch.float64) for n in (one.sae.d_sae, one.sae.d_in))
        products = torch.zeros(len(one.features), one.sae.d_in, dtype=torch.float64)
        fired = torch.zeros(one.sae.d_sae, dtype=torch.int64)
        return cls(0, fired, wide, wide.clone(), narrow, narrow.clone(), products)

    def add(self, found: SparseFeatures, wanted: SparseFeatures, inputs: Tensor, kept: Tensor) -> None:
        """Take in what is active on ``inputs [n, d_in]``; of those that are asked for by their places."""
        self.tokens += int(kept.sum())
        values = found.values.double()
        self.fired += torch.bincount(found.features, minlength=found.d_sae)
        self.total += torch.bincount(found.features, values, minlength=found.d_sae)
        self.squares += torch.bincount(found.features, values.square(), minlength=found.d_sae)
        neurons = inputs.cpu().double()
        counted = neurons[kept]
        self.neuron_total += counted.sum(0)
        self.neuron_squares += counted.square().sum(0)
        if len(wanted):
            wanted.add_outer_products(wanted.values.double(), neurons, self.products)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """As they are saved."""
        named = {name: value for name, value in attrs.asdict(self, recurse=False).items() if name != "tokens"}
        return {f"{prefix}{name}": value for name, value in named.items()} | {
            f"{prefix}tokens": torch.tensor(self.tokens)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> Self:
        """As they were saved."""
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return cls(tokens=int(own.pop("tokens")), **own)


def by_number(numbers: Tensor, n: int) -> Tensor:
    """The order of ``numbers``, which are below ``n``; equal ones stay as they are."""
    keys = numbers.numpy()
    return torch.from_numpy(np.argsort(keys.astype(np.uint16) if n <= 1 << 16 else keys, kind="stable"))  # by digits


@attrs.define(eq=False)
class Rows:
    """The activations of all features on those tokens on which one that is asked for fires; token by token."""

    places: list[Tensor] = attrs.field(factory=list)
    """Context times context size plus position of each token."""
    counts: list[Tensor] = attrs.field(factory=list)
    """Features that are active on it."""
    features: list[Tensor] = attrs.field(factory=list)
    values: list[Tensor] = attrs.field(factory=list)
    entries: int = 0

    def add(self, found: SparseFeatures, wanted: Tensor, first: int) -> None:
        """Take in what is active; ``wanted [entries]`` says which are asked for, ``first`` is the first row's place."""
        has = torch.zeros(found.n, dtype=torch.bool)
        has[found.rows[wanted]] = True
        kept = found if bool(has.all()) else found.kept(has[found.rows])
        rows = has.nonzero()[:, 0]
        self.places.append(rows + first)
        self.counts.append(torch.bincount(kept.rows, minlength=found.n)[rows])
        self.features.append(kept.features.int())
        self.values.append(kept.values)
        self.entries += len(kept)

    def tensors(self, row_of: Tensor, n_features: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """As a part is saved: rows one after the other, and the order in which the entries are by feature."""
        features = torch.cat(self.features) if self.features else torch.empty(0, dtype=torch.int32)
        counts = torch.cat(self.counts) if self.counts else torch.empty(0, dtype=torch.int64)
        of = row_of[features.long()]
        wanted = (of >= 0).nonzero()[:, 0]
        keys = of[wanted]
        order = by_number(keys, n_features)
        return {
            "places": torch.cat(self.places) if self.places else counts,
            "starts": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "features": features,
            "values": torch.cat(self.values) if self.values else torch.empty(0, dtype=dtype),
            "order": wanted[order].int(),
            "by_feature": torch.cat([counts.new_zeros(1), torch.bincount(keys, minlength=n_features).cumsum(0)]),
        }
