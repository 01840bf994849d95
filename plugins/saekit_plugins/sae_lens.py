"""Pretrained loader ``sae_lens``: the folders that sae-lens 2 to 6 write."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
_RENAMED = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
_METADATA = ("model_name", "hook_layer", "context_size", "prepend_bos", "dataset_path", "normalize_activations")


@attrs.frozen(kw_only=True)
class SaeLensConfig:
    """No options."""


class SaeLensLoader:
    """Reads ``cfg.json``, ``sae_weights.safetensors`` and, if it is there, ``sparsity.safetensors``."""

    def detects(self, files: SAEFiles) -> bool:
        return {CONFIG, WEIGHTS} <= files.names

    def load(self, files: SAEFiles) -> PretrainedSAE:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = read_config(files.json(CONFIG), files.place)
        try:
            tensors = load_file(files.path(WEIGHTS))
            sparsity = load_file(files.path(SPARSITY))["sparsity"] if SPARSITY in files.names else None
        except (SafetensorError, KeyError) as error:
            raise SAEFormatError(f"the tensors in {files.place} cannot be read: {error}") from error
        return PretrainedSAE(
            options=_options(config, files.place),
            tensors=_tensors(tensors),
            site=Site(hook_name=config["hook_name"], hook_head_index=config.get("hook_head_index")),
            log_sparsity=sparsity,
            metadata={key: config[key] for key in _METADATA if key in config},
        )


def read_config(raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """``cfg.json`` of any version as one flat table with today's names."""
    flat = {**raw.get("metadata", {}), **raw} if isinstance(raw.get("metadata"), Mapping) else dict(raw)
    config = {_RENAMED.get(key, key): value for key, value in flat.items()}
    # ReLU is the default only where neither spelling of the activation is there.
    config["activation"] = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    config.setdefault("prepend_bos", True)
    config.setdefault("apply_b_dec_to_input", True)
    if missing := [key for key in ("d_in", "d_sae", "hook_name") if config.get(key) is None]:
        raise SAEFormatError(f"{CONFIG} in {place} lacks {', '.join(missing)}")
    return config


def _options(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    architecture = config.get("architecture", "standard")
    if architecture != "standard":
        raise SAEFormatError(f"{place} holds a sae-lens {architecture!r} SAE; this loader reads 'standard' ones")
    normalisation = config.get("normalize_activations")
    if normalisation in (True, "expected_average_only_in"):
        warnings.warn(
            f"{place} was trained on activations scaled to mean norm sqrt(d_in) and does not hold the factor: scale "
            "its input before use",
            stacklevel=2,
        )
    elif normalisation not in (None, False, "none"):
        raise SAEFormatError(f"{place} normalises its activations by {normalisation!r}, which this loader cannot apply")
    return {
        "d_in": config["d_in"],
        "d_sae": config["d_sae"],
        "activation": config["activation"],
        "apply_b_dec_to_input": config["apply_b_dec_to_input"],
        "normalize_sae_decoder": False,
    }


def _tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in ("scaling_factor", "finetuning_scaling_factor"):  # of 2.x, and of 3 and 4
        factor = tensors.pop(name, None)
        if factor is not None and not bool((factor == 1).all()):
            tensors["scaling_factor"] = factor
    return tensors


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    yield Entry("sae_lens", SaeLensConfig, _build, summary="folders of sae-lens 2 to 6 (cfg.json, safetensors)")


def _build(config: SaeLensConfig) -> SaeLensLoader:
    return SaeLensLoader()
