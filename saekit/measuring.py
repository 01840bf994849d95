"""What travels between an eval that accumulates and the pass over contexts that it takes part in, and what it finds.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit.site import Sites
from saekit.values import Histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from saekit.kernels.sparse import SparseFeatures

__all__ = ["Evaluation", "Needs", "Outcome", "Seen"]


@attrs.frozen(kw_only=True)
class Needs:
    """What an eval asks for; what no eval asks for is not computed."""

    rows: bool = False
    """What the SAE reads, what it should give, and what it gives: :attr:`Seen.inputs`, ``targets``, ``outputs``."""
    features: bool = False
    """Its feature activations, :attr:`Seen.features`."""
    clean: bool = False
    """The model's loss as it is."""
    spliced: bool = False
    """The model's loss with what the SAE gives at its targets."""
    zero: bool = False
    """Its loss with zeros there."""
    mean: int = 0
    """Its loss with the mean there, over so many contexts, which are read first; 0: none."""
    kl: bool = False
    """Of each of these forwards the Kullback-Leibler divergence from the clean one."""
    top1: bool = False
    """Of each whether its likeliest token is that of the clean one."""
    logits: bool = False
    """Of each the logits."""
    batch_size: int = 16
    """Contexts in one forward of the model, at most."""

    @property
    def model(self) -> bool:
        """Whether any loss is asked for."""
        return bool(self.clean or self.spliced or self.zero or self.mean)

    @property
    def sae(self) -> bool:
        """Whether the SAE must run."""
        return self.rows or self.features or self.spliced

    @property
    def by_logits(self) -> bool:
        """Whether logits must be made."""
        return self.model and (self.kl or self.top1 or self.logits)

    def __or__(self, other: Needs) -> Needs:
        """What either asks for; the smaller batches."""
        flags = {
            name: getattr(self, name) or getattr(other, name)
            for name in ("rows", "features", "clean", "spliced", "zero", "kl", "top1", "logits")
        }
        size = min(self.batch_size, other.batch_size)
        return Needs(mean=max(self.mean, other.mean), batch_size=size, **flags)


@attrs.frozen(eq=False, kw_only=True)
class Outcome:
    """What the model made of one batch in one forward."""

    loss: Tensor
    """``[b, t - 1]``: next-token cross-entropy in nats; the ``i``-th is that of token ``i + 1``."""
    _kl: Tensor | None = None
    _agrees: Tensor | None = None
    _logits: Tensor | None = None

    @property
    def kl(self) -> Tensor:
        """``[b, t]``: KL(clean ‖ this) in nats at each position; of the clean forward 0."""
        return _asked_for(self._kl, "kl")  # type: ignore[no-any-return]

    @property
    def agrees(self) -> Tensor:
        """``[b, t]`` bool: whether the likeliest token is that of the clean forward."""
        return _asked_for(self._agrees, "top1")  # type: ignore[no-any-return]

    @property
    def logits(self) -> Tensor:
        """``[b, t, d_vocab]``."""
        return _asked_for(self._logits, "logits")  # type: ignore[no-any-return]


