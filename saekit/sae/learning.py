"""What of a module learns, and what is done around each update."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saekit.plugins.text import short
from saekit.values import StepOutput

if TYPE_CHECKING:
    from saekit.sae.parameters import ParameterTable

__all__ = ["Learning", "learned_from"]


def learned_from(found: object) -> StepOutput:
    """What ``losses`` has ``found``, with the gradients of its loss made; TypeError where there cannot be any."""
    if not isinstance(found, StepOutput):
        seen = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else short(found)
        raise TypeError(f"losses returned {seen}, expected a saekit.StepOutput")
    loss = found.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        seen = short(loss) if not isinstance(loss, Tensor) else f"a tensor {list(loss.shape)}"
        why = ", which depends on no parameter (.item() and .detach() cut that off)" if seen.endswith("[]") else ""
        raise TypeError(f"losses returned loss={seen}{why}, expected a tensor of one number with a gradient")
    loss.backward()
    return found


class Learning(nn.Module):
    """What :class:`saekit.sae.SAEModule` has of it."""

    if TYPE_CHECKING:  # of the module itself

        @property
        def table(self) -> ParameterTable: ...

    @torch.no_grad()
    def before_update(self) -> None:
        """Between gradient and update: remove what rows of norm 1 cannot follow."""
        self.table.project(self)

    @torch.no_grad()
    def after_update(self) -> None:
        """After an update: rows that have norm 1 back to it."""
        self.table.renormalize(self)

    def add_scaling_factor(self) -> None:
        """Multiply features by a factor of their own before they are decoded, at first 1."""
        self.add_factors_for("scale")

    def add_factors_for(self, method: str) -> None:
        """Add the factors that fine-tuning by ``method`` trains, at first 1; until then they do not learn."""
        for entry in self.table:
            if entry.optional and method in entry.groups:
                self.table.add_optional(self, entry.name)

    def learn_only(self, names: Collection[str]) -> None:
        """From now on train these parameters and leave the others as they are."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
