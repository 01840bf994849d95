"""How much memory work needs while it lasts, found out by watching its tensors come and go.

Nothing is allocated for it where they are on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from saekit.data.cache.read import available_memory

__all__ = ["free_memory", "peak_bytes", "resident", "resident_peak"]

_T = TypeVar("_T")
_STATUS = Path("/proc/self/status")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``work`` take at one time; what was there before does not count.

    It sees what each function of torch returns, not what one allocates within itself.
    """
    watch = _Watch()
    with watch:
        work()
    return watch.peak


def free_memory(devices: Sequence[str]) -> dict[str, float]:
    """Bytes that are free on each of ``devices``; those of which it cannot be found out are left out."""
    found: dict[str, float] = {}
    for device in devices:
        kind = torch.device(device).type
        if kind == "cpu":
            found[device] = available_memory()
        elif kind == "cuda" and torch.cuda.is_available():
            found[device] = torch.cuda.mem_get_info(device)[0]
        elif kind == "mps" and torch.backends.mps.is_available():
            found[device] = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return found


def resident() -> float | None:
    """Bytes of memory that the process has now; None where the system does not tell."""
    return _told("VmRSS")


def resident_peak(work: Callable[[], _T]) -> tuple[_T, float | None]:
    """What ``work`` gives, and the most bytes that the process had meanwhile; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from now on
    except OSError:
        return work(), None
    return work(), _told("VmHWM")


def _told(field: str) -> float | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return next((1024.0 * int(size) for size in sizes), None)


class _Watch(TorchFunctionMode):
    """Counts the memory of what functions return, once, until nobody has it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            self._know(tensor, counts=False)  # made before, or it would be known
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._know(tensor, counts=True)
        return result

    def _know(self, tensor: Tensor, *, counts: bool) -> None:
        memory = tensor.untyped_storage()
        if memory in self._known:
            return
        size = memory.nbytes() if counts else 0
        self._known[memory] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        if size:
            weakref.finalize(memory, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
