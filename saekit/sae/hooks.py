"""Named places inside an SAE where a tensor can be looked at or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saekit.errors import ConfigError

__all__ = ["HookFunction", "HookPoint", "Hooked"]

_NAMES = ("input", "acts_pre", "acts_post", "recons", "error", "output")

HookFunction: TypeAlias = "Callable[[Tensor, HookPoint], Tensor | None]"


@attrs.frozen(eq=False)
class _Run:
    """A hook as torch calls it.  It knows no hook point, so that a copy's hooks are told of the copy's."""

    function: HookFunction

    def __call__(self, module: HookPoint, args: Any, output: Tensor) -> Tensor | None:
        return self.function(output, module)


class HookPoint(nn.Module):
    """Passes a tensor on.  A hook ``fn(tensor, hook)`` sees it, and replaces it by returning another one.

    A point without hooks costs one look at an empty dictionary (see :meth:`saekit.sae.SAEModule.run_hook`).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself; torch runs the hooks."""
        return x

    def add_hook(self, function: HookFunction) -> RemovableHandle:
        """Run ``function`` from now on, until ``.remove()`` is called on what is returned.

        A copy of the SAE has its hooks, too, and so has a pickle if ``function`` can be pickled.
        """
        return self.register_forward_hook(_Run(function))

    @property
    def hooked(self) -> bool:
        """Whether any hook is there."""
        return bool(self._forward_hooks)


class Hooked(nn.Module):
    """What has the six hook points, ``hook_sae_{name}`` each."""

    _hooks_off = False

    def add_hook_points(self) -> None:
        """The six, with no hook."""
        for name in _NAMES:
            self.add_module(f"hook_sae_{name}", HookPoint(f"hook_sae_{name}"))

    def _hooked(self, *names: str) -> bool:
        return not self._hooks_off and any(self._point(name).hooked for name in names)

    def refuse_hooks(self, name: str, why: str) -> None:
        """:class:`ConfigError` says ``why`` where a hook is at ``hook_sae_{name}``, which would never run."""
        if self._hooked(name):
            raise ConfigError(f"a hook is at hook_sae_{name}, and {why}; remove it")

    def _point(self, name: str) -> HookPoint:
        return self._modules[f"hook_sae_{name}"]  # type: ignore[return-value]

    def run_hook(self, name: str, x: Tensor) -> Tensor:
        """``x`` as the hooks at ``hook_sae_{name}`` leave it."""
        point = self._point(name)
        return point(x) if point.hooked and not self._hooks_off else x

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        self._hooks_off = True
        try:
            yield
        finally:
            self._hooks_off = False
