"""A device that nobody may wait for, without one: torch's ``meta``, where nothing has numbers to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Self

import pytest
import saekit_plugins.optimizers.adam
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import saekit.kernels.private_torch
from saekit import SAE
from saekit.distributed.group import Group
from saekit.kernels import StepKernel

__all__ = ["Alike", "Watch", "WouldWaitError", "as_gpu", "moved"]

aten: Any = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.histc, aten.argwhere,
}  # fmt: skip


class WouldWaitError(AssertionError):
    """On a GPU, this call returns when all before it is done."""


class _Made(TorchFunctionMode):
    """The same for plain numbers that are made a tensor elsewhere: torch copies them there, out of sight of modes that
    see what is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise WouldWaitError(f"{func.__name__} of {args[0]} on {kwargs['device']}")
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """:class:`WouldWaitError` at every call that on a GPU would wait for it; :attr:`sent` counts copies to it."""

    def __init__(self, looks: int = 0) -> None:
        """So many ``looks`` for what is not zero are no error: they are counted in :attr:`looked`, and find all."""
        super().__init__()
        self.sent = self.looked = 0
        self._looks, self._made = looks, _Made()

    def __enter__(self) -> Self:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.nonzero.default and self.looked < self._looks:
            self.looked += 1
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
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


class Alike(Group):
    """Several processes on GPUs, of which the others do the same as this one, the first.

    ``asks``: it can say on the CPU what is the same, as groups that saekit makes can.
    """

    def __init__(self, size: int, *, asks: bool = True) -> None:
        self.size, self._asks = size, asks

    def sum(self, value: Tensor) -> Tensor:
        return value * self.size

    def sum_(self, value: Tensor) -> Tensor:
        return value.mul_(self.size)

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [value * self.size for value in values]

    def same(self, number: int) -> bool | None:
        return True if self._asks else None

    def gather(self, value: Tensor) -> list[Tensor]:
        return [value] * self.size

    def gather_rows(self, value: Tensor, counts: Sequence[int]) -> list[Tensor]:
        return [value] * self.size

    def objects(self, value: Any) -> list[Any]:
        return [value] * self.size


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
