"""The names of one place in transformer_lens and in transformers.  A helper of the backends' plugins, not a plugin.

They are by the blocks' own forwards in both libraries: what transformer_lens calls ``hook_attn_out`` and
``hook_mlp_out`` is what is added to the residual stream, so after a norm that some models have behind each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

__all__ = ["RESIDUAL", "Layout", "layout_of", "layout_of_architecture"]

RESIDUAL = re.compile(
    r"hook_embed|hook_pos_embed|blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)"
    r"|blocks\.\d+\.hook_(layer_input|out_proj)"  # a Mamba's
)
"""The hooks of transformer_lens that hold the residual stream, or what is added to it as it is."""
_RESIDUAL = {"hook_resid_pre": ".input", "hook_resid_post": ""}


@attrs.frozen
class Layout:
    """Where a family of models holds what transformer_lens has a name for."""

    layers: str
    """The path of the module list."""
    inside: Mapping[str, str] = attrs.field(factory=dict)
    """By transformer_lens' name in a block: what follows a layer's path.  More names of one place come later."""
    outside: Mapping[str, str] = attrs.field(factory=dict)
    """Likewise of names outside of blocks; whole paths."""

    def module_hook(self, name: str) -> str | None:
        """The module's path, of its input with ``.input``, for transformer_lens' ``name``."""
        if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)) is None:
            return self.outside.get(name)
        place = (_RESIDUAL | dict(self.inside)).get(match.group(2))
        return None if place is None else f"{self.layers}.{match.group(1)}{place}"

    def lens_hook(self, path: str) -> str | None:
        """The reverse."""
        if (match := re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)(|\..+)", path)) is not None:
            for name, place in (_RESIDUAL | dict(self.inside)).items():
                if place == match.group(2):
                    return f"blocks.{match.group(1)}.{name}"
        return next((name for name, whole in self.outside.items() if whole == path), None)


def layout_of(model_type: str, *, parallel: bool = False) -> Layout | None:
    """Of a family, as ``model_type`` in a ``config.json`` names it; ``parallel``: whether attention and MLP read the
    same, where a family has both kinds.  None for one that is not known."""
    if model_type in ("gpt2", "gpt_neo"):
        out = "c_proj" if model_type == "gpt2" else "attention.out_proj"
        places = _places("attn", out, "mlp", "c_fc", "c_proj") | _middle("ln_2.input")
        places |= {} if model_type == "gpt2" else _heads("attn.attention")
        return Layout("transformer.h", places, {"hook_embed": "transformer.wte"})
    if model_type == "gpt_neox":
        places = _places("attention", "dense", "mlp", "dense_h_to_4h", "dense_4h_to_h")
        # In a parallel block, the MLP reads what enters the block, and nothing lies between.
        places |= {"hook_mlp_in": ".input"} if parallel else _middle("post_attention_layernorm.input")
        return _rotary("gpt_neox.layers", places)
    if model_type == "gptj":
        places = _places("attn", "out_proj", "mlp", "fc_in", "fc_out") | _heads("attn")
        return _rotary("transformer.h", places | {"hook_mlp_in": ".input"})
    if model_type == "phi":
        places = _places("self_attn", "dense", "mlp", "fc1", "fc2") | _heads("self_attn")
        return _rotary("model.layers", places | {"hook_mlp_in": ".input"})
    if model_type not in _LLAMAS:
        return None
    places = _places("self_attn", "o_proj", "mlp", "gate_proj", "down_proj") | _heads("self_attn")
    places["mlp.hook_pre_linear"] = ".mlp.up_proj"
    if model_type in ("gemma2", "gemma3_text"):
        places |= {"hook_attn_out": ".post_attention_layernorm", "hook_mlp_out": ".post_feedforward_layernorm"}
        return _rotary("model.layers", places | _middle("pre_feedforward_layernorm.input"))
    if model_type == "olmo2":
        places |= {"hook_attn_out": ".post_attention_layernorm", "hook_mlp_out": ".post_feedforward_layernorm"}
        return _rotary("model.layers", places | _middle("mlp.input"))
    return _rotary("model.layers", places | _middle("post_attention_layernorm.input"))


_LLAMAS = {
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
_ARCHITECTURES = {name: family for family, name in _LLAMAS.items()} | {
    "GPT2LMHeadModel": "gpt2", "GPTNeoForCausalLM": "gpt_neo", "GPTNeoXForCausalLM": "gpt_neox",
    "GPTJForCausalLM": "gptj", "PhiForCausalLM": "phi",
}  # fmt: skip


def layout_of_architecture(name: str | None, *, parallel: bool) -> Layout | None:
    """Of the architecture that transformer_lens has kept of a model."""
    family = _ARCHITECTURES.get(name or "")
    return None if family is None else layout_of(family, parallel=parallel)


def _places(attention: str, out: str, mlp: str, first: str, last: str) -> dict[str, str]:
    """Where attention and MLP end, what heads make before it is projected, and what neurons do."""
    return {
        "hook_attn_out": f".{attention}",
        "hook_mlp_out": f".{mlp}",
        "attn.hook_z": f".{attention}.{out}.input",
        "mlp.hook_pre": f".{mlp}.{first}",
        "mlp.hook_post": f".{mlp}.{last}.input",
    }


def _middle(place: str) -> dict[str, str]:
    """The residual stream between attention and MLP."""
    return {"hook_resid_mid": f".{place}", "hook_mlp_in": f".{place}"}


def _heads(attention: str) -> dict[str, str]:
    """Queries, keys and values of models that make each by a module of its own."""
    return {f"attn.hook_{one}": f".{attention}.{one}_proj" for one in "qkv"}


def _rotary(layers: str, places: dict[str, str]) -> Layout:
    """Positions turn queries and keys, so what is embedded enters the first layer as it is."""
    return Layout(layers, places, {"hook_embed": f"{layers}.0.input"})
