"""A device that nobody may wait for, without one: torch's ``meta``, where nothing has numbers to look at."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import saekit_plugins.optimizers.adam
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saekit.kernels.private_torch
from saekit import SAE
from saekit.kernels import StepKernel

__all__ = ["Watch", "WouldWaitError", "as_gpu", "moved"]

aten: Any = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.histc, aten.argwhere,
}  # fmt: skip


class WouldWaitError(AssertionError):
    """On a GPU, this call returns when all before it is done."""


class Watch(TorchDispatchMode):
    """:class:`WouldWaitError` at every call that on a GPU would wait for it; :attr:`sent` counts copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _WAITS or self._chooses(func, args):
            raise WouldWaitError(f"{func}")
        if func is aten._embedding_bag_per_sample_weights_backward.default:  # which meta has not
            return args[0].new_empty(len(args[2]))
        if func is aten.segment_reduce.default:
            return args[0].new_empty(len(kwargs["offsets"]) - 1)
        if func is aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            self._copied(func, args[0], kwargs["device"], kwargs.get("non_blocking", False))
        if func is aten.copy_.default and args[0].device != args[1].device:
            self._copied(
                func, args[1], args[0].device, (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False)
            )
        return func(*args, **kwargs)

    def _chooses(self, func: Any, args: Any) -> bool:
        """Whether what comes out has a size that depends on numbers."""
        if func is aten.repeat_interleave.Tensor:
            return True
        indices = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)

    def _copied(self, func: Any, value: Tensor, to: torch.device, non_blocking: bool) -> None:
        if to.type == "cpu" or not non_blocking:
            raise WouldWaitError(f"{func} of {list(value.shape)} from {value.device} to {to}")
        self.sent += 1


def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have kernels and the optimizer take ``meta`` for a GPU."""
    monkeypatch.setattr(StepKernel, "devices", frozenset({"meta"}))
    monkeypatch.setattr(saekit_plugins.optimizers.adam, "KERNEL_DEVICES", ("meta",))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    for name in ("_has_entry_products", "_has_relu_gradient"):  # which are looked at once, on numbers
        monkeypatch.setattr(saekit.kernels.private_torch, name, lambda device, dtype: True)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


def moved(sae: SAE) -> SAE:
    """On ``meta``, with the memory order that it has."""
    for module in sae.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None:
                    other = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                    store[name] = torch.nn.Parameter(other) if isinstance(value, torch.nn.Parameter) else other
    return sae
