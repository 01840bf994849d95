"""In which order the layers of a model of transformers run, and how some are passed over.

A helper of the backend's plugin, not a plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

__all__ = ["LayerOrder", "observed"]


@attrs.frozen(eq=False)
class LayerOrder:
    """A stack of layers, each of which takes what the one before it returns, and when every hook is met."""

    path: str
    """Of the module list."""
    stack: nn.ModuleList
    rests: tuple[tuple[object, ...] | None, ...]
    """What each layer returns after its hidden states, of those that return a tuple."""
    met: dict[str, int]
    """By the name of a hook: when a forward meets it first."""

    def entry_of(self, hooks: Collection[str]) -> str | None:
        """The last input or output of a layer that is not met after any of ``hooks``."""
        ends = [name for index in range(len(self.stack)) for name in self._ends(index)]
        if any(name not in self.met for name in hooks):
            return None
        first = min((self.met[name] for name in hooks), default=self.met[ends[-1]])
        return next((name for name in reversed(ends) if self.met[name] <= first), None)

    def _ends(self, index: int) -> tuple[str, str]:
        return f"{self.path}.{index}.input", f"{self.path}.{index}"

    @contextmanager
    def begun_at(self, entry: str, end: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
        """While the context is open, a forward passes over all layers before the hook ``entry``.

        Where ``entry`` is the output of a layer, that layer is passed over, too.  Its hook still sees what passes:
        ``end``, if given, is called with it, and what ``end`` returns goes on.
        """
        index = int(entry.removesuffix(".input").rpartition(".")[2])
        with ExitStack() as undo:
            for number in range(index if entry.endswith(".input") else index + 1):
                layer = self.stack[number]
                restore = partial(self.stack.__setitem__, number, layer)
                at_end = end if number == index else None
                self.stack[number] = _Passed(layer, self.rests[number], restore, at_end)
                undo.callback(restore)
            yield


class _Passed(nn.Module):
    """In the place of ``layer``: returns the hidden states that it is given, in the form of what the layer returns.

    Then it puts the layer back, so that forwards inside this one are whole.
    """

    def __init__(
        self,
        layer: nn.Module,
        rest: tuple[object, ...] | None,
        restore: Callable[[], None],
        end: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        vars(self).update(_layer=layer, _rest=rest, _restore=restore, _end=end)  # the layer is no module of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _first_tensor((*args, *kwargs.values()))
        self._restore()
        hidden = hidden if self._end is None else self._end(hidden)
        return hidden if self._rest is None else (hidden, *self._rest)

    def __getattr__(self, name: str) -> Any:
        """What models ask of their layers, such as which attention they have."""
        return getattr(vars(self)["_layer"], name)


def observed(model: nn.Module, layers: int, run: Callable[[], object]) -> LayerOrder | None:
    """The one stack of ``layers`` layers of ``model`` as ``run``, a forward of it, shows it.

    None where there are several or none, or where the layers do not run one after the other.
    """
    lists = [(path, one) for path, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    stacks = [(path, one) for path, one in lists if len(one) == layers]
    calls: dict[nn.Module, list[Any]] = {layer: [] for _, stack in stacks for layer in stack}
    met: dict[str, int] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        met.setdefault(f"{name}.input", len(met))
        if module in calls:
            calls[module].append(_first_tensor((*args, *kwargs.values())))

    def after(name: str, module: nn.Module, args: Any, out: Any) -> None:
        met.setdefault(name, len(met))
        if module in calls:
            calls[module].append(out)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name:
                undo.callback(module.register_forward_pre_hook(partial(before, name), with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(partial(after, name)).remove)
        run()
    found = []
    for path, stack in stacks:
        rests = _rests([calls[layer] for layer in stack])
        if rests is not None:
            found.append(LayerOrder(path, stack, rests, met))
    return found[0] if len(found) == 1 else None


def _rests(calls: list[list[Any]]) -> tuple[tuple[object, ...] | None, ...] | None:
    """What layers return beside hidden states, by what each took and returned; None where they are no chain."""
    rests: list[tuple[object, ...] | None] = []
    before: Tensor | None = None
    for call in calls:
        if len(call) != 2:  # it ran more than once, or not at all
            return None
        given, out = call
        hidden, *rest = out if type(out) is tuple and out else (out,)
        if not isinstance(given, Tensor) or not isinstance(hidden, Tensor) or hidden.shape != given.shape:
            return None
        if _first_tensor(rest) is not None or (before is not None and not torch.equal(before, given)):
            return None
        rests.append(tuple(rest) if type(out) is tuple else None)
        before = hidden
    return tuple(rests)


def _first_tensor(parts: Any) -> Tensor | None:
    for part in parts:
        if isinstance(part, Tensor):
            return part
        if isinstance(part, dict | list | tuple):
            found = _first_tensor(part.values() if isinstance(part, dict) else part)
            if found is not None:
                return found
    return None
