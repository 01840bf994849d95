"""Named places inside an SAE where a tensor can be looked at or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.values import Ports

__all__ = ["HookFunction", "HookPoint", "Hooked", "Watch"]

_NAMES = ("input", "acts_pre", "acts_post", "recons", "error", "output")
_BEFORE_THE_ERROR = _NAMES[:4]

HookFunction: TypeAlias = "Callable[[Tensor, HookPoint], Tensor | None]"


@attrs.frozen(eq=False)
class Watch:
    """Who looks at an SAE from outside while it is called, beside its own hooks: see :meth:`Hooked.watched`."""

    points: frozenset[str]
    """Those of ``input``, ``acts_pre``, ``acts_post``, ``recons``, ``error``, ``output`` that it wants to see."""
    function: Callable[[str, Tensor], Tensor]
    """Takes the name of one of these and what passes there, and returns what the SAE goes on with."""


_NOW: ContextVar[Mapping[int, Watch | None]] = ContextVar("saekit_watched", default=MappingProxyType({}))
"""By the ``id`` of a module who watches it; None: its own hooks are off, too."""
_ALONE = Watch(frozenset(), lambda name, x: x)


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

    if TYPE_CHECKING:  # of the module itself
        ports: Ports
        hook_sae_input: HookPoint
        hook_sae_acts_pre: HookPoint
        hook_sae_acts_post: HookPoint
        hook_sae_recons: HookPoint
        hook_sae_error: HookPoint
        hook_sae_output: HookPoint

        # torch says nothing of what calling it gives.
        def __call__(self, x: Tensor, *, use_error_term: bool | None = None, of: Tensor | None = None) -> Tensor: ...
        def _reconstructed(self, x: Tensor) -> Tensor: ...

    hook_points: ClassVar[tuple[str, ...]] = _NAMES
    """The names of those that run, as far as the architecture decides it."""

    def add_hook_points(self) -> None:
        """The six, with no hook."""
        for name in _NAMES:
            self.add_module(f"hook_sae_{name}", HookPoint(f"hook_sae_{name}"))

    def _hooked(self, *names: str) -> bool:
        watch = self._watch()
        if watch is None:
            return False
        return any(name in watch.points or self._point(name).hooked for name in names)

    def refuse_hooks(self, name: str, why: str) -> None:
        """:class:`ConfigError` says ``why`` where a hook is at ``hook_sae_{name}``, which would never run."""
        if self._hooked(name):
            raise ConfigError(f"a hook is at hook_sae_{name}, and {why}; remove it")

    def _point(self, name: str) -> HookPoint:
        return self._modules[f"hook_sae_{name}"]  # type: ignore[return-value]

    def run_hook(self, name: str, x: Tensor) -> Tensor:
        """``x`` as the hooks at ``hook_sae_{name}`` leave it, and then who watches."""
        watch = self._watch()
        if watch is None:
            return x
        point = self._point(name)
        x = point(x) if point.hooked else x
        if name not in watch.points:
            return x
        with self._seen_by(_ALONE):  # what watches may call the SAE, which is then nobody's but its own
            return watch.function(name, x)

    def _watch(self) -> Watch | None:
        if torch.compiler.is_compiling():  # nobody watches a loss
            return _ALONE
        return _NOW.get().get(id(self), _ALONE)

    def watched(self, watch: Watch) -> AbstractContextManager[None]:
        """While the context is open, and in this thread alone, ``watch`` sees every call of this SAE.

        Its own hooks run before, at each point.  The innermost of several contexts counts.
        """
        return self._seen_by(watch)

    def _without_hooks(self) -> AbstractContextManager[None]:
        return self._seen_by(None)

    @torch.no_grad()
    def missing(self, x: Tensor, output: Tensor, of: Tensor | None) -> Tensor:
        """The error term ``[..., d_out]``: ``of``, or ``x`` where it is None, less the reconstruction of ``x``.

        That is ``output [..., d_out]``, unless hooks may have changed it: then it is made once more without any hook,
        so that what hooks change is not taken back by the error.  No gradient flows through the reconstruction.
        """
        if of is None and not self.ports.same:
            raise ValueError("use_error_term is for what reads and writes the same sites, unless its targets are given")
        if self._hooked(*_BEFORE_THE_ERROR):
            with self._without_hooks():
                output = self._reconstructed(x)
        return (x if of is None else of) - output.detach()

    @contextmanager
    def _seen_by(self, watch: Watch | None) -> Iterator[None]:
        token = _NOW.set({**_NOW.get(), id(self): watch})
        try:
            yield
        finally:
            _NOW.reset(token)
