"""A parameter as an optimizer has it: in the order of its memory, and, where others have the same one, a part of it.

Of processes that each have the whole of a large parameter, every one keeps the moments of a part and updates that,
and is sent the others (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
section 5.1).  So gradients need be added up only where they are used, and what is sent is as much as for a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saekit.distributed.group import ONE, Group
from saekit.distributed.sizes import LARGE
from saekit.kernels.workspace import SHARED
from saekit.sae.parameters import Parameter

__all__ = ["Shown", "lies_by_features"]


class Shown:
    """One parameter, and what of it is the optimizer's."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        entry: Parameter | None,
        rows: Group = ONE,
        large: int | None = None,
    ) -> None:
        """``entry`` is that of the table; ``rows`` are the processes that have the same parameter, which is divided if
        it has so many numbers or more as ``large`` says; None: as many as are worth it."""
        self.name, self.parameter = name, parameter
        # Fused kernels copy what is not contiguous.  A matrix whose transpose is shows the optimizer that instead.
        self.turned = _is_turned(parameter)
        self.split = entry is not None and entry.split is not None
        enough = entry is not None and parameter.numel() >= (LARGE if large is None else large)
        has_parts = enough and entry is not None and _has_parts(parameter, entry, rows)
        self._rows = rows if has_parts else ONE
        alone = self._rows.size == 1 and not self.turned
        self.own: nn.Parameter = parameter if alone else nn.Parameter(self.of(parameter.detach()))
        """What the optimizer updates."""

    @property
    def parted(self) -> bool:
        """Whether it is a part, and other processes have the others."""
        return self._rows.size > 1

    def _in_memory(self, value: Tensor) -> Tensor:
        return value.T if self.turned else value

    def of(self, value: Tensor) -> Tensor:
        """What the optimizer has of ``value``, which is of the parameter's shape."""
        value = self._in_memory(value)
        own = len(value) // self._rows.size if self.parted else 0
        return value.narrow(0, self._rows.rank * own, own) if self.parted else value

    def kept(self, value: Any) -> Any:
        """What the optimizer keeps of ``own``, turned as the parameter is where it has that shape."""
        return value.T if self.turned and isinstance(value, Tensor) and value.shape == self.own.shape else value

    def divides(self, value: Any) -> bool:
        """Whether ``value``, which the optimizer keeps of ``own``, is divided as that: of its shape, or plain."""
        if isinstance(value, Tensor):
            return not value.ndim or value.shape == self.own.shape
        return value is None or isinstance(value, (bool, int, float, str))

    # ---- a step

    def sum_gradient(self) -> None:
        """Add up the parameter's gradient over the processes, as far as the optimizer needs it."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        if not (shown := self._in_memory(gradient)).is_contiguous():  # which it may be in this process alone
            shown = shown.contiguous()
            self.parameter.grad = gradient = self._in_memory(shown)
        with SHARED.lent() as workspace:
            others = gradient.numel() - gradient.numel() // self._rows.size
            self._rows.sum_parts_(shown, workspace.between_steps(others, gradient.dtype, gradient.device))

    def show_gradient(self) -> Tensor | None:
        """Give the optimizer its part of the gradient; the memory that can be used again after the step."""
        parameter, own = self.parameter, self.own
        whole = parameter.grad
        if own is not parameter:
            if own.data_ptr() != self.of(parameter.detach()).data_ptr():  # somebody gave the parameter other memory
                if not (shown := self._in_memory(parameter.data)).is_contiguous():
                    parameter.data = self._in_memory(shown.contiguous())
                own.data = self.of(parameter.detach())
            own.grad = None if whole is None else self.of(whole)
            parameter.grad = None
        if own.grad is not None and own.grad.stride() != own.stride():
            own.grad = torch.empty_like(own).copy_(own.grad)  # fused kernels go by memory alone
        return whole if self.parted else own.grad

    def spread(self) -> None:
        """Have the others' parts, after an update."""
        if self.parted and self.own.grad is not None:
            self._rows.spread_parts_(self._in_memory(self.parameter.detach()))


def lies_by_features(parameter: Tensor, entry: Parameter) -> bool:
    """Whether the features of ``parameter``, whose entry of the table this is, lie one after the other in memory."""
    turned = _is_turned(parameter)
    value = parameter.T if turned else parameter
    return value.is_contiguous() and entry.dims.index("d_sae") == (1 if turned else 0)


def _is_turned(parameter: Tensor) -> bool:
    return parameter.dim() == 2 and parameter.T.is_contiguous() and not parameter.is_contiguous()


def _has_parts(parameter: Tensor, entry: Parameter, rows: Group) -> bool:
    """Whether each of ``rows`` can have some features of a parameter.

    Rows of norm 1 must be whole in it, for what is done to their gradients.
    """
    if rows.size == 1 or entry.split != "d_sae" or not lies_by_features(parameter, entry):
        return False
    size = parameter.shape[entry.dims.index("d_sae")]
    return not size % rows.size and not (_is_turned(parameter) and entry.unit_rows)
