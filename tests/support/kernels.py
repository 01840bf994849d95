"""SAEs and rows for the fast kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.optimizers import adam_for
from torch import Tensor

import saekit
import saekit.kernels.encoder
import saekit.kernels.screen
from saekit import SAE
from saekit.config import SAEConfig
from saekit.kernels import Encoder, SparseFeatures
from saekit.kernels.private_torch import has_bfloat16_products
from saekit.kernels.screen import Bfloat16Screen, Int8Screen, Screen
from saekit.sae.build import build_module
from saekit.training.optimizer import ScheduledOptimizer


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def random_features(n: int, d_sae: int, density: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.rand(n, d_sae, generator=seeded(seed), dtype=dtype) + 0.1
    return values * (torch.rand(n, d_sae, generator=seeded(seed + 1)) < density)


def sparse(dense: Tensor) -> SparseFeatures:
    rows, features = dense.nonzero(as_tuple=True)
    return SparseFeatures(rows, features, dense[rows, features], *dense.shape)


def built(config: SAEConfig, d_in: int = 12, seed: int = 0, bias: float = 0.0, device: str = "cpu") -> SAE:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) / 2)
        (sae.b_gate if "b_gate" in dict(sae.named_parameters()) else sae.b_enc).add_(bias)
    return sae.to(device)


def screened(d_in: int, d_sae: int, kind: str, seed: int = 0) -> tuple[Encoder, Tensor]:
    """Encoders and rows that are hard on a screen: large and small norms, large coordinates and biases."""
    weights = torch.randn(d_sae, d_in, generator=seeded(seed)) / d_in**0.5
    rows = torch.randn(512, d_in, generator=seeded(seed + 1))
    bias = torch.full((d_sae,), -2.0) + 0.1 * torch.randn(d_sae, generator=seeded(seed + 2))
    if kind == "norms":
        weights *= torch.logspace(-2, 1, d_sae)[:, None]
        rows *= torch.logspace(-3, 3, 512)[:, None]
    elif kind == "outliers":
        rows[:, 0] += 300
        weights[:, 0] *= 0.01
        bias -= 3
    elif kind == "bias":
        bias = -1000 - 2 * torch.rand(d_sae, generator=seeded(seed))
        rows[:, 1] = 1000
        weights[:, 1] = 1
    elif kind == "exact":  # nothing is lost, and the bound is what summing costs
        weights, rows = weights.bfloat16().float(), rows.bfloat16().float()
    return Encoder(weights.T, bias), rows


SCREENS: dict[str, type[Screen]] = {"bfloat16": Bfloat16Screen, "int8": Int8Screen}
HARD = ["plain", "norms", "outliers", "bias", "exact"]
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16_products(), reason="this CPU has no bfloat16 products")


def looking_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU had products of 8-bit integers: they are made in float32, as exactly."""
    monkeypatch.setattr(saekit.kernels.screen, "why_no_int8_products", lambda: None)


def count_screens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = Screen._exact

    def counted(self: Screen, rows: Tensor, *args: Any) -> Any:
        calls.append(len(rows))
        return original(self, rows, *args)

    monkeypatch.setattr(Screen, "_exact", counted)
    return calls


def adam(sae: SAE) -> ScheduledOptimizer:
    return adam_for(sae.named_parameters(), lambda step: 1e-3, beta1=0.9)
