"""Input transform ``rms``: each row in units of its root mean square (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl
from saekit.config import check

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class RMSConfig:
    """``x / sqrt(mean(x²) + eps)`` of each row."""

    eps: float = attrs.field(default=1e-6, validator=check(lambda value: value > 0, "above 0"))
    """What is added to the mean square, as in the norms of language models: rows far below its root stay small."""


@attrs.frozen
class RMS:
    """See the module."""

    eps: float
    row_wise = True

    def read(self, x: Tensor) -> Tensor:
        return x / self._root(x)

    def written(self, y: Tensor, x: Tensor) -> Tensor:
        return y * self._root(x)

    def _root(self, x: Tensor) -> Tensor:
        """``[..., 1]``."""
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


@hookimpl
def saekit_register_input_transforms() -> Iterable[Entry]:
    summary = "each row by its root mean square; stays a part of the SAE"
    yield Entry("rms", RMSConfig, _build, summary=summary)


def _build(config: RMSConfig) -> RMS:
    return RMS(config.eps)
