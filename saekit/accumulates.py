"""What an eval may have beside that it is called; for :mod:`saekit.abilities`, where these abilities are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from saekit.protocols import Eval

if TYPE_CHECKING:
    from saekit.measuring import Evaluation, Needs, Seen
    from saekit.site import Sites

__all__ = ["Accumulates", "SharesContexts"]


@runtime_checkable
class Accumulates(Eval, Protocol):
    """An eval that sums up what it sees, batch by batch: many of them, of many SAEs, share each forward of the model.

    Its sums may be made in parts, of different contexts, and put together in any order; derive it from
    :class:`saekit.evals.AccumulatingEval`.
    """

    @property
    def needs(self) -> Needs:
        """What it must be shown."""

    def start(self, sae: Any, sites: Sites) -> Any:
        """The sums of nothing, for ``sae``, a :class:`saekit.SAE` at ``sites``."""

    def update(self, sums: Any, seen: Seen) -> None:
        """Take in one batch of contexts."""

    def merge(self, one: Any, other: Any) -> Any:
        """The sums of both parts, which are of different contexts; either stays as it is."""

    def result(self, sums: Any) -> Evaluation:
        """What the sums say: the same numbers in whatever order parts were merged."""


@runtime_checkable
class SharesContexts(Accumulates, Protocol):
    """An eval that accumulates, and of whose contexts each of several processes is shown some: it is dealt out.

    Sums travel as pickles to the first process, which merges them and asks for the result.  Where the SAE's features
    are split over processes, :meth:`start` is given an outline: its options, sites, sizes (``d_sae`` is that of all
    features) and firing fractions, and weights on torch's ``meta`` device, which have no values.  What is shown are
    the features and outputs of the whole SAE all the same.  An eval without this ability is run whole by the first
    process, with the whole SAE.
    """

    shares_contexts: bool
    """True."""
