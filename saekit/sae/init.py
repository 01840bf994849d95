"""Starting values: what the ``init`` of a :class:`saekit.sae.parameters.Parameter` may be.

Each is a function of what is known at the start and of the shape that is wanted.  What is drawn is drawn on the CPU in
float32, so that neither the device nor the dtype changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, TypeVar

import attrs
import torch
from torch import Tensor, nn

from saekit.distributed.drawing import drawn_part
from saekit.errors import ConfigError
from saekit.sae.parameters import ParameterTable, Start

__all__ = [
    "Constant", "b_dec", "by_parts", "decoder", "drawn", "encoder", "geometric_median", "initial_b_dec", "ones",
    "starts_by_parts", "zeros",
]  # fmt: skip


class _Init(Protocol):
    def __call__(self, start: Start, shape: tuple[int, ...]) -> Tensor: ...


_I = TypeVar("_I", bound=_Init)


def by_parts(init: _I) -> _I:
    """Of starting values of which each process may need a part: ``shape`` is that of the part that ``start`` says.

    Numbers must be those of the whole: what is drawn is drawn for all features, as :func:`drawn` does.  Others make the
    whole, of which a part is kept.
    """
    vars(init)["by_parts"] = True
    return init


def starts_by_parts(table: ParameterTable) -> bool:
    """Whether all starting values of a table can be made of a part alone."""
    return all(getattr(entry.init, "by_parts", False) for entry in table if not entry.optional)


def drawn(
    start: Start,
    shape: tuple[int, ...],
    along: int,
    draw: Callable[[Tensor], object],
    like: torch.dtype = torch.float32,
) -> Tensor:
    """``[...]`` of ``shape``, of a part that is split ``along`` a dimension, from numbers that are drawn for the whole.

    ``draw`` fills memory in its order, from ``start.generator`` alone.  Where there are several parts it is asked for
    some of the whole at a time, so that nobody has all of it; torch draws the same numbers so.
    """
    if start.parts == 1:
        values = torch.empty(shape, dtype=like, device="cpu")
        draw(values)
        return values
    outer, own = math.prod(shape[:along]), math.prod(shape[along:])
    whole = outer, own * start.parts
    return drawn_part(draw, whole, (0, outer), (start.part * own, own), like).view(shape)


@by_parts
def zeros(start: Start, shape: tuple[int, ...]) -> Tensor:
    """Zeros."""
    return torch.zeros(shape, device="cpu")


@by_parts
def ones(start: Start, shape: tuple[int, ...]) -> Tensor:
    """Ones."""
    return torch.ones(shape, device="cpu")


@attrs.frozen
class Constant:
    """``init.Constant(0.01)``: that number everywhere."""

    value: float
    by_parts: ClassVar[bool] = True

    def __call__(self, start: Start, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, self.value, dtype=start.dtype, device="cpu")


@by_parts
def encoder(start: Start, shape: tuple[int, ...]) -> Tensor:
    """``W_enc [d_in, d_sae]``: Kaiming-uniform, or ``W_dec.T`` with ``init_encoder_as_decoder_transpose``."""
    values = _kaiming_uniform(start, shape, along=1)
    if not start.config.init_encoder_as_decoder_transpose:
        return values
    del values  # drawn all the same, for what comes after it
    turned = start["W_dec"].T
    if tuple(turned.shape) != tuple(shape):
        raise ConfigError(
            [("sae.init_encoder_as_decoder_transpose", f"needs targets as wide as inputs; W_dec.T is "
              f"{list(turned.shape)}, and W_enc {list(shape)}. Set it to false")]
        )  # fmt: skip
    return turned


@by_parts
def decoder(start: Start, shape: tuple[int, ...]) -> Tensor:
    """``W_dec [d_sae, d_out]``: Kaiming-uniform, orthogonal or of norm 0.1, as the options say; with rows of norm 1
    where those are kept."""
    config, generator = start.config, start.generator
    if config.decoder_orthogonal_init:  # of which no part can be made alone
        whole = torch.empty(shape[0] * start.parts, *shape[1:], dtype=torch.float32, device="cpu")
        values = nn.init.orthogonal_(whole, generator=generator)
        values = values if start.parts == 1 else values.narrow(0, start.part * shape[0], shape[0]).clone()
    elif config.decoder_heuristic_init:
        values = drawn(start, shape, 0, lambda memory: memory.normal_(generator=generator))
        values *= 0.1 / values.norm(dim=1, keepdim=True)
    else:
        values = _kaiming_uniform(start, shape, along=0)
    if config.normalize_sae_decoder:
        values /= values.norm(dim=1, keepdim=True)
    return values


def _kaiming_uniform(start: Start, shape: tuple[int, ...], along: int) -> Tensor:
    """As :func:`torch.nn.init.kaiming_uniform_` draws the whole."""
    if start.parts == 1:
        memory = torch.empty(shape, dtype=torch.float32, device="cpu")
        return nn.init.kaiming_uniform_(memory, generator=start.generator)
    whole = [n * start.parts if dim == along else n for dim, n in enumerate(shape)]
    bound = math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", 0) / math.sqrt(math.prod(whole[1:])))
    return drawn(start, shape, along, lambda memory: memory.uniform_(-bound, bound, generator=start.generator))


@by_parts
def b_dec(start: Start, shape: tuple[int, ...]) -> Tensor:
    """``b_dec [d_out]``, by ``b_dec_init_method``, of targets as they will be scaled."""
    return initial_b_dec(start.config.b_dec_init_method, start.target, shape[0], start.dtype) * start.target_scale


def initial_b_dec(method: str, sample: Tensor | None, d_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``b_dec [d_in]`` by ``zeros``, ``mean``, ``geometric_median`` or ``auto`` of ``sample [n, d_in]``, in ``dtype``.

    ``auto`` is ``mean`` where the mean's square is more than half of the mean of squares ``‖x‖²``, else ``zeros``.
    """
    if method == "zeros":
        return torch.zeros(d_in, dtype=dtype, device="cpu")
    if sample is None:
        raise ValueError(f"b_dec_init_method={method!r} needs a sample of activations")
    dtype = torch.promote_types(dtype, sample.dtype)
    if method == "auto":
        mean = _mean(sample, dtype)
        squares = sum(float(piece.pow(2).sum()) for piece in _pieces(sample, dtype)) / len(sample)
        return mean if float(mean.pow(2).sum()) > squares / 2 else torch.zeros(d_in)
    return _mean(sample, dtype) if method == "mean" else geometric_median(sample, dtype=dtype)


