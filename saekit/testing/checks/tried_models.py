"""A model backend to be checked, with tokens for it and hooks that can be read and replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from saekit.config import ModelConfig
from saekit.errors import ModelError
from saekit.testing.checks.check import Subject, must
from saekit.testing.checks.numbers import seeded

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.protocols import ModelBackend

__all__ = ["Tried", "backend_of", "counted", "state_of"]

_MOST_HOOKS, _LOOKED_AT = 4, 24


def backend_of(subject: Subject) -> ModelBackend:
    """What the entry builds, of the model that it is checked with."""
    model = subject.model
    config, loaded = (model, None) if isinstance(model, ModelConfig) else (ModelConfig(device="cpu"), model)
    found: ModelBackend = subject.build(model=config, loaded=loaded)
    return found


@attrs.frozen
class Tried:
    """A backend, tokens for it, and some of its hooks that hold a vector for each token, as the forward meets them."""

    backend: ModelBackend
    tokens: Tensor
    hooks: tuple[str, ...]

    @classmethod
    def of(cls, subject: Subject) -> Tried:
        if "backend" not in subject.known:  # to build it for each check would take most of the time
            subject.known["backend"] = backend_of(subject)
        backend = subject.known["backend"]
        tokens = _tokens(backend)
        if "hooks" not in subject.known:
            subject.known["hooks"] = _usable(backend, tokens)
        hooks = subject.known["hooks"]
        must(hooks, f"no hook of {backend.name!r} holds a vector for each token, [b, t, d]")
        return cls(backend, tokens, hooks)

    def logits(self, **how: Any) -> Tensor:
        """A clone: what a forward gave may be written over by the next."""
        return self.backend.run(self.tokens, want="logits", **how).logits.detach().clone()


def _tokens(backend: ModelBackend) -> Tensor:
    import torch

    length = min(12, backend.n_ctx or 12)
    return torch.randint(1, min(backend.d_vocab, 100), (2, length), generator=seeded())


def _usable(backend: ModelBackend, tokens: Tensor) -> tuple[str, ...]:
    """Those at which something can be read and replaced, spread over the model, in the order of the forward."""
    names = list(backend.hook_names())
    step = max(len(names) // _LOOKED_AT, 1)
    good = [name for name in names[::step] if _holds_vectors(backend, tokens, name)]
    met: dict[str, None] = {}

    def meets(name: str) -> Any:
        def passed(held: Tensor) -> Tensor:
            met[name] = None
            return held

        return passed

    clean = backend.run(tokens, replace={name: meets(name) for name in good}, want="logits").logits.detach().clone()
    # Of some hooks, such as what positions are made of, the model takes no more than the type.
    order = [name for name in met if _matters(backend, tokens, name, clean)] or [*met]
    chosen = [order[n * (len(order) - 1) // (_MOST_HOOKS - 1)] for n in range(_MOST_HOOKS)] if order else []
    return tuple(dict.fromkeys(chosen))


def _holds_vectors(backend: ModelBackend, tokens: Tensor, name: str) -> bool:
    try:
        held = backend.run(tokens, read={name}).held[name]
    except ModelError:  # it does not run as the model is configured
        return False
    return held.ndim == 3 and held.shape[:2] == tokens.shape and held.is_floating_point()


def _matters(backend: ModelBackend, tokens: Tensor, name: str, clean: Tensor) -> bool:
    logits = backend.run(tokens, replace={name: lambda held: held * 0}, want="logits").logits
    return bool((logits - clean).abs().max() > 1e-6)


@contextmanager
def counted(model: object) -> Iterator[list[None]]:
    """A list that grows by each call of a module of ``model``."""
    import torch

    calls: list[None] = []
    handles = []
    if isinstance(model, torch.nn.Module):
        handles = [part.register_forward_hook(lambda *_: calls.append(None)) for part in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def state_of(model: object) -> dict[str, Any]:
    """What a forward must leave as it was."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return {}
    return {
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()),
        "the mode": [part.training for part in model.modules()],
        "what learns": [name for name, value in model.named_parameters() if value.requires_grad],
        "gradients": [name for name, value in model.named_parameters() if value.grad is not None],
    }
