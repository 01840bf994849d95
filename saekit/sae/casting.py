"""Modules whose weights go to other types and devices, and whose running sums keep their digits."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from saekit.devices import widest

__all__ = ["Castable", "copied"]

_Module = TypeVar("_Module", bound=nn.Module)


def copied(sae: _Module) -> _Module:
    """A copy of an SAE, of the same part of the features: what :func:`copy.deepcopy` makes is for one process."""
    share, found = cast("Any", sae).share, copy.deepcopy(sae)
    vars(found).pop("losses", None)  # a compiled one belongs to the SAE that trains
    cast("Any", found).share = share
    return found


class Castable(nn.Module):
    """What :class:`saekit.sae.module.SAEModule` has of it."""

    dtype: Any

    def kept_in_digits(self) -> Collection[Tensor]:
        """The parameters that are never in less than float32."""
        return ()

    @torch.no_grad()
    def cast_weights(self, dtype: torch.dtype) -> None:
        """Keep the parameters in ``dtype`` from now on.

        Training in bfloat16 keeps them in float32, for small updates of large numbers would be lost, and casts them
        when they are measured and saved.  An architecture does before that what would lose digits after it.
        """
        kept = {id(parameter) for parameter in self.kept_in_digits()}
        for parameter in self.parameters():
            wide = torch.promote_types(dtype, torch.float32)
            parameter.data = parameter.data.to(wide if id(parameter) in kept else dtype)

    def as_loaded(self) -> Self:
        """As it is when it is loaded again: itself, or a copy where that is another, by which its probe is made.

        float16 becomes float32, in which other features may be the largest.  An architecture that rounds more than that
        when it saves says so.
        """
        return copied(self).float() if self.dtype == torch.float16 else self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What every ``.to`` goes through.  Buffers in float64, running sums, stay so wherever there is float64, and
        parameters that keep their digits in float32 at least."""
        sums = {id(buffer) for buffer in self.buffers() if buffer.dtype == torch.float64}
        kept = {id(value) for value in self.kept_in_digits()}
        kept |= {id(value.grad) for value in self.kept_in_digits() if value.grad is not None}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) in kept:
                result = fn(tensor)
                wide = torch.promote_types(result.dtype, torch.float32)
                return result if result.dtype == wide else tensor.to(result.device, wide)
            if id(tensor) not in sums:
                return fn(tensor)  # type: ignore[no-any-return]
            try:
                result = fn(tensor)
            except TypeError:  # a device without float64
                return fn(tensor.float())  # type: ignore[no-any-return]
            wide = widest(result.device)
            return result if result.dtype == wide else tensor.to(result.device, wide)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self
