"""Forwards and hook points of transformer_lens' models, as splices need them.  A helper of plugins, not a plugin."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ModelError
from saekit.abilities import OnTokens
from saekit.tokens import ids_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["begins", "exposed", "hooked_by_name"]


@contextmanager
def begins(model: Any, embedding: Any, tell: OnTokens) -> Iterator[None]:
    """While the context is open, ``tell(tokens, before)`` is called when a forward of ``model`` begins, and what it
    returns when that has ended.

    The library calls ``forward`` itself as often as the module, and ``generate`` gives it embeddings: so both are other
    functions for a while, and what ``embedding`` is called with is remembered as long as ``generate`` writes.
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
        self._told: list[OnTokens] = []
        self._originals = {name: getattr(model, name) for name in ("forward", "generate") if hasattr(model, name)}
        self._signature = inspect.signature(model.forward)
        self._before: dict[str, Any] = {}
        self._ours: dict[str, Any] = {}
        self._handle: Any = None

    def __deepcopy__(self, memo: object) -> _Forwards:
        raise ModelError(
            f"a {type(self._model).__name__} cannot be copied while a splice of it is open: copy it before or after"
        )

    def add(self, tell: OnTokens) -> None:
        self._told.append(tell)
        if len(self._told) > 1:
            return
        self._handle = self._embedding.register_forward_pre_hook(self._embedded)
        for name, original in self._originals.items():
            around = functools.partial(getattr(self, f"_{name}"), original)
            self._ours[name] = ours = functools.wraps(original)(around)
            vars(ours)["forwards"] = self
            self._before[name], vars(self._model)[name] = vars(self._model).get(name), ours

    def remove(self, tell: OnTokens) -> None:
        self._told.remove(tell)
        if self._told:
            return
        self._handle.remove()
        for name, ours in self._ours.items():
            if vars(self._model).get(name) is not ours:
                continue  # somebody has put another function in its place, and that stays
            if self._before[name] is None:
                del vars(self._model)[name]
            else:
                vars(self._model)[name] = self._before[name]

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as ends, self._as_it_is_now(runs=True, ends=ends):
            self._tell(*self._ids(self._signature.bind_partial(*args, **kwargs).arguments))
            return original(*args, **kwargs)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._as_it_is_now(writes=True, seen=None):
            return original(*args, **kwargs)

    @contextmanager
    def _as_it_is_now(self, **state: Any) -> Iterator[None]:
        """In this thread: whether a forward runs, whether ``generate`` writes, and the tokens that it has embedded."""
        before = {name: getattr(self._now, name, None) for name in state}
        vars(self._now).update(state)
        try:
            yield
        finally:
            vars(self._now).update(before)

    def _tell(self, tokens: Tensor | None, before: int) -> None:
        self._now.known, self._now.before = tokens is not None, before
        for tell in tuple(self._told):
            if (ended := tell(tokens, before)) is not None:
                self._now.ends.callback(ended)

    def _ids(self, given: Mapping[str, Any]) -> tuple[Tensor | None, int]:
        """The token ids of a forward, None where they are still to be made of a text, and how many came before."""
        cache = given.get("past_kv_cache")
        before = 0 if cache is None else cache[0].past_keys.shape[1]
        for value in (given.get("input"), given.get("tokens")):
            if (ids := ids_of(value)) is not None:
                return ids, before
        embeddings: Any = given.get("input")
        seen: Any = getattr(self._now, "seen", None)
        if seen is not None and getattr(self._now, "writes", False) and hasattr(embeddings, "ndim"):
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
        if getattr(self._now, "writes", False):
            import torch

            seen: Any = self._now.seen
            self._now.seen = tokens if seen is None else torch.cat([seen, tokens], dim=1)


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
def exposed(names: Collection[str], *places: dict[str, Any]) -> Iterator[Mapping[str, _Exposed]]:
    """See :class:`saekit.abilities.ExposesHooks`; the innermost of several contexts has a name.

    ``places`` are the dictionaries in which a model's library looks for hook points by name.
    """
    from transformer_lens.hook_points import HookPoint

    made: dict[str, Any] = {}
    for name in names:
        made[name] = point = HookPoint()
        point.name = name
        vars(point)["below"] = places[0].get(name)  # of another splice, which is the outer one
        for place in places:
            place[name] = point
    try:
        yield {name: _Exposed(point) for name, point in made.items()}
    finally:
        for name, point in made.items():
            _take_out(places, name, point)


@contextmanager
def hooked_by_name(model: Any, points: Mapping[str, Any]) -> Iterator[None]:
    """While the context is open, ``model.add_hook(name, ...)`` finds the points that ``exposed`` has added.

    That of a bridge looks for a name among its modules, where these are not.
    """
    before = vars(model).get("add_hook")
    ours = before if isinstance(before, _ByName) else _ByName(model.add_hook, points, before)
    vars(model)["add_hook"] = ours
    ours.contexts += 1
    try:
        yield
    finally:
        ours.contexts -= 1
        if not ours.contexts and vars(model).get("add_hook") is ours:
            del vars(model)["add_hook"]
            if ours.before is not None:
                vars(model)["add_hook"] = ours.before


@attrs.define(eq=False)
class _ByName:
    """``add_hook`` of a model for a while."""

    _add: Callable[..., Any]
    _points: Mapping[str, Any]
    before: Any
    contexts: int = 0

    def __call__(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        point = self._points.get(name) if isinstance(name, str) else None
        if point is None or "below" not in vars(point):  # which is not one of ours
            return self._add(name, *args, **kwargs)
        return point.add_hook(*args, **kwargs)


def _take_out(places: Sequence[dict[str, Any]], name: str, point: Any) -> None:
    """Of the points of one name, which lie one on the other, the one that is ``point``, wherever it lies."""
    top, below = places[0].get(name), vars(point)["below"]
    if top is not point:
        while top is not None and vars(top).get("below") is not point:
            top = vars(top).get("below")
        if top is not None:
            vars(top)["below"] = below
        return
    for place in places:
        if below is None:
            del place[name]
        else:
            place[name] = below
