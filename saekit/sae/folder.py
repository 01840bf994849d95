"""An SAE's folder: ``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``.

The layout is the one of sae-lens 6.  What only saekit knows stands in ``cfg.json`` under ``saekit``, which other
readers pass over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.storage import new_folder
from saekit.tensor_files import save_tensors

if TYPE_CHECKING:
    from saekit.sae.module import SAE

__all__ = ["CONFIG", "SPARSITY", "WEIGHTS", "save_sae", "write_sae"]

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
FORMAT = 1
# The metadata fields by which sae-lens 6 tells its own layout from older ones.
_LAYOUT = {"sae_lens_version": "6.0.0", "sae_lens_training_version": None}


def save_sae(sae: SAE, path: Path) -> Path:
    """Write ``sae`` to the folder ``path``, replacing one that is there; returns ``path``."""
    with new_folder(path) as folder:
        write_sae(sae, folder)
    return path


def write_sae(sae: SAE, folder: Path) -> dict[str, str]:
    """Write the files of ``sae`` into ``folder``, which is there; returns their checksums."""
    config = folder_config(sae)
    sums = {WEIGHTS: save_tensors(folder / WEIGHTS, sae.public_tensors())}
    if sae.log_sparsity is not None:
        sparsity = {"sparsity": sae.log_sparsity.detach().cpu().float().contiguous()}
        sums[SPARSITY] = save_tensors(folder / SPARSITY, sparsity)
    config["saekit"]["sha256"] = sums
    text = (json.dumps(config, indent=2) + "\n").encode()
    (folder / CONFIG).write_bytes(text)
    return sums | {CONFIG: hashlib.sha256(text).hexdigest()}


def folder_config(sae: SAE) -> dict[str, Any]:
    """``cfg.json``: what sae-lens 6 reads, and saekit's own part."""
    site = sae.info.site
    hook_name = site.hook_name if site else ""
    place: Mapping[str, Any] = {"hook_name": hook_name, "hook_head_index": site.hook_head_index} if site else {}
    return {
        **sae.public_config(),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": sae.config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook_name.endswith("hook_z") and not site_has_head(sae) else "none",
        "metadata": {**_LAYOUT, **sae.info.metadata, **place},
        "saekit": {
            "format": FORMAT,
            "architecture": sae.info.architecture,
            "options": sae.saved_options(),
            "site": dict(place) or None,
            "metadata": dict(sae.info.metadata),
        },
    }


def site_has_head(sae: SAE) -> bool:
    """Whether the SAE reads one head alone, so that it sees ``[..., d_head]`` and nothing to flatten."""
    return sae.info.site is not None and sae.info.site.hook_head_index is not None
