"""A few inputs and what the SAE makes of them, beside its weights: whoever loads those can see whether it is the same.

Inputs are numbers of bfloat16, so that their file holds them as they are.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit._version import __version__
from saekit.files.names import SAE_PROBE
from saekit.reasons import error_text
from saekit.weights import dtype_name

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["MOST_ROWS", "Probe", "as_it_is", "explained", "norms_of", "off_here", "probe_of", "results"]

MOST_ROWS = 16
_MOST_BYTES = 1 << 19  # of inputs and outputs, but for one row
_MOST_FEATURES = 64  # of a row
_DIRECTIONS = 4  # that a row is made of, where none is known
_PIECE = 1 << 22  # numbers that are made longer at once
_PROCESS = os.getpid()
_SCALES = (1, 8, 64, 512)
_OFF = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}
_COARSE = 5e-3  # where products of float32 are made of shorter numbers


@attrs.frozen(eq=False)
class Probe:
    """What ``probe.safetensors`` holds."""

    tensors: Mapping[str, Tensor]
    """``x [n, d_in]`` in bfloat16, ``output [n, d_out]``; of the largest features of each row ``values [n, m]`` and
    ``features [n, m]``; and ``l0 [n]``, how many are active."""
    facts: Mapping[str, str]
    """Of the header: what the SAE was, and how far off another machine may be."""


def probe_of(sae: SAEModule, saved: Mapping[str, Tensor]) -> Probe | None:
    """That of ``sae``, whose public tensors are ``saved``.

    None where its own code cannot tell, with a warning that says why: it is no reason not to save it.
    """
    try:
        sae = _as_loaded(sae)
        with as_it_is(sae):
            rows, made = sae.probe_rows, sae.probe_rows is None
            x = _made_rows(sae, _fitting(sae)) if rows is None else rows[: _fitting(sae)].cpu().bfloat16()
            features, output = results(sae, x)
    except Exception as error:
        _warn(f"what the SAE computes fails with {error_text(error)}")
        return None
    if not bool(output.isfinite().all()) or not bool(features.isfinite().all()):
        _warn("what the SAE computes is not finite")
        return None
    largest = features.abs().topk(min(_MOST_FEATURES, features.shape[1]), dim=1).indices
    tensors = {
        "x": x.contiguous(),
        "output": output.float().cpu().contiguous(),
        "values": features.gather(1, largest).float().cpu().contiguous(),
        "features": largest.int().cpu().contiguous(),
        "l0": (features != 0).sum(1).int().cpu(),
    }
    facts = {
        "format": "1",
        "saekit": __version__,
        "rows": "made of weights" if made else "activations",
        "dtype": dtype_name(sae.dtype),
        "off": repr(max(_OFF.get(sae.dtype, max(_OFF.values())), off_here(sae))),
        "l0": repr(tensors["l0"].float().mean().item()),
        "norms": json.dumps(norms_of(saved)),
    }
    if sae.ports.same and len(x) > 1:
        facts["explained_variance"] = repr(explained(x.float(), tensors["output"]))
    return Probe(tensors, facts)


def _as_loaded(sae: SAEModule) -> SAEModule:
    """As it is when it is loaded again: float16 becomes float32, in which other features may be the largest."""
    return copy.deepcopy(sae).float() if sae.dtype == torch.float16 else sae


def _warn(why: str) -> None:
    warnings.warn(
        f"the SAE is saved without {SAE_PROBE}, so that nobody can verify it: {why}", UserWarning, stacklevel=6
    )


@contextmanager
def as_it_is(sae: SAEModule) -> Iterator[None]:
    """Without hooks, error term and gradients, and leaving random numbers as they are.

    A plugin may draw from the process's generators: what a run draws next must not depend on when it was saved.
    """
    before, sae.use_error_term = sae.use_error_term, False
    drawn = random.getstate(), np.random.get_state()
    devices = [sae.device] if sae.device.type == "cuda" else []
    threads = torch.get_num_threads()
    try:
        if os.getpid() != _PROCESS:  # forked from the one that has torch's threads: it would wait for them for ever
            torch.set_num_threads(1)
        with torch.no_grad(), sae._without_hooks(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        sae.use_error_term = before
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def results(sae: SAEModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``[n, d_sae]`` and outputs ``[n, d_out]`` of rows ``[n, d_in]``, which may be one sequence."""
    rows = x.to(torch.promote_types(sae.dtype, torch.float32)).to(sae.device)
    rows = rows[None] if sae.reads_sequences else rows
    features = sae.encode(rows)
    if sae.reads_sequences:  # of which features alone do not say all
        return features.reshape(len(x), -1), sae(rows).reshape(len(x), -1)
    output = sae.with_bypass(sae.decode(features, like=rows), rows)  # as forward does, without encoding once more
    return features, output


def _fitting(sae: SAEModule) -> int:
    """How many rows there may be."""
    return max(1, min(MOST_ROWS, _MOST_BYTES // (2 * sae.d_in + 4 * sae.d_out)))


def off_here(sae: SAEModule) -> float:
    """How far, relative to itself, a row may be off by how this machine multiplies, beside what the type says."""
    short = sae.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return _COARSE if short else 0.0


def _made_rows(sae: SAEModule, n: int) -> Tensor:
    """``[n, d_in]``: sums of a few directions that features write, or read, as large as makes features active."""
    generator = torch.Generator().manual_seed(0)
    decoder, encoder, bias = (
        None if name is None else getattr(sae, name)
        for name in (sae.table.of_dims(*dims) for dims in (("d_sae", "d_out"), ("d_in", "d_sae"), ("d_out",)))
    )
    which = torch.randint(sae.d_sae, (n, _DIRECTIONS), generator=generator).to(sae.device)
    if sae.ports.same and decoder is not None:
        rows = decoder[which].float().sum(1).cpu()
    elif encoder is not None:
        rows = encoder[:, which.flatten()].T.reshape(n, _DIRECTIONS, -1).float().sum(1).cpu()
    else:
        rows = torch.randn(n, sae.d_in, generator=generator)
    rows = rows * (math.sqrt(sae.d_in) / rows.norm(dim=1, keepdim=True).clamp_min(1e-30))
    center = bias if sae.ports.same else None
    x: Tensor = rows
    for scale in _SCALES:
        x = (scale * rows + (0 if center is None else center.detach().float().cpu())).bfloat16()
        features, _ = results(sae, x)
        if int((features != 0).any(1).sum()) * 2 >= n:
            break
    return x


def explained(x: Tensor, output: Tensor) -> float:
    """The part of the variance of ``x [n, d]`` that ``output`` explains: 1 − Σ‖x − y‖² / Σ‖x − x̄‖²."""
    return 1 - ((x - output).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-30)).item()


def norms_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each, by name; those that are too large for their type are left out."""
    found = {name: math.hypot(*map(_norm, value.reshape(-1).split(_PIECE))) for name, value in tensors.items()}
    return {name: norm for name, norm in found.items() if math.isfinite(norm)}


def _norm(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part.to(torch.promote_types(part.dtype, torch.float32))))
