"""Folders of a HookedTransformer (``hooked_transformer.json``) as models of transformers, so that a bridge can be made
of them.  A helper of the backends' plugins, not a plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit import ModelError
from saekit.devices import resolve_device
from saekit.garbage import uncollected
from saekit_plugins.backends.model_folders import NATIVE_CONFIG, NATIVE_WEIGHTS, loading, model_folder, ready

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import ModelConfig

__all__ = ["gpt2_config", "load_native_causal_lm", "native_outline"]

_SHAPES = {
    "n_layers": "n_layer", "d_model": "n_embd", "n_ctx": "n_positions", "d_vocab": "vocab_size", "d_mlp": "n_inner",
    "n_heads": "n_head", "act_fn": "activation_function", "eps": "layer_norm_epsilon",
}  # fmt: skip
_REQUIRED = ("n_layers", "d_model", "n_ctx", "d_head", "d_vocab", "act_fn")
_SAY_NOTHING = {
    "model_name", "tokenizer_name", "original_architecture", "seed", "init_mode", "initializer_range", "init_weights",
    "device", "dtype", "n_devices", "default_prepend_bos", "tokenizer_prepends_bos", "n_params", "attn_types",
}  # fmt: skip
"""Options of a HookedTransformer that do not change what it computes."""


def gpt2_config(options: Mapping[str, Any], what: str) -> Any:
    """The configuration of a GPT-2 that computes what a HookedTransformer with ``options`` does.

    Raise :class:`saekit.ModelError` where there is none.
    """
    from transformers import GPT2Config

    heads = options.get("n_heads") or options["d_model"] // options["d_head"]
    possible: dict[str, tuple[object, ...]] = {
        "normalization_type": ("LN", "LNPre"),
        "positional_embedding_type": ("standard",),
        "attention_dir": ("causal",),
        "act_fn": ("relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu"),
        "use_attn_scale": (True,),
        "attn_scale": (-1.0, options["d_head"] ** 0.5),
        "d_head": (options["d_model"] / heads,),
        "n_key_value_heads": (None, heads),
        "d_vocab_out": (-1, options["d_vocab"]),
    }
    wrong = [
        f"{name} = {value!r}"
        for name, value in options.items()
        if name not in _SAY_NOTHING | _SHAPES.keys() - possible.keys()
        and value not in possible.get(name, (None, False))
    ]
    if wrong:
        raise ModelError(
            f"{what} has {', '.join(wrong)}, which GPT-2 has not, and saekit makes a bridge only of such "
            "HookedTransformers as GPT-2 can compute. Use transformer_lens 3 with "
            "model.backend=HookedTransformer: pip install 'transformer-lens<4'"
        )
    shape = {"d_mlp": 4 * options["d_model"], "eps": 1e-5} | dict(options) | {"n_heads": heads}
    known: dict[str, Any] = {theirs: shape[ours] for ours, theirs in _SHAPES.items()}
    known |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    known |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return GPT2Config(**known, tie_word_embeddings=False)


def _options(folder: Path) -> dict[str, Any]:
    with loading(f"the configuration {folder / NATIVE_CONFIG}"):
        found: dict[str, Any] = json.loads((folder / NATIVE_CONFIG).read_text(encoding="utf-8"))
        if lacking := [name for name in _REQUIRED if name not in found]:
            raise ModelError(f"the configuration {folder / NATIVE_CONFIG} lacks {', '.join(lacking)}")
    return found


def _made(options: Mapping[str, Any], what: str) -> Any:
    """A GPT-2 with a bias for its logits, as a HookedTransformer has one."""
    import torch

    with uncollected():
        from transformers import GPT2LMHeadModel
    config = gpt2_config(options, what)
    with torch.random.fork_rng(devices=[]):
        made: Any = GPT2LMHeadModel(config)
        made.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size)
    return made


def native_outline(model: ModelConfig) -> Any:
    """The model of :func:`load_native_causal_lm` without its weights, on the meta device."""
    import torch

    folder = _folder(model)
    with torch.device("meta"):
        made = _made(_options(folder), str(folder))
    return ready(made, getattr(torch, model.dtype))


def load_native_causal_lm(model: ModelConfig) -> Any:
    """A model of transformers with the weights of a folder in a HookedTransformer's own format."""
    import torch
    from safetensors.torch import load_file

    device, folder = resolve_device(model.device, "model.device", model.dtype), _folder(model)
    options = _options(folder)
    with loading(f"the model in {folder}"):
        made = _made(options, str(folder))
        weights = load_file(folder / NATIVE_WEIGHTS)
        # The masks and their constants are made anew.
        weights = {name: value for name, value in weights.items() if not name.endswith(("mask", "IGNORE"))}
        folded = options.get("normalization_type", "LN") == "LNPre"
        expected = _names(options["n_layers"], folded=folded)
        missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
        if missing or unexpected:
            raise ModelError(
                f"the weights in {folder} lack {missing or 'nothing'} and have the unknown {unexpected or 'nothing'}"
            )
        made.load_state_dict(as_gpt2(weights, options["n_layers"], folded=folded))
    return ready(ready(made, getattr(torch, model.dtype)), device)


