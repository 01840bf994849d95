"""SAEs as other libraries save them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def tensors(d_in: int = 6, d_sae: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reconstruct(t: dict[str, torch.Tensor], x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    f = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    return (f.tanh() if tanh else f) @ t["W_dec"] + t["b_dec"]


def write(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


OLD = {"hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2, "hook_point_head_index": None,
       "d_in": 6, "d_sae": 10, "model_name": "gpt2-small"}  # fmt: skip
NEW = {
    "architecture": "standard",
    "d_in": 6,
    "d_sae": 10,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"hook_name": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "sae_lens_version": "6.0.0"},
}
CONNOR = {"act_size": 6, "dict_size": 10, "act_name": "blocks.3.attn.hook_z", "layer": 3}


def write_connor(folder: Path, state: object, name: str = "gpt2-small_L3_Hcat_z", config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{name}.pt")
    (folder / f"{name}_cfg.json").write_text(json.dumps(config or CONNOR))
    return folder
