"""Small SAEs whose weights are drawn or known, and what puts them at sites."""

from __future__ import annotations

from typing import Any

import attrs
import torch

import saekit
from saekit import Ports, Sites


def drawn_sae(d_in: int, d_out: int | None = None, *, seed: int = 0, d_sae: int = 24, **options: Any) -> Any:
    """A ``standard`` SAE, or a ``transcoder``, every parameter of which is drawn: all of them matter."""
    ports = Ports.one(d_in) if d_out is None else Ports({"in": d_in}, {"out": d_out})
    name = "standard" if d_out is None else "transcoder"
    sae = saekit.SAE.from_dict({"name": name, "d_sae": d_sae, **options}, ports=ports, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
    return sae


def identity_sae(d: int) -> Any:
    """One that gives back its input to the last bit: ``relu(x) − relu(−x)``."""
    sae = saekit.SAE.from_dict({"name": "standard", "d_sae": 2 * d, "d_in": d})
    eye = torch.eye(d)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def at(sae: Any, *sites: saekit.Site | str, targets: tuple[saekit.Site | str, ...] = (), **metadata: Any) -> Any:
    """``sae``, which says that it belongs there."""
    reads, writes = ([saekit.Site(hook_name=one) if isinstance(one, str) else one for one in some]
                     for some in (sites, targets or sites))  # fmt: skip
    sae.info = attrs.evolve(sae.info, sites=Sites(tuple(reads), tuple(writes)), metadata=metadata)
    return sae


@torch.no_grad()
def given(sae: Any, x: torch.Tensor) -> Any:
    """What ``sae`` makes of ``x``, without gradients."""
    return sae(x)