# A sample may be a whole buffer of activations: these go through it in pieces, so that no copy of it is made.


def _pieces(points: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    return (piece.to(dtype) for piece in points.split(8192))


def _mean(points: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([piece.sum(0) for piece in _pieces(points, dtype)]).sum(0) / len(points)


@torch.no_grad()
def geometric_median(
    points: Tensor, *, max_iterations: int = 100, ftol: float = 1e-20, dtype: torch.dtype | None = None
) -> Tensor:
    """The point ``[d]`` with the least sum of distances to ``points [n, d]`` (Weiszfeld 1937).

    Starts at the mean; weights ``1 / max(‖x_i − m‖, 1e-6)``; stops when the objective improves by less than
    ``ftol`` of itself, or after ``max_iterations``.  Computed in ``dtype``, by default that of ``points``.
    """
    dtype = dtype or points.dtype

    def distances_to(center: Tensor) -> Tensor:
        return torch.cat([(piece - center).norm(dim=1) for piece in _pieces(points, dtype)])

    median = _mean(points, dtype)
    distances = distances_to(median)
    objective = distances.sum()
    for _ in range(max_iterations):
        weights = 1 / distances.clamp_min(1e-6)
        parts = zip(weights.split(8192), _pieces(points, dtype), strict=True)
        median = torch.stack([(w[:, None] * piece).sum(0) for w, piece in parts]).sum(0) / weights.sum()
        distances = distances_to(median)
        previous, objective = objective, distances.sum()
        if bool((previous - objective).abs() <= ftol * objective):
            break
    return median
