"""SAEs, trainers and rows of the parts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

import saekit
from saekit.config import TrainConfig, TrainingConfig
from saekit.config.files import load_config
from saekit.kinds import SAE_ARCHITECTURES
from saekit.sae.build import build_module
from saekit.training.firing import FiringStatistics
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.trainer import SAETrainer

Made: TypeAlias = Generator[dict[str, Any], None, dict[str, Any]]
"""A part: its rows, as they are found, and then what it says of all."""

K = 32
_JUMP = {"initial_threshold": 0.5, "bandwidth": 0.8, "pre_act_loss_coefficient": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "standard": {"name": "standard", "l1_coefficient": 0.05},
    "standard by norms": {
        "name": "standard",
        "l1_coefficient": 0.05,
        "activation": "tanh-relu",
        "normalize_sae_decoder": False,
        "scale_sparsity_penalty_by_decoder_norm": True,
    },
    "topk": {"name": "topk", "k": 8},
    "topk in units": {"name": "topk", "k": 8, "mse_loss_normalization": "variance", "aux_loss_normalization": "none"},
    "batchtopk": {"name": "batchtopk", "k": 8},
    "matryoshka": {"name": "matryoshka", "k": 8},
    "matryoshka each": {"name": "matryoshka", "k": 8, "aux_loss_levels": "each"},
    "gated": {"name": "gated", "l1_coefficient": 0.05},
    "jumprelu": {"name": "jumprelu", **_JUMP, "aux_loss_coefficient": 0.1},
    "abstopk": {"name": "abstopk", "k": 8},
    "groupmax": {"name": "groupmax", "k": 8},
    "transcoder": {"name": "transcoder", "skip_connection": True},
    "topk_transcoder": {"name": "topk_transcoder", "k": 8},
    "jumprelu_transcoder": {"name": "jumprelu_transcoder", **_JUMP},
    "groupmax_transcoder": {"name": "groupmax_transcoder", "k": 8},
    "crosscoder": {"name": "crosscoder", "l1_coefficient": 0.05},
    "batchtopk_crosscoder": {"name": "batchtopk_crosscoder", "k": 8},
}
"""Every architecture that trains (a test holds that), by the name of the case; AuxK is on where there is any."""


def rows(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """On the CPU, the same everywhere."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(d_in: int, d_sae: int) -> dict[str, Tensor]:
    """Unit decoder rows, the encoder their transpose."""
    decoder = torch.nn.functional.normalize(rows(d_sae, d_in, seed=1), dim=1)
    return {"W_enc": decoder.T.contiguous(), "W_dec": decoder, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}


def trainer_of(
    options: Mapping[str, Any], d_in: int, d_sae: int, device: str, *, weights: Mapping[str, Tensor] | None = None,
    lr: float = 1e-3, **training: Any,
) -> SAETrainer:  # fmt: skip
    """An SAE with the same first weights on every device, or with ``weights``, and what trains it."""
    plugins = saekit.default_manager()
    config: TrainConfig = load_config({"sae": {**options, "d_sae": d_sae}}, plugins=plugins)
    chosen = plugins.options(SAE_ARCHITECTURES, config.sae)
    sae = build_module(plugins.find(SAE_ARCHITECTURES, config.sae), chosen, d_in, plugins)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if weights is not None and name in weights:
                parameter.copy_(weights[name])
            elif parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    sae.to(device)
    how = TrainingConfig(training_tokens=10**10, log_frequency=10**7, **{"dead_feature_window": 2, **training})
    sae.kernels = how.kernels
    return SAETrainer(
        name="case", sae=sae, sites=saekit.Sites.one(saekit.Site()), training=how,
        generator=torch.Generator(device).manual_seed(2), device=device,
        optimizer=ScheduledOptimizer(
            sae.named_parameters(), functools.partial(plugins.build, "optimizers", config.optimizer), lambda step: lr
        ),
        firing=FiringStatistics(sae.d_sae, dead_after=how.dead_after, window=10**6, device=device),
    )  # fmt: skip


def target_of(options: Mapping[str, Any], n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Of those that write elsewhere than they read."""
    return rows(n, d, dtype, seed=9) if "transcoder" in options["name"] else None


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """``float32``, ``TF32`` or ``bfloat16`` products, of the process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"float32": "highest", "TF32": "high", "bfloat16": "medium"}[name])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
