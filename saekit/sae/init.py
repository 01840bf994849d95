"""Starting values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from saekit.config import SAEConfig

__all__ = ["geometric_median", "initial_b_dec", "initialize"]


@torch.no_grad()
def initialize(
    parameters: Mapping[str, Tensor],
    config: SAEConfig,
    generator: torch.Generator,
    sample: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Fill ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, ``b_enc`` and ``b_dec`` in place, as ``config`` says.

    ``sample [n, d_in]`` are the raw activations for ``b_dec_init_method``, which may be None for ``zeros``, and
    ``scale`` is what they will be multiplied by.  What is drawn is drawn on the CPU in float32, so that neither the
    device nor the dtype changes it.
    """
    d_in, d_sae = parameters["W_enc"].shape
    encoder = torch.empty(d_in, d_sae, dtype=torch.float32, device="cpu")
    decoder = torch.empty(d_sae, d_in, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(encoder, generator=generator)
    if config.decoder_orthogonal_init:
        nn.init.orthogonal_(decoder, generator=generator)
    elif config.decoder_heuristic_init:
        decoder.normal_(generator=generator)
        decoder *= 0.1 / decoder.norm(dim=1, keepdim=True)
    else:
        nn.init.kaiming_uniform_(decoder, generator=generator)
    if config.normalize_sae_decoder:
        decoder /= decoder.norm(dim=1, keepdim=True)
    if config.init_encoder_as_decoder_transpose:
        encoder = decoder.T
    parameters["W_enc"].copy_(encoder)
    parameters["W_dec"].copy_(decoder)
    parameters["b_enc"].zero_()
    dtype = torch.promote_types(parameters["b_dec"].dtype, torch.float32)
    parameters["b_dec"].copy_(initial_b_dec(config.b_dec_init_method, sample, d_in, dtype) * scale)


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

    def distances_to(centre: Tensor) -> Tensor:
        return torch.cat([(piece - centre).norm(dim=1) for piece in _pieces(points, dtype)])

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
