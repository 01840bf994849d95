"""Makes ``tests/golden_transforms/`` with sae-lens 6.54.12, in an environment that has it.

``NAME/`` is a folder that it saved, with ``expected.safetensors``: rows ``x``, and what ``SAE.load_from_disk`` of that
folder computes of them.  ``whitening.safetensors`` has for each architecture tensors before and after
``fold_activation_whitening``, by the names of saekit, and the map that was folded.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_SAE, ROWS = 12, 30, 20
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
}
SITE = {"model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_post"}


def drawn(kind: str, normalize: str, seed: int) -> Any:
    module, config, options = KINDS[kind]
    common = {"d_in": D_IN, "d_sae": D_SAE, "normalize_activations": normalize, "dtype": "float32"}
    sae = module(config(**common, **options, metadata=SAEMetadata(**SITE)))
    generator = torch.Generator().manual_seed(seed)
    for name, value in sae.named_parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator) * (0.3 if value.ndim == 1 else 0.5))
        if name == "threshold":
            value.data.abs_()
    return sae


def rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, D_IN, generator=generator)
    return x * torch.logspace(-2, 2, ROWS)[:, None] + torch.randn(D_IN, generator=generator)


@torch.no_grad()
def normalized(kind: str, normalize: str, seed: int) -> None:
    folder = HERE / f"{kind}_{normalize}"
    drawn(kind, normalize, seed).save_model(folder)
    sae, x = SAE.load_from_disk(folder), rows(seed + 1)
    features = sae.encode(x)
    found = {"x": x, "encode": features, "decode": sae.decode(features), "forward": sae(x)}
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "expected.safetensors")


@torch.no_grad()
def whitened() -> None:
    generator = torch.Generator().manual_seed(5)
    directions = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64))[0]
    sizes = torch.logspace(-1, 1, D_IN, dtype=torch.float64)
    affine = {
        "mean": torch.randn(D_IN, generator=generator, dtype=torch.float64) * 3,
        "matrix": directions / sizes,
        "inverse": sizes[:, None] * directions.T,
    }
    found = {f"map.{name}": value for name, value in affine.items()} | {"x": rows(6)}
    for number, kind in enumerate(KINDS):
        sae = drawn(kind, "none", 20 + number)
        found |= {f"{kind}.before.{name}": value.clone() for name, value in sae.state_dict().items()}
        folded = copy.deepcopy(sae)
        folded.fold_activation_whitening(affine["mean"], affine["matrix"], affine["inverse"])
        found |= {f"{kind}.encode": folded.encode(found["x"]), f"{kind}.forward": folded(found["x"])}
    save_file({name: value.contiguous() for name, value in found.items()}, HERE / "whitening.safetensors")


if __name__ == "__main__":
    for first, normalize in enumerate(("layer_norm", "constant_norm_rescale")):
        for second, kind in enumerate(KINDS):
            normalized(kind, normalize, 10 * first + second)
    whitened()
