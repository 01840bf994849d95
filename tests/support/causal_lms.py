"""Small causal language models of transformers with random weights, and their folders, of each family once."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.tiny import tokenizer

KINDS = ("gpt2", "llama", "qwen2", "neox")
"""Those that transformer_lens' HookedTransformer loads from a folder, too."""
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "qwen2": "model.layers", "neox": "gpt_neox.layers",
          "gemma2": "model.layers"}  # fmt: skip
"""The module that holds the blocks."""
LAYERS = 3
WIDTH = 16
VOCABULARY = 2048
TOKENS = torch.randint(1, 2000, (3, 20), generator=torch.Generator().manual_seed(0))

_TYPES = {"neox": "gpt_neox"}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
_MORE: dict[str, dict[str, Any]] = {
    "neox": {}, "phi": {}, "gptj": {"rotary_dim": 4}, "stablelm": {"num_key_value_heads": 2},
    "gpt_neo": {"num_layers": LAYERS, "num_heads": 2, "attention_types": [[["global"], LAYERS]]},
}  # fmt: skip
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
} | _SPECIAL  # fmt: skip


def make_causal_lm(kind: str, **changes: Any) -> Any:
    """A new model of the family ``kind``, one of :data:`BLOCKS` or a ``model_type`` of transformers.

    It is in evaluation mode, and without a tokenizer.

    Every parameter is random, norms and biases too, so that no two places hold the same.  ``changes`` are options of
    the family's configuration, such as ``use_parallel_residual=False``.
    """
    import transformers

    if kind == "gpt2":
        # Dropout stays on, so that a forward in training mode would show.
        shape = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2}
        config: Any = transformers.GPT2Config(**shape | _SPECIAL | changes)
    else:
        config = transformers.AutoConfig.for_model(
            _TYPES.get(kind, kind), **_SHAPE | _MORE.get(kind, _GROUPED) | changes
        )
    library: Any = transformers.AutoModelForCausalLM  # its methods have no types
    model = library.from_config(config)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.3 if value.ndim > 1 else 0.1
            start = 1.0 if value.ndim == 1 and name.endswith("weight") and kind != "gemma2" else 0.0  # norms
            value.copy_(start + scale * torch.randn(value.shape, generator=drawn))
    return model.eval()


@cache
def causal_lm(kind: str) -> Any:
    """The model of the family ``kind`` with a tokenizer, the same object each time: leave it as it is."""
    model = make_causal_lm(kind)
    model.tokenizer = tokenizer()
    return model


@cache
def causal_lm_folder(kind: str) -> Path:
    """The same in a folder, as ``save_pretrained`` writes it, with its tokenizer.

    It is one folder for all tests of a process: leave it as it is.
    """
    folder = _base() / f"tiny-{kind}"
    causal_lm(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def _base() -> Path:
    base = Path(tempfile.mkdtemp(prefix="saekit-models-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    return base