@attrs.frozen(eq=False, kw_only=True)
class Seen:
    """A batch of contexts, and what was asked for of it."""

    numbers: tuple[int, ...]
    """The number of each context among all that are measured; none is shown twice."""
    tokens: Tensor
    """``[b, t]`` ids."""
    kept: Tensor
    """``[b, t]`` bool: the positions that count."""
    sites: Sites
    _inputs: Tensor | None = None
    _targets: Tensor | None = None
    _outputs: Tensor | None = None
    _features: SparseFeatures | None = None
    _clean: Outcome | None = None
    _spliced: Outcome | None = None
    _zero: Outcome | None = None
    _mean: Outcome | None = None

    @property
    def inputs(self) -> Tensor:
        """``[b, t, d_in]``: what the SAE reads."""
        return _asked_for(self._inputs, "rows")  # type: ignore[no-any-return]

    @property
    def targets(self) -> Tensor:
        """``[b, t, d_out]``: what it should give; of an SAE the inputs."""
        return _asked_for(self._targets, "rows")  # type: ignore[no-any-return]

    @property
    def outputs(self) -> Tensor:
        """``[b, t, d_out]``: what it gives."""
        return _asked_for(self._outputs, "rows")  # type: ignore[no-any-return]

    @property
    def features(self) -> SparseFeatures:
        """Its features by their entries; row ``i * t + j`` is position ``j`` of context ``i``, counted or not."""
        return _asked_for(self._features, "features")  # type: ignore[no-any-return]

    @property
    def clean(self) -> Outcome:
        """The model as it is."""
        return _asked_for(self._clean, "clean")  # type: ignore[no-any-return]

    @property
    def spliced(self) -> Outcome:
        """The model with what the SAE gives at its targets."""
        return _asked_for(self._spliced, "spliced")  # type: ignore[no-any-return]

    @property
    def zero(self) -> Outcome:
        """The model with zeros there."""
        return _asked_for(self._zero, "zero")  # type: ignore[no-any-return]

    @property
    def mean(self) -> Outcome:
        """The model with the mean there."""
        return _asked_for(self._mean, "mean")  # type: ignore[no-any-return]

    def summed(self, values: Tensor) -> Tensor:
        """``[b]`` in float64, on the CPU: of each context the sum of ``values`` over the positions that count.

        ``values`` are ``[b, t]``, or ``[b, t - 1]`` as losses are: a loss counts with the token it is predicted from.
        """
        import torch

        values = values.cpu().double()  # not every device has float64
        kept = self.kept.cpu()[:, : values.shape[1]]
        return torch.where(kept, values, 0.0).sum(1)

    @property
    def kept_features(self) -> SparseFeatures:
        """:attr:`features` of the positions that count."""
        features = self.features
        return features.kept(self.kept.to(features.rows.device).flatten()[features.rows])


@attrs.frozen(eq=False, kw_only=True)
class Evaluation:
    """Numbers by name with their standard errors."""

    values: Mapping[str, float]
    """The numbers."""
    errors: Mapping[str, float] = attrs.field(factory=dict)
    """The standard errors of those that have one: by bootstrap over contexts."""
    histograms: Mapping[str, Histogram] = attrs.field(factory=dict)
    features: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Numbers of each feature, ``[d_sae]``."""
    remarks: tuple[str, ...] = ()
    """What looks wrong, in words."""
    about: Mapping[str, Any] = attrs.field(factory=dict)
    """What was measured, and how: plain data."""
    contexts: tuple[int, ...] = ()
    """The numbers of the contexts."""
    resampled: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Of each number that has an error ``[n_bootstrap]``: what it is in each resample of the contexts.  Those of SAEs
    that were measured on the same contexts are of the same resamples."""
    sums: Mapping[str, Any] = attrs.field(factory=dict)
    """The :class:`saekit.evals.Sums` of each eval, by its name."""

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def numbers(self) -> dict[str, float]:
        """Values, and errors as ``NAME_se``."""
        return {**self.values, **{f"{name}_se": error for name, error in self.errors.items()}}

    @classmethod
    def joined(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """What several evals have found of one SAE on the same contexts, as one; of a name the first counts."""
        whole = cls(values={})
        for part in parts:
            merged = {
                name: {**getattr(part, name), **getattr(whole, name)}
                for name in ("values", "errors", "histograms", "features", "about", "resampled", "sums")
            }
            remarks = tuple(dict.fromkeys((*whole.remarks, *part.remarks)))
            whole = cls(**merged, remarks=remarks, contexts=whole.contexts or part.contexts)
        return whole


def _asked_for(value: Any, what: str) -> Any:
    if value is None:
        raise ValueError(f"this was not asked for: the eval's needs must have {what}")
    return value
