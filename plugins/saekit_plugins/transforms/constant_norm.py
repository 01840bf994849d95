"""Input transform ``constant_norm``: each row at the norm ``sqrt(d_in)``, as ``constant_norm_rescale`` of sae-lens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class ConstantNormConfig:
    """``x sqrt(d_in) / ‖x‖`` of each row; no options."""


class ConstantNorm:
    """A row of zeros stays one."""

    row_wise = True
    name_elsewhere = "constant_norm_rescale"

    def read(self, x: Tensor) -> Tensor:
        norm = _norm(x)
        return x * (math.sqrt(x.shape[-1]) / norm.masked_fill(norm == 0, 1))

    def written(self, y: Tensor, x: Tensor) -> Tensor:
        return y * (_norm(x) / math.sqrt(x.shape[-1]))


def _norm(x: Tensor) -> Tensor:
    """``[..., 1]``."""
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return norm


@hookimpl
def saekit_register_input_transforms() -> Iterable[Entry]:
    summary = "each row at the norm sqrt(d_in); stays a part of the SAE"
    yield Entry("constant_norm", ConstantNormConfig, _build, summary=summary)


def _build(config: ConstantNormConfig) -> ConstantNorm:
    return ConstantNorm()
