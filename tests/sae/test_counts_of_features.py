"""BatchTopK's ``⌊k · rows⌋`` is that of the decimal that was written."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig

import saekit
from saekit import SAE
from saekit.sae.build import build_module
from saekit.values import StepInput

K = [0.29, 0.57, 0.58, 1.1, 1.15, 2.3, 3.37, 4.35, 8.2, 16.4, 0.1, 1 / 3, 4.0, 5, 1e-3, 2.675]


def built(k: float, kernels: str = "auto") -> SAE:
    plugins = saekit.default_manager()
    config = BatchTopKConfig(k=k, d_sae=64, aux_loss_coefficient=0)
    sae = build_module(plugins.find("sae_architectures", config), config, 8, plugins)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.normal_(generator=generator)
    sae.kernels = kernels  # type: ignore[assignment]
    return sae


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(("k", "rows", "expected"), [(0.29, 100, 29), (0.57, 100, 57), (1.1, 10, 11), (3.37, 64, 215)])
def test_no_feature_is_lost_to_rounding(k: float, rows: int, expected: int, kernels: str) -> None:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    result = built(k, kernels).training_step(x, StepInput(step=0, generator=torch.Generator()))
    assert int(result.fired.sum()) == expected


def test_every_k_and_batch() -> None:
    for k in K:
        sae = built(k)
        for rows in (*range(1, 300), 1000, 4096, 16384):
            exact = math.floor(Decimal(repr(float(k))) * rows)
            assert sae.wanted(rows) == exact, (k, rows)  # type: ignore[operator]
