"""How torch makes products of float32 numbers, which is one choice for a whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import RLock
from typing import TYPE_CHECKING, Literal, TypeAlias

from saekit.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Precision", "changes_products", "check_precision", "current_precision", "in_words", "products"]

Precision: TypeAlias = Literal["highest", "high", "medium"]
"""As in ``torch.set_float32_matmul_precision``."""

_ONE_AT_A_TIME = RLock()  # of those that have no turns: what one sets, another would take for what was there before
_OPTION = "training.matmul_precision"
_SHORT = {"high": "TF32", "medium": "bfloat16"}


def current_precision() -> str:
    """What torch does now: ``highest``, ``high`` or ``medium``; of settings of its newer kind that of CUDA."""
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody has set one device by itself
        return {"tf32": "high", "bf16": "medium"}.get(torch.backends.cuda.matmul.fp32_precision, "highest")


@contextmanager
def products(precision: Precision | None, turns: AbstractContextManager[object] | None = None) -> Iterator[None]:
    """Products of float32 numbers in ``precision``, and afterwards as before; None: as they are.

    ``turns`` is held meanwhile by whoever else may multiply in another thread, such as the language model.  Without,
    threads that choose a precision wait for each other.
    """
    if precision is None:
        yield
        return
    import torch

    with _ONE_AT_A_TIME if turns is None else turns:
        each = [
            backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(backend, "matmul")
        ]
        found = [getattr(one, "fp32_precision", None) for one in each]  # of torch 2.9 and later
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            before = "highest"
        try:
            torch.set_float32_matmul_precision(precision)
            yield
        finally:
            torch.set_float32_matmul_precision(before)
            for one, value in zip(each, found, strict=True):
                if value is not None:
                    one.fp32_precision = "none"  # it follows torch.backends.fp32_precision, as it did if that is it
                    if one.fp32_precision != value:
                        one.fp32_precision = value


def check_precision(precision: Precision | None, device: torch.device, why_other: str | None) -> None:
    """:class:`ConfigError` where it would change nothing: ``why_other``, in words, or this device cannot."""
    if precision is None:
        return
    if why_other is None and (precision == "highest" or changes_products(precision, device.type)):
        return
    why = why_other or (
        f"float32 products come out the same with it on this {device.type.upper()}, which has none in "
        f"{_SHORT[precision]}"
    )
    raise ConfigError([(_OPTION, f"is {precision!r}, and {why}. Leave it out")])


def in_words(precision: Precision | None, device: torch.device, *, fast: bool) -> str | None:
    """How steps multiply, by the fast kernels or else by plain torch; None: as torch is set."""
    if precision is None:
        return None
    if precision == "highest":
        return "float32 products in full"
    # torch itself makes TF32 of both on CUDA; the kernels round to bfloat16.
    short = "TF32" if precision == "high" or (device.type == "cuda" and not fast) else "bfloat16"
    return f"float32 products in {short}"


@cache
def changes_products(precision: Precision, device: str) -> bool:
    """Whether products on ``device`` come out differently; that depends on the machine, torch and its libraries."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        left, right = (torch.randn(256, 256, generator=generator, device="cpu").to(device) for _ in range(2))
        with products("highest"):
            exact = left @ right
        with products(precision):
            return not torch.equal(exact, left @ right)
