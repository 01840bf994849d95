"""What ``torch.compile`` leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["leave_out", "not_compiled"]

_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(function: _F) -> _F:
    """A method that is left as it is where :func:`leave_out` is told of its class.

    ``torch.compiler.disable`` does that then: it imports the compiler, which takes a second and 85 MB.
    """
    function.__dict__["left_as_it_is"] = True
    return function


def leave_out(kind: type) -> None:
    """Have the compiler pass over what is marked in a class and those that it derives from."""
    import torch

    for base in kind.__mro__:
        for name, function in list(vars(base).items()):
            if getattr(function, "left_as_it_is", False):
                passed_over = torch.compiler.disable(function)
                passed_over.__dict__["left_as_it_is"] = False
                setattr(base, name, passed_over)
