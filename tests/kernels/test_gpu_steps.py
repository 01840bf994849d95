"""Steps on a GPU."""

from __future__ import annotations

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import TranscoderConfig
from support.kernels import adam, built, seeded

from saekit.config import SAEConfig
from saekit.values import StepInput

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ON_GPU = [
    StandardConfig(d_sae=2048, l1_coefficient=0.1),
    StandardConfig(d_sae=2048, activation="tanh-relu", scale_sparsity_penalty_by_decoder_norm=True,
                   normalize_sae_decoder=False),
    TopKConfig(d_sae=2048, k=16),
    BatchTopKConfig(d_sae=2048, k=16),
    MatryoshkaConfig(d_sae=2048, k=16),
    GatedConfig(d_sae=2048, l1_coefficient=0.1),
    GatedConfig(d_sae=2048, l1_coefficient=0.1, aux_loss_trains_decoder=True),
    JumpReLUConfig(d_sae=2048),
    TranscoderConfig(d_sae=2048, skip_connection=True),
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("config", ON_GPU, ids=lambda config: type(config).__name__)
def test_a_step_on_a_gpu_waits_for_nothing_and_is_that_of_the_cpu(config: SAEConfig) -> None:
    x = torch.randn(2048, 256, generator=seeded(1))
    weights = {}
    for device in ("cpu", "cuda"):
        sae = built(config, d_in=256, bias=-10.0).to(device)
        optimizer, rows = adam(sae), x.to(device)
        generator = torch.Generator(device)
        for step in range(4):
            waiting = device == "cuda" and step > 1  # the first steps make memory and handles
            torch.cuda.set_sync_debug_mode("error" if waiting else "default")
            try:
                sae.training_step(rows, StepInput(step=step, generator=generator))
                sae.before_update()
                optimizer.step(step)
                sae.after_update()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        weights[device] = {name: value.detach().cpu() for name, value in sae.named_parameters()}
    for name, value in weights["cpu"].items():
        assert (weights["cuda"][name] - value).norm() < 1e-2 * (value.norm() + 1), name
