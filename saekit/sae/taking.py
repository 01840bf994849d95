"""Weights that were read, as a module holds them: each in its layout and type, and on its device."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from saekit.files.mapped import give_back, pieces
from saekit.sae.module import SAEModule
from saekit.sae.parameters import ParameterTable, to_take

__all__ = ["fill", "take_over"]


@torch.no_grad()
def take_over(sae: SAEModule, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Make ``tensors`` the weights of ``sae``, whose parameters are those of ``dtype`` and on ``device`` from then on.

    ``tensors`` is emptied meanwhile, so that no more than one of them is in memory twice.  :class:`SAEFormatError` as
    :meth:`saekit.sae.SAEModule.load_public_tensors` raises it.
    """
    laid = _laid_out(sae.table, tensors, dtype, device)
    with to_take(laid):
        sae.load_public_tensors(laid)


def _laid_out(
    table: ParameterTable, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """``tensors`` as parameters of the table hold them, in new memory; others as they are."""
    owners = Counter(value.untyped_storage().data_ptr() for value in tensors.values())
    shapes = {entry.name: entry.shape(table.sizes) for entry in table}
    found = {}
    for name in list(tensors):
        value = tensors.pop(name).detach()
        if tuple(value.shape) == shapes.get(name):
            alone = owners[value.untyped_storage().data_ptr()] == 1
            memory = table[name].unwritten(shapes[name], dtype, device)
            fill(memory, value, alone=alone)
            value = memory
        found[name] = value
    return found


def fill(memory: Tensor, values: Tensor, *, alone: bool) -> None:
    """Copy ``values`` into ``memory``, which may lie the other way, be of another type and on another device.

    In pieces, so that nothing is in memory twice.  ``alone``: nobody else needs ``values``.
    """
    turned: Tensor | None = None
    for along, start, piece in pieces(values):
        here = memory if values.ndim == 0 else memory.narrow(along, start, piece.shape[along])
        ready = piece.to(memory.dtype)  # before it goes to a device, which may not have the other type
        if _by_columns(here) != _by_columns(ready):
            here, ready = (here.T, ready.T) if _by_columns(here) else (here, ready)
            if turned is None or turned.shape != ready.shape:  # fresh memory for each would cost more than to turn it
                turned = torch.empty(ready.shape, dtype=ready.dtype, device="cpu")
            ready = turned.copy_(ready)  # torch is fast at turning what is whole, and slow else
        here.copy_(ready)
        if alone:
            give_back(piece)


def _by_columns(values: Tensor) -> bool:
    """Whether it is a matrix whose columns lie together in memory."""
    return values.ndim == 2 and values.stride(0) == 1 and values.stride(1) > 1
