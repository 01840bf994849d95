"""What a model backend says of the way from inside a block to the residual stream, beside what the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from saekit.abilities import KnowsResidualStream, LeadsToResidualStream
from saekit.errors import ModelError
from saekit.testing.checks.check import Checks, NotTried, Subject, must
from saekit.testing.checks.tried_models import Tried

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.protocols import ModelBackend

CHECKS = Checks()
_MOST = 6
"""Hooks that are tried."""
_CLOSE = 1e-3


@CHECKS.add
def leads_to_residual_stream(subject: Subject) -> None:
    """What ``to_residual_stream``, if there, gives is what the model adds to the residual stream of a coordinate of
    what the hook holds; or a multiple of it at each token, where an activation function lies between."""
    tried = Tried.of(subject)
    backend: Any = tried.backend
    if not isinstance(backend, LeadsToResidualStream) or not isinstance(backend, KnowsResidualStream):
        raise NotTried("the backend knows no weights that lead to the residual stream")
    ways = [name for name in tried.backend.hook_names() if backend.to_residual_stream(name) is not None]
    if not ways:
        raise NotTried("it knows no weights that lead to the residual stream of this model")
    chosen = [ways[n * (len(ways) - 1) // (_MOST - 1)] for n in range(_MOST)]
    residual = _met(tried, [name for name in tried.backend.hook_names() if backend.in_residual_stream(name)])
    for name in dict.fromkeys(chosen):
        _leads(tried, name, residual)


def _leads(tried: Tried, name: str, residual: Sequence[str]) -> None:
    backend: Any = tried.backend
    weights = backend.to_residual_stream(name).detach()
    held = backend.run(tried.tokens, read={name, *residual}).held
    expected = [held[name].flatten(2).shape[-1], len(backend.unembedding()[0])]
    must(list(weights.shape) == expected, f"of {name} it has the shape {list(weights.shape)}, not {expected}")
    clean = {one: held[one].detach().clone() for one in residual}
    step = 0.1 * float(held[name].detach().abs().max().clamp_min(1e-3))
    for column in (0, len(weights) // 2, len(weights) - 1):
        once, twice = (
            _changes(tried, name, [one for one in residual if one != name], _raised(column, n * step), clean)
            for n in (1, 2)
        )
        if once is None or twice is None:  # behind an activation function that is flat there
            continue
        where, change = once
        told = step * weights[column].to(change)
        size = _CLOSE * float(change.abs().max())
        linear = float((twice[1] - 2 * change).abs().max()) <= size
        slope = 1.0 if linear else (change @ told / told.square().sum().clamp_min(1e-30))[..., None]
        fits = float((change - slope * told).abs().max()) <= 10 * size
        must(
            fits,
            f"coordinate {column} of {name} changes {where}, the first of the residual stream that it changes, "
            "otherwise than by its row of what to_residual_stream gives"
            + ("" if linear else ", and not by a multiple of it"),
        )


def _raised(column: int, step: float) -> Callable[[Tensor], Tensor]:
    def raised(held: Tensor) -> Tensor:
        flat = held.flatten(2).clone()
        flat[..., column] += step
        return flat.view(held.shape)

    return raised


def _changes(
    tried: Tried, name: str, residual: Sequence[str], put: Callable[[Tensor], Tensor], clean: dict[str, Tensor]
) -> tuple[str, Tensor] | None:
    """The first hook of ``residual`` that holds something else then, and by how much."""
    held = tried.backend.run(tried.tokens, read=residual, replace={name: put}).held
    for one in residual:
        change = held[one].detach().double() - clean[one].double()
        if float(change.abs().max()) > 1e-6 * float(clean[one].abs().max()):
            return one, change
    return None


def _met(tried: Tried, names: Sequence[str]) -> list[str]:
    """Those that a forward meets, in its order."""
    met: dict[str, None] = {}

    def meets(name: str) -> Callable[[Tensor], Tensor]:
        def passed(held: Tensor) -> Tensor:
            met[name] = None
            return held

        return passed

    names = [name for name in names if _runs(tried.backend, tried.tokens, name)]
    tried.backend.run(tried.tokens, replace={name: meets(name) for name in names}, want="logits")
    return [*met]


def _runs(backend: ModelBackend, tokens: Tensor, name: str) -> bool:
    try:
        held = backend.run(tokens, read={name}).held[name]
    except ModelError:  # it does not run as the model is configured
        return False
    return held.ndim == 3 and held.shape[:2] == tokens.shape