def _folder(model: ModelConfig) -> Path:
    folder = model_folder(model.name, {})
    assert folder is not None, model.name
    return folder


def _names(n_layers: int, *, folded: bool) -> set[str]:
    block = {f"attn.{kind}_{part}" for kind in "Wb" for part in "QKVO"}
    block |= {f"mlp.{kind}_{part}" for kind in "Wb" for part in ("in", "out")}
    whole = {"embed.W_E", "pos_embed.W_pos", "unembed.W_U", "unembed.b_U"}
    if not folded:
        block |= {f"ln{number}.{part}" for number in (1, 2) for part in "wb"}
        whole |= {"ln_final.w", "ln_final.b"}
    return whole | {f"blocks.{layer}.{name}" for layer in range(n_layers) for name in block}


def as_gpt2(weights: Mapping[str, Tensor], n_layers: int, *, folded: bool) -> dict[str, Tensor]:
    """The state of a GPT-2 with what a HookedTransformer's ``weights`` compute; ``folded``: its norms have none."""
    import torch

    width = weights["embed.W_E"].shape[1]
    made = {
        "transformer.wte.weight": weights["embed.W_E"],
        "transformer.wpe.weight": weights["pos_embed.W_pos"],
        "lm_head.weight": weights["unembed.W_U"].T.contiguous(),
        "lm_head.bias": weights["unembed.b_U"],
    }
    norms = {"ln_final": "transformer.ln_f"}
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
        norms |= {f"{ours}ln1": f"{theirs}ln_1", f"{ours}ln2": f"{theirs}ln_2"}
        inputs = [weights[f"{ours}attn.W_{part}"] for part in "QKV"]  # [n_heads, d_model, d_head] each
        biases = [weights[f"{ours}attn.b_{part}"].flatten() for part in "QKV"]
        made[f"{theirs}attn.c_attn.weight"] = torch.cat([one.transpose(0, 1).flatten(1) for one in inputs], dim=1)
        made[f"{theirs}attn.c_attn.bias"] = torch.cat(biases)
        made[f"{theirs}attn.c_proj.weight"] = weights[f"{ours}attn.W_O"].flatten(0, 1)
        made[f"{theirs}attn.c_proj.bias"] = weights[f"{ours}attn.b_O"]
        for part, name in (("in", "c_fc"), ("out", "c_proj")):
            made[f"{theirs}mlp.{name}.weight"] = weights[f"{ours}mlp.W_{part}"]
            made[f"{theirs}mlp.{name}.bias"] = weights[f"{ours}mlp.b_{part}"]
    for mine, name in norms.items():
        made[f"{name}.weight"] = torch.ones(width) if folded else weights[f"{mine}.w"]
        made[f"{name}.bias"] = torch.zeros(width) if folded else weights[f"{mine}.b"]
    return made
