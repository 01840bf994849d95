"""Small SAEs in float64, and batches for them."""

from __future__ import annotations

import torch
from saekit_plugins.architectures.standard import StandardConfig
from torch import Tensor

import saekit
from saekit import SAE
from saekit.sae.build import build_module
from saekit.values import StepInput

D_IN, D_SAE, N = 6, 14, 9


def random_sae(seed: int = 0, *, device: str = "cpu", **options: object) -> SAE:
    config = StandardConfig(**{"d_sae": D_SAE, "dtype": "float64", "normalize_sae_decoder": False, **options})  # type: ignore[arg-type]
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, D_IN, plugins)
    draw(sae, seed)
    return sae.to(device)


def draw(sae: SAE, seed: int) -> None:
    """Give ``sae`` the weights of :func:`random_sae`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
        parameter.data = drawn.to(parameter.device)


def batch(seed: int = 5, device: str = "cpu") -> Tensor:
    drawn = torch.randn(N, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    return drawn.to(device)


def step_input(sae: SAE, step: int = 3, dead: list[int] | None = None) -> StepInput:
    device = sae.W_enc.device
    mask = torch.zeros(D_SAE, dtype=torch.bool, device=device)
    mask[dead or []] = True
    return StepInput(step=step, generator=torch.Generator(device).manual_seed(0), dead=mask)
