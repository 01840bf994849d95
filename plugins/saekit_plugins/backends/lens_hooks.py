"""Forwards and hook points of transformer_lens' models, as splices need them.  A helper of plugins, not a plugin."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import attrs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["begins", "exposed"]

_OnTokens: TypeAlias = "Callable[[Tensor | None, int], None]"


@contextmanager
def begins(model: Any, embedding: Any, tell: _OnTokens) -> Iterator[None]:
    """While the context is open, ``tell(tokens, before)`` is called when a forward of ``model`` begins.

    The library calls ``forward`` itself as often as the module, and ``generate`` gives it embeddings: so the function
    is another one for a while, and what ``embedding`` is called with is remembered.
    """
    forwards = vars(model).get("forward")
    if not isinstance(forwards := getattr(forwards, "forwards", None), _Forwards):
        forwards = _Forwards(model, embedding)
    forwards.add(tell)
    try:
        yield
    finally:
        forwards.remove(tell)


class _Forwards:
    """What tells of the forwards of one model, as long as anybody wants to know."""

    def __init__(self, model: Any, embedding: Any) -> None:
        self._model, self._embedding, self._now = model, embedding, threading.local()
        self._told: list[_OnTokens] = []
        self._original = model.forward
        self._signature = inspect.signature(self._original)
        self._before = vars(model).get("forward")
        self._handle: Any = None

    def add(self, tell: _OnTokens) -> None:
        self._told.append(tell)
        if len(self._told) == 1:
            self._handle = self._embedding.register_forward_pre_hook(self._embedded)
            vars(self._model)["forward"] = self._forward()

    def remove(self, tell: _OnTokens) -> None:
        self._told.remove(tell)
        if self._told:
            return
        self._handle.remove()
        if self._before is None:
            del vars(self._model)["forward"]
        else:
            vars(self._model)["forward"] = self._before

    def _forward(self) -> Callable[..., Any]:
        @functools.wraps(self._original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._now.runs = True
            try:
                self._tell(*self._ids(self._signature.bind_partial(*args, **kwargs).arguments))
                return self._original(*args, **kwargs)
            finally:
                self._now.runs = False

        vars(forward)["forwards"] = self
        return forward

    def _tell(self, tokens: Tensor | None, before: int) -> None:
        self._now.known, self._now.before = tokens is not None, before
        for tell in tuple(self._told):
            tell(tokens, before)

    def _ids(self, given: Mapping[str, Any]) -> tuple[Tensor | None, int]:
        """The token ids of a forward, None where they are still to be made of a text, and how many came before."""
        cache = given.get("past_kv_cache")
        before = 0 if cache is None else cache[0].past_keys.shape[1]
        for value in (given.get("input"), given.get("tokens")):
            if _is_ids(value):
                return value[None] if value.ndim == 1 else value, before
        embeddings: Any = given.get("input")
        seen: Any = getattr(self._now, "seen", None)
        if hasattr(embeddings, "ndim") and given.get("start_at_layer") == 0 and seen is not None:
            batch, length = embeddings.shape[:2]
            if seen.shape[0] == batch and seen.shape[1] >= length:
                return seen[:, -length:], before
        return None, before

    def _embedded(self, module: Any, args: tuple[Any, ...]) -> None:
        """``embedding`` is called: in a forward, or by ``generate``, which goes on with one token after the other."""
        tokens = args[0]
        if getattr(self._now, "runs", False):
            if not self._now.known:
                self._tell(tokens, self._now.before)
            return
        import torch

        seen: Any = getattr(self._now, "seen", None)
        goes_on = seen is not None and tokens.shape[1] == 1 and len(seen) == len(tokens)
        self._now.seen = torch.cat([seen, tokens], dim=1) if goes_on else tokens


def _is_ids(value: Any) -> TypeGuard[Tensor]:
    return hasattr(value, "ndim") and not value.is_floating_point()


@attrs.frozen(eq=False)
class _Exposed:
    """A hook point of transformer_lens'."""

    point: Any

    @property
    def is_hooked(self) -> bool:
        point = self.point
        return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)

    def __call__(self, value: Tensor) -> Tensor:
        passed: Tensor = self.point(value)
        return passed


@contextmanager
def exposed(model: Any, names: Collection[str]) -> Iterator[Mapping[str, _Exposed]]:
    """See :class:`saekit.abilities.ExposesHooks`; the innermost of several contexts has a name."""
    from transformer_lens.hook_points import HookPoint

    made: dict[str, Any] = {}
    for name in names:
        made[name] = point = HookPoint()
        point.name = name
        vars(point)["below"] = model.hook_dict.get(name)  # of another splice, which is the outer one
        model.mod_dict[name] = model.hook_dict[name] = point
    try:
        yield {name: _Exposed(point) for name, point in made.items()}
    finally:
        for name, point in made.items():
            _take_out(model, name, point)


def _take_out(model: Any, name: str, point: Any) -> None:
    """Of the points of one name, which lie one on the other, the one that is ``point``, wherever it lies."""
    top, below = model.hook_dict.get(name), vars(point)["below"]
    if top is not point:
        while top is not None and vars(top).get("below") is not point:
            top = vars(top).get("below")
        if top is not None:
            vars(top)["below"] = below
        return
    for places in (model.mod_dict, model.hook_dict):
        if below is None:
            del places[name]
        else:
            places[name] = below
