"""What activations go through before an SAE reads them: what such input transforms promise, and affine maps.

Importing this imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Affine", "InputTransform", "NamedElsewhere", "RowTransform", "WholeTransform"]


class Affine(NamedTuple):
    """``z = (x − mean) matrix``, and back ``x = z inverse + mean``, of rows ``[..., d]``."""

    mean: Tensor
    """``[d]``."""
    matrix: Tensor
    """``[d, d]``."""
    inverse: Tensor
    """``[d, d]``: that of the matrix."""


class InputTransform(Protocol):
    """What activations go through before a dictionary reads them: a :class:`RowTransform` or a
    :class:`WholeTransform`."""

    @property
    def row_wise(self) -> bool:
        """Whether it is a :class:`RowTransform`, which stays a part of the SAE."""


@runtime_checkable
class RowTransform(InputTransform, Protocol):
    """One whose numbers are those of each row alone, so that it cannot be folded into weights.

    It has no memory: what is decoded is brought back by the row that was read, which is given again.
    """

    def read(self, x: Tensor) -> Tensor:
        """``x [..., d]``, the rows of one site, as the encoder reads them: of the same shape and dtype, finite."""

    def written(self, y: Tensor, x: Tensor) -> Tensor:
        """``y [..., d]``, decoded, in the units of the rows ``x`` that were read; affine in ``y``."""


@runtime_checkable
class NamedElsewhere(Protocol):
    """A :class:`RowTransform` that sae-lens has, too."""

    @property
    def name_elsewhere(self) -> str | None:
        """What ``normalize_activations`` of ``cfg.json`` calls exactly this in sae-lens 6; None: it has no such one."""


@runtime_checkable
class WholeTransform(InputTransform, Protocol):
    """One whose numbers are estimated once, before training, and folded into the weights that are saved."""

    def estimated(self, rows: Tensor) -> float | Affine:
        """From raw activations to come, ``[n, d]`` of one site: what each is multiplied by, or the affine map of all.

        :class:`saekit.errors.DataError` for rows of which it cannot be made.
        """
