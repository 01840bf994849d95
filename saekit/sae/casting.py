"""Modules whose weights go to other types and devices, and whose running sums keep their digits."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from saekit.devices import widest

__all__ = ["Castable"]


class Castable(nn.Module):
    """What :class:`saekit.sae.SAE` has of it."""

    @torch.no_grad()
    def cast_weights(self, dtype: torch.dtype) -> None:
        """Keep the parameters in ``dtype`` from now on.

        Training in bfloat16 keeps them in float32, for small updates of large numbers would be lost, and casts them
        when they are measured and saved.  An architecture does before that what would lose digits after it.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What every ``.to`` goes through.  Buffers in float64, running sums, stay so wherever there is float64."""
        sums = {id(buffer) for buffer in self.buffers() if buffer.dtype == torch.float64}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in sums:
                result: Tensor = fn(tensor)
                return result
            try:
                result = fn(tensor)
            except TypeError:  # a device without float64
                return fn(tensor.float())  # type: ignore[no-any-return]
            kept = widest(result.device)
            return result if result.dtype == kept else tensor.to(result.device, kept)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self
