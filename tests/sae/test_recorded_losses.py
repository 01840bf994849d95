"""One loss of each peer's top-k SAEs, and its gradients, as the peer computed them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saekit_plugins.architectures.abstopk import AbsTopKConfig
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.levels import check_loss, close

from saekit.config import SAEConfig

OF_SAE_LENS = {"sae_lens_2_topk": TopKConfig, "sae_lens_3_batchtopk": BatchTopKConfig}
OF_DICTIONARY_LEARNING = {"dictionary_learning_topk": TopKConfig, "dictionary_learning_batchtopk": BatchTopKConfig}
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
SIZES: dict[str, Any] = {"d_sae": 64, "dtype": "float64", "k": 6}
SUM: dict[str, Any] = {"aux_loss_coefficient": 1.0, "aux_loss_normalization": "none"}


def must_be_theirs(config: SAEConfig, name: str, way: str, **others: Any) -> tuple[dict[str, torch.Tensor], Any]:
    result, theirs, sae = check_loss(config, name, {}, way, **others)
    close(result.output, theirs["recons"])
    for loss in ("mse_loss", "auxiliary_reconstruction_loss"):
        close(result.losses[loss], theirs[f"loss.{loss}"].squeeze(), loss)
    assert result.losses["auxiliary_reconstruction_loss"] > 0
    return theirs, sae


@pytest.mark.parametrize("name", OF_SAE_LENS)
def test_loss_and_gradients_are_those_of_sae_lens(way: str, name: str) -> None:
    theirs, sae = must_be_theirs(OF_SAE_LENS[name](**SIZES, **SUM), name, way)
    if name == "sae_lens_3_batchtopk":  # whose average begins at 0.2 there, and moves by a hundredth
        least = theirs["features"][theirs["features"] > 0].min()
        close(theirs["topk_threshold_after"].squeeze(), 0.99 * 0.2 + 0.01 * least)
        close(sae.threshold, least)


def test_loss_and_gradients_of_abstopk_are_those_of_sae_lens() -> None:
    """Which has no fast kernels."""
    config = AbsTopKConfig(**SIZES, **SUM)
    must_be_theirs(config, "sae_lens_8_abstopk", "reference", why="the architecture has no fast path")


@pytest.mark.parametrize("name", OF_DICTIONARY_LEARNING)
def test_loss_and_gradients_are_those_of_dictionary_learning(way: str, name: str) -> None:
    """Of whose dead features those that fire in the batch are dead no more."""
    config = OF_DICTIONARY_LEARNING[name](
        **SIZES, aux_loss_coefficient=1 / 32, aux_loss_normalization="share", rescale_acts_by_decoder_norm=False
    )
    check_loss(config, name, LINEAR, way, reset=True, single=True)
