"""Starting values: what the ``init`` of a :class:`saekit.sae.parameters.Parameter` may be.

Each is a function of what is known at the start and of the shape that is wanted.  What is drawn is drawn on the CPU in
float32, so that neither the device nor the dtype changes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.parameters import Start

__all__ = [
    "Constant", "b_dec", "decoder", "encoder", "geometric_median", "initial_b_dec", "ones", "zeros",
]  # fmt: skip


def zeros(start: Start, shape: tuple[int, ...]) -> Tensor:
    """Zeros."""
    return torch.zeros(shape, device="cpu")


def ones(start: Start, shape: tuple[int, ...]) -> Tensor:
    """Ones."""
    return torch.ones(shape, device="cpu")


@attrs.frozen
class Constant:
    """``init.Constant(0.01)``: that number everywhere."""

    value: float

    def __call__(self, start: Start, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, self.value, dtype=start.dtype, device="cpu")


def encoder(start: Start, shape: tuple[int, ...]) -> Tensor:
    """``W_enc [d_in, d_sae]``: Kaiming-uniform, or ``W_dec.T`` with ``init_encoder_as_decoder_transpose``."""
    drawn = nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32, device="cpu"), generator=start.generator)
    if not start.config.init_encoder_as_decoder_transpose:
        return drawn
    turned = start["W_dec"].T
    if turned.shape != drawn.shape:
        raise ConfigError(
            [("sae.init_encoder_as_decoder_transpose", f"needs targets as wide as inputs; W_dec.T is "
              f"{list(turned.shape)}, and W_enc {list(shape)}. Set it to false")]
        )  # fmt: skip
    return turned


def decoder(start: Start, shape: tuple[int, ...]) -> Tensor:
    """``W_dec [d_sae, d_out]``: Kaiming-uniform, orthogonal or of norm 0.1, as the options say; with rows of norm 1
    where those are kept."""
    config, generator = start.config, start.generator
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    if config.decoder_orthogonal_init:
        nn.init.orthogonal_(values, generator=generator)
    elif config.decoder_heuristic_init:
        values.normal_(generator=generator)
        values *= 0.1 / values.norm(dim=1, keepdim=True)
    else:
        nn.init.kaiming_uniform_(values, generator=generator)
    if config.normalize_sae_decoder:
        values /= values.norm(dim=1, keepdim=True)
    return values


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
