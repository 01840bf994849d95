"""A few inputs and what the SAE makes of them, beside its weights: whoever loads those can see whether it is the same.

Inputs are numbers of bfloat16, so that their file holds them as they are.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit._version import __version__
from saekit.cautions import warn
from saekit.distributed.share import Share
from saekit.files.names import SAE_PROBE
from saekit.precision import current_precision
from saekit.reasons import error_text
from saekit.sae.splitting import copied, saved_along
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

    None where its own code cannot tell, with a warning that says why: it is no reason not to save it.  Where features
    are split, all processes of the group ask, and outputs are sums over their parts.
    """
    share = sae.share
    try:
        sae = _as_loaded(sae)
        with as_it_is(sae):
            rows, made = sae.probe_rows, sae.probe_rows is None
            x = _made_rows(sae, _fitting(sae)) if rows is None else rows[: _fitting(sae)].cpu().bfloat16()
            features, output = results(sae, x)
    except Exception as error:
        _warn(f"what the SAE computes fails with {error_text(error)}")
        return None
    finite = bool(output.isfinite().all()) and bool(features.isfinite().all())
    if share.count(int(not finite), output):
        _warn("what the SAE computes is not finite")
        return None
    values, largest = _largest(features, share)
    tensors = {
        "x": x.contiguous(),
        "output": output.float().cpu().contiguous(),
        "values": values.float().cpu().contiguous(),
        "features": largest.int().cpu().contiguous(),
        "l0": share.features.sum((features != 0).sum(1)).int().cpu(),
    }
    facts = {
        "format": "1",
        "saekit": __version__,
        "rows": "made of weights" if made else "activations",
        "dtype": dtype_name(sae.dtype),
        "off": repr(max(_OFF.get(sae.dtype, max(_OFF.values())), off_here(sae))),
        "l0": repr(tensors["l0"].float().mean().item()),
        "norms": json.dumps(_norms_of_all(norms_of(saved), saved_along(sae, saved), share)),
    }
    if sae.ports.same and len(x) > 1:
        facts["explained_variance"] = repr(explained(x.float(), tensors["output"]))
    return Probe(tensors, facts)


def _largest(features: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Of each row of ``features [n, d_sae]``, of this process, the largest of all: values and numbers, ``[n, m]``."""
    numbers = features.abs().topk(min(_MOST_FEATURES, features.shape[1]), dim=1).indices
    values = features.gather(1, numbers)
    if share.parts == 1:
        return values, numbers
    numbers = torch.cat(share.features.gather(numbers + share.first_feature(features.shape[1])), dim=1)
    values = torch.cat(share.features.gather(values), dim=1)
    best = values.abs().topk(min(_MOST_FEATURES, values.shape[1]), dim=1).indices
    return values.gather(1, best), numbers.gather(1, best)


def _norms_of_all(norms: dict[str, float], split: Collection[str], share: Share) -> dict[str, float]:
    """``norms`` of whole tensors, where this process has those of its parts of ``split``."""
    if share.parts == 1:
        return norms
    parts = share.features.objects({name: norms.get(name, math.inf) for name in (*split,)})
    norms |= {name: math.hypot(*(part[name] for part in parts)) for name in split}
    return {name: norm for name, norm in norms.items() if math.isfinite(norm)}


def _as_loaded(sae: SAEModule) -> SAEModule:
    """As it is when it is loaded again: float16 becomes float32, in which other features may be the largest."""
    return copied(sae).float() if sae.dtype == torch.float16 else sae


def _warn(why: str) -> None:
    warn(f"the SAE is saved without {SAE_PROBE}, so that nobody can verify it: {why}", UserWarning)


@contextmanager
def as_it_is(sae: SAEModule) -> Iterator[None]:
    """Without hooks, error term and gradients, and leaving random numbers as they are.

    A plugin may draw from the process's generators: what a run draws next must not depend on when it was saved.
    """
    before, sae.use_error_term = sae.use_error_term, False
    kernels = sae.kernels
    drawn = random.getstate(), np.random.get_state()
    devices = [sae.device] if sae.device.type == "cuda" else []
    threads = torch.get_num_threads()
    try:
        if sae.share.parts > 1:  # of which kernels of inference know nothing
            sae.kernels = "reference"
        if os.getpid() != _PROCESS:  # forked from the one that has torch's threads: it would wait for them for ever
            torch.set_num_threads(1)
        with torch.no_grad(), sae._without_hooks(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        sae.use_error_term, sae.kernels = before, kernels
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
    short = sae.device.type == "cuda" and current_precision() != "highest"
    return _COARSE if short else 0.0


def _made_rows(sae: SAEModule, n: int) -> Tensor:
    """``[n, d_in]``: sums of a few directions that features write, or read, as large as makes features active."""
    generator = torch.Generator().manual_seed(0)
    decoder, encoder, bias = (
        None if name is None else getattr(sae, name)
        for name in (sae.table.of_dims(*dims) for dims in (("d_sae", "d_out"), ("d_in", "d_sae"), ("d_out",)))
    )
    share = sae.share
    which = torch.randint(sae.d_sae * share.parts, (n, _DIRECTIONS), generator=generator).to(sae.device)
    if sae.ports.same and decoder is not None:
        rows = _of(decoder, which, share).float().sum(1).cpu()
    elif encoder is not None:
        rows = _of(encoder.T, which, share).float().sum(1).cpu()
    else:
        rows = torch.randn(n, sae.d_in, generator=generator)
    rows = rows * (math.sqrt(sae.d_in) / rows.norm(dim=1, keepdim=True).clamp_min(1e-30))
    center = bias if sae.ports.same else None
    x: Tensor = rows
    for scale in _SCALES:
        x = (scale * rows + (0 if center is None else center.detach().float().cpu())).bfloat16()
        features, _ = results(sae, x)
        if int((share.features.sum((features != 0).sum(1)) > 0).sum()) * 2 >= n:
            break
    return x


def _of(directions: Tensor, which: Tensor, share: Share) -> Tensor:
    """Rows ``which [n, m]`` of ``directions [d_sae, d]`` of all features, of which this process has its own."""
    if share.parts == 1:
        return directions[which]
    own = which - share.first_feature(len(directions))
    mine = (own >= 0) & (own < len(directions))
    return share.features.sum(directions[own.clamp(0, len(directions) - 1)] * mine[..., None])


def explained(x: Tensor, output: Tensor) -> float:
    """The part of the variance of ``x [n, d]`` that ``output`` explains: 1 − Σ‖x − y‖² / Σ‖x − x̄‖²."""
    return 1 - ((x - output).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-30)).item()


def norms_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each, by name; those that are too large for their type are left out."""
    found = {name: math.hypot(*map(_norm, value.reshape(-1).split(_PIECE))) for name, value in tensors.items()}
    return {name: norm for name, norm in found.items() if math.isfinite(norm)}


def _norm(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part.to(torch.promote_types(part.dtype, torch.float32))))
