"""One forward of a language model: what it was asked for, what happens at its hooks, and what it gave."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from saekit.backends.replacing import Replacing, replacements_of
from saekit.errors import ModelError
from saekit.values import Replacement, Want

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hooks", "by_position", "next_token_loss", "put"]


class Hooks:
    """What is to happen at the hooks of one forward.

    A backend calls it with a hook's name and what the hook holds, and goes on with what it returns.
    """

    def __init__(
        self,
        read: Collection[str],
        replace: Mapping[str, Replacing],
        *,
        tokens: Tensor,
        want: Want = "held",
        grad: bool = False,
        start: tuple[str, Tensor] | None = None,
        attached: Sequence[Mapping[str, Replacement]] = (),
    ) -> None:
        """``attached`` are replacements that come before all others, one after the other: reading shows what they
        leave."""
        self.entry = None if start is None else start[0]
        """The hook where the forward begins; None: at the tokens."""
        self._value = None if start is None else start[1]
        self._begun = False
        self.read, self.replace = frozenset(read), replacements_of(replace)
        self.want: Want = want
        self.held: dict[str, Tensor] = {}
        """What was read so far."""
        self.silent = {*self.read, *self.replace}
        """The hooks that nothing was heard of so far."""
        self._tokens, self._grad, self._attached = tokens.shape, grad, attached

    @property
    def names(self) -> list[str]:
        """The hooks at which something happens, each once; first that where the forward begins."""
        entry = set() if self.entry is None else {self.entry}
        return sorted(
            entry.union(self.read, self.replace, *self._attached), key=lambda name: (name != self.entry, name)
        )

    @property
    def given(self) -> Tensor:
        """What the hook :attr:`entry` holds."""
        if self._value is None:
            raise ValueError("this forward begins at the tokens")
        return self._value

    @property
    def done(self) -> bool:
        """Whether nothing is needed of the rest of the forward."""
        return self.want == "held" and len(self.held) == len(self.read)

    def __call__(self, name: str, activation: Tensor) -> Tensor:
        """Read and replace: what the model goes on with after the hook ``name``, of the shape of ``activation``.

        Where the forward begins, ``activation`` does not count: what was given for that hook is there, with what is
        attached to it.
        """
        self.silent.discard(name)
        attached = [one[name] for one in self._attached if name in one]
        if name == self.entry and not self._begun:
            activation, attached, self._begun = self.given, [], True
        if self.done or not (attached or name in self.read or name in self.replace):
            return activation
        value = by_position(activation, self._tokens)
        for one in attached:
            value = put(name, value, one)
        if name in self.read and name not in self.held:
            if value.is_inference():  # a view of weights that were made in inference mode
                value = value.clone()
            if self._grad and not value.requires_grad and value.is_floating_point():
                value.requires_grad_()  # where the weights do not learn, gradients begin here
            # A parameter itself learns without a graph, too.
            self.held[name] = value if self._grad or not value.requires_grad else value.detach()
        if (replacement := self.replace.get(name)) is not None:
            value = put(name, value, replacement)
        return value if value.shape == activation.shape else value.reshape(activation.shape)


def by_position(activation: Tensor, tokens: Sequence[int]) -> Tensor:
    """``[b, t, d]``, where a module has flattened its rows to ``[b * t, d]``; ``tokens`` are ``b`` and ``t``."""
    flat = activation.ndim == 2 and activation.shape[:2] != tuple(tokens)
    whole = flat and len(activation) == math.prod(tokens)
    return activation.unflatten(0, tuple(tokens)) if whole else activation


def put(name: str, value: Tensor, replacement: Replacement) -> Tensor:
    """What ``replacement`` makes of ``value``, which the hook ``name`` holds, in its type and on its device."""
    import torch

    # The model's bfloat16 is not for what is put in its place, such as an SAE.
    with torch.autocast(value.device.type, enabled=False):
        new = replacement(value)
    if not isinstance(new, torch.Tensor) or new.shape != value.shape:
        found = list(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
        hint = "" if new is not None else ": the function must return what the model goes on with"
        raise ModelError(f"what replaces {name!r} must be a tensor of shape {list(value.shape)}, found {found}{hint}")
    return new.to(value)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, ``[b, t - 1]``, of ``logits [b, t, d_vocab]`` for the next of ``tokens [b, t]``.

    Logits of half precision are summed in float32, as their libraries do.
    """
    import torch
    from torch.nn.functional import cross_entropy

    ahead = logits[:, :-1].flatten(0, 1)
    if ahead.dtype in (torch.bfloat16, torch.float16):
        ahead = ahead.float()
    following = tokens[:, 1:]
    return cross_entropy(ahead, following.flatten().long(), reduction="none").reshape(following.shape)
