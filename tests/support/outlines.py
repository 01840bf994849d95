"""What Hubs say of models, without their weights: the files that a configuration is read from, in the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256,
    },
    "EleutherAI/pythia-160m-deduped": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 12,
        "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50304,
    },
    "google/gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
    "state-spaces/mamba-130m": {
        "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    },
}  # fmt: skip
"""``config.json`` of models, as their repositories have it (what says nothing of sizes is left out)."""


def put_in_cache(name: str, config: Mapping[str, Any]) -> None:
    """Have ``config.json`` of the model ``name`` in the Hub's cache, and nothing else of it."""
    from huggingface_hub import constants

    commit = "0" * 40
    home = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs/main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (home / "snapshots" / commit / "config.json").write_text(json.dumps(config))
