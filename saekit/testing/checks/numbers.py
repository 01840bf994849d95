"""Comparing what was computed with what should have been."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saekit.testing.checks.check import must

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SMALL = 1e-2  # below that, last digits are those of what was subtracted

__all__ = ["is_number", "must_agree", "must_be_equal", "seeded"]


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own, as everything that draws has."""
    import torch

    return torch.Generator().manual_seed(seed)


def is_number(value: object) -> bool:
    """Whether it is a plain number: no text, no truth value and no tensor."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def must_agree(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """``what`` is ``expected`` but for ``tolerance`` of the largest number; its shape, and what is no number, too."""
    must(
        found.shape == expected.shape,
        f"{what}: found the shape {list(found.shape)}, expected {list(expected.shape)}",
    )
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.equal(expected):
        return
    finite = expected.isfinite()
    must(
        bool(((found == expected) | finite | (found.isnan() & expected.isnan())).all())
        and bool(found[finite].isfinite().all()),
        f"{what}: numbers that are not finite are not where they were expected",
    )
    if bool(finite.any()):
        off = float((found - expected)[finite].abs().max())
        size = max(float(expected[finite].abs().max()), _SMALL)
        must(off <= tolerance * size, f"{what}: off by {off / size:.2g} of the largest number, expected {tolerance:g}")


def must_be_equal(what: str, found: Any, expected: Any) -> None:
    """Both are the same to the last bit; they may be mappings and lists of tensors, numbers and texts."""
    import torch

    if isinstance(expected, torch.Tensor):
        fine = isinstance(found, torch.Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
        must(
            fine and torch.equal(torch.nan_to_num(found, nan=1e30), torch.nan_to_num(expected, nan=1e30)),
            f"{what}: other numbers, or another type or shape, than expected",
        )
    elif isinstance(expected, Mapping):
        must(
            isinstance(found, Mapping) and list(map(str, found)) == list(map(str, expected)),
            f"{what}: found {_names(found)}, expected {_names(expected)}",
        )
        for name, value in expected.items():
            must_be_equal(f"{what}, {name}", found[name], value)
    elif isinstance(expected, (list, tuple)):
        must(
            isinstance(found, (list, tuple)) and len(found) == len(expected),
            f"{what}: found {found!r:.80}, expected {expected!r:.80}",
        )
        for index, value in enumerate(expected):
            must_be_equal(f"{what}, {index}", found[index], value)
    else:
        same = found == expected or (found != found and expected != expected)
        must(same, f"{what}: found {found!r:.80}, expected {expected!r:.80}")


def _names(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else f"{value!r:.80}"
