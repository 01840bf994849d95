"""Small models and configurations that several test files use."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import saekit_plugins.backends.hooked_transformer as backend_plugin
import torch
from saekit_plugins.backends.lens_versions import has_hooked_transformer

TOKENIZER = Path(backend_plugin.__file__).parent / "tiny_python"

RUN: dict[str, Any] = {
    "dataset": {"context_size": 32},
    "activations": {"source": {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4}},
    "sae": {"name": "standard", "d_sae": 64, "l1_coefficient": 1.0},
    "training": {"training_tokens": 2000, "train_batch_size_tokens": 256, "verbose": False, "log_frequency": 1},
    "evals": {"n_contexts": 4, "split": "heldout"},
    "reports": {"pictures": False},  # a second for each run, which few tests look at
}


def run_config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """:data:`RUN` in ``folder``, with options of some sections changed."""
    config: dict[str, Any] = copy.deepcopy(RUN) | {"checkpoints": {"folder": str(folder)}}
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    return config


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def needs_transformer_lens_3() -> None:
    """Skip the test with transformer_lens 4, of which the models of tests are bridges."""
    if not has_hooked_transformer():
        pytest.skip("transformer_lens 4 has no HookedTransformer, and mamba-lens does not work with it")


def hooked_transformer(n_layers: int = 2, d_model: int = 16, seed: int = 0) -> Any:
    """An untrained HookedTransformer with the embedded model's tokenizer."""
    needs_transformer_lens_3()
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = HookedTransformerConfig(
            n_layers=n_layers, d_model=d_model, n_ctx=64, d_head=d_model // 2, n_heads=2, d_mlp=4 * d_model,
            d_vocab=2048, act_fn="gelu", seed=seed, device="cpu",
        )  # fmt: skip
        return HookedTransformer(config, tokenizer())


def hooked_mamba() -> Any:
    """A tiny HookedMamba with random weights."""
    needs_transformer_lens_3()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mamba_lens.HookedMamba import HookedMamba, MambaCfg
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedMamba(MambaCfg(d_model=32, n_layers=2, vocab_size=2048, d_state=4, device="cpu"), tokenizer())
