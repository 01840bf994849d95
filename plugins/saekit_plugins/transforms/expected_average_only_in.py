"""Input transform ``expected_average_only_in``: one factor for all activations of a site.

Anthropic, April 2024 update, "Circuits Updates".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class ExpectedAverageConfig:
    """Activations have a mean norm of ``sqrt(d_in)``; no options."""


class ExpectedAverage:
    """The factor is folded into the weights."""

    row_wise = False

    def estimated(self, rows: Tensor) -> float:
        from saekit.data import activation_scale

        return activation_scale(rows)


@hookimpl
def saekit_register_input_transforms() -> Iterable[Entry]:
    summary = "times a factor, so that their mean norm is sqrt(d_in); folded into the weights"
    yield Entry("expected_average_only_in", ExpectedAverageConfig, _build, summary=summary)


def _build(config: ExpectedAverageConfig) -> ExpectedAverage:
    return ExpectedAverage()
