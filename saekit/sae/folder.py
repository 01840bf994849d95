"""An SAE's folder: ``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``.

The layout is the one of sae-lens 6.  What only saekit knows stands in ``cfg.json`` under ``saekit``, which other
readers pass over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import SAEFormatError
from saekit.pretrained.strict_json import check_value
from saekit.storage import new_folder
from saekit.tensor_files import save_tensors

if TYPE_CHECKING:
    from saekit.sae.module import SAE

__all__ = ["CONFIG", "FORMAT", "SPARSITY", "WEIGHTS", "save_sae", "seal", "weights_dtype", "write_sae"]

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
    tensors = sae.public_tensors()
    config = folder_config(sae, tensors)
    sums = {WEIGHTS: save_tensors(folder / WEIGHTS, tensors)}
    if sae.log_sparsity is not None:
        sparsity = {"sparsity": sae.log_sparsity.detach().cpu().float().contiguous()}
        sums[SPARSITY] = save_tensors(folder / SPARSITY, sparsity)
    config["saekit"] |= {"sha256": sums, "seal": seal(config["saekit"])}
    text = (json.dumps(config, indent=2) + "\n").encode()
    (folder / CONFIG).write_bytes(text)
    return sums | {CONFIG: hashlib.sha256(text).hexdigest()}


def seal(own: Mapping[str, Any]) -> str:
    """The checksum of saekit's part of ``cfg.json``, however it is spaced and ordered.

    The files' checksums are not in it: each says itself when it does not fit.
    """
    content = {name: value for name, value in own.items() if name not in ("seal", "sha256")}
    plain = json.loads(json.dumps(content))  # as it will be read: keys are texts, and sorted as such
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_config(sae: SAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``cfg.json`` beside ``tensors``: what sae-lens 6 reads, and saekit's own part.

    The type of the weights is that of the tensors, whatever the SAE was made with.
    """
    dtype = str(weights_dtype(tensors)).removeprefix("torch.")
    _check_metadata(sae.info.metadata)
    site = sae.info.site
    hook_name = site.hook_name if site else ""
    place: Mapping[str, Any] = {"hook_name": hook_name, "hook_head_index": site.hook_head_index} if site else {}
    return {
        **sae.public_config(),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        "normalize_activations": "expected_average_only_in" if sae.info.scale_is_unknown else "none",
        "reshape_activations": "hook_z" if hook_name.endswith("hook_z") and not site_has_head(sae) else "none",
        "metadata": {**_LAYOUT, **sae.info.metadata, **place},
        "saekit": {
            "format": FORMAT,
            "architecture": sae.info.architecture,
            "options": {**sae.saved_options(), "dtype": "float32" if dtype == "float16" else dtype},
            "site": dict(place) or None,
            "metadata": dict(sae.info.metadata),
        },
    }


def weights_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The type of an SAE's weights: the widest of its matrices, or where there are none of all."""
    matrices = [value for value in tensors.values() if value.ndim == 2] or list(tensors.values())
    return reduce(torch.promote_types, (value.dtype for value in matrices))


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    try:
        json.dumps(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise SAEFormatError(f"sae.info.metadata cannot be saved, as it is not plain JSON: {error}") from error
    check_value(dict(metadata), "sae.info.metadata")


def site_has_head(sae: SAE) -> bool:
    """Whether the SAE reads one head alone, so that it sees ``[..., d_head]`` and nothing to flatten."""
    return sae.info.site is not None and sae.info.site.hook_head_index is not None
