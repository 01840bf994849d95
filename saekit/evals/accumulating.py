"""The base class of evals that accumulate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from saekit.evals.sums import N_BOOTSTRAP, Sums, Totals
from saekit.measuring import Evaluation, Measure, Needs, Seen
from saekit.protocols import ModelBackend
from saekit.site import Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae.module import SAEModule

__all__ = ["AccumulatingEval", "finished"]

_ALONE = "only one context has tokens that count, so that no number has an error"


class AccumulatingEval(ABC):
    """An eval of which :attr:`needs`, :meth:`update` and :meth:`metrics` are missing.

    It keeps :class:`Sums`; the same :meth:`metrics` make the numbers and, of contexts that are drawn again, their
    standard errors.
    """

    n_bootstrap: int = N_BOOTSTRAP
    """Resamples for standard errors; 0: none are made."""
    measures: Mapping[str, Measure] = MappingProxyType({})
    """What the numbers mean, by name, as far as there is something to say: comparisons read it."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it asks for."""

    def start(self, sae: SAEModule, sites: Sites) -> Sums:
        """Sums of nothing, for one SAE."""
        return Sums()

    @abstractmethod
    def update(self, sums: Sums, seen: Seen) -> None:
        """Take in one batch of contexts."""

    def merge(self, one: Sums, other: Sums) -> Sums:
        """The sums of both parts, which are of different contexts."""
        return one.merged(other)

    @abstractmethod
    def metrics(self, totals: Totals) -> Mapping[str, Any]:
        """Numbers by name, each an array ``[r]`` as those of ``totals`` are."""

    def counted(self, sums: Sums) -> dict[str, Any]:
        """What else :class:`Evaluation` has of it, by the names of its fields: values that have no error, histograms,
        numbers of each feature."""
        return {}

    def remarks(self, values: Mapping[str, float]) -> tuple[str, ...]:
        """What looks wrong with the numbers, in words."""
        return ()

    def result(self, sums: Sums) -> Evaluation:
        """What the sums say."""
        found = finished(sums, self.metrics, self.n_bootstrap, **self.counted(sums))
        remarks = (*found.remarks, *self.remarks(found.values))
        return attrs.evolve(found, remarks=remarks, measures=self.measures)

    def __call__(self, sae: SAEModule, *, backend: ModelBackend, sites: Sites, contexts: Tensor) -> dict[str, float]:
        """Numbers by name, with the standard error of each as ``NAME_se``: the engine runs with this eval alone.

        The tokens that count are those that the SAE says.
        """
        from saekit.evals.engine import measure
        from saekit.evals.measured import Measured

        (states,) = measure([Measured.of(sae, sites, {"this": self}, backend)], backend=backend, contexts=contexts)
        return self.result(states["this"]).numbers()


def finished(
    sums: Sums,
    metrics: Any,
    n_bootstrap: int = N_BOOTSTRAP,
    *,
    values: Mapping[str, float] | None = None,
    remarks: Sequence[str] = (),
    **more: Any,
) -> Evaluation:
    """The :class:`Evaluation` of ``sums`` by the function ``metrics`` of their totals, with bootstrap errors.

    Errors are over the contexts that have a token that counts, of which there must be two.
    """
    if not len(sums):
        raise ValueError("nothing was measured: there are no contexts")
    contexts = tuple(sums.numbers[sums.counted].tolist())
    with np.errstate(all="ignore"):  # of outputs that are no numbers, of which a remark tells
        found = {name: float(value[0]) for name, value in metrics(sums.totals()).items()}
        portions = [metrics(totals) for totals in sums.resampled(n_bootstrap)] if len(contexts) > 1 else []
    drawn = {name: np.concatenate([portion[name] for portion in portions]) for name in found} if portions else {}
    errors = {name: _error(values) for name, values in drawn.items()}
    alone = (_ALONE,) if n_bootstrap and len(contexts) == 1 else ()
    return Evaluation(
        values=found | dict(values or {}),
        errors=errors,
        resampled=drawn,
        contexts=contexts,
        remarks=(*alone, *remarks),
        **more,
    )


def _error(resampled: Any) -> float:
    """The standard deviation of what is a number."""
    finite = resampled[np.isfinite(resampled)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan")
