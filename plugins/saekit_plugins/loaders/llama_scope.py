"""Pretrained loaders ``llama_scope`` and ``llama_scope_r1_distill``: the SAEs of OpenMOSS for Llama 3.1 8B.

He et al. 2024, "Llama Scope" (arXiv 2410.20526).  Their weights are for activations times
s = √d_model / their mean norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, hookimpl
from saekit.config import check
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import (
    LINEAR,
    OneOfSeveral,
    beside,
    fed,
    found_files,
    missing_beside,
    one_file,
    options,
    path_of,
    peeked,
    site,
    tensors_of,
    text,
    whole_number,
)  # fmt: skip

_FINAL = r"checkpoints/final\.safetensors"
_DISTILLED = r"sae_weights\.safetensors"
_KEYS = ("sae_type", "act_fn", "expansion_factor")
_THRESHOLD = "log_jumprelu_threshold"


@attrs.frozen(kw_only=True)
class LlamaScopeConfig(OneOfSeveral):
    """For ``Llama3_1-8B-Base-L3R-8x/checkpoints/final.safetensors`` and the ``hyperparams.json`` above it."""

    activation_scale: float | None = attrs.field(default=None, validator=check(lambda value: value > 0, "above 0"))
    """s, which is folded into the weights.  None: as ``hyperparams.json`` says."""


@attrs.frozen(kw_only=True)
class LlamaScopeR1Config(OneOfSeveral):
    """For ``L3R/sae_weights.safetensors`` and the ``config.json`` beside it."""

    activation_scale: float | None = attrs.field(default=None, validator=check(lambda value: value > 0, "above 0"))
    """s, which is folded into the weights.  No file of the release says it: it must be given, unless the SAE is loaded
    by its release and id, of which saekit knows it."""


class LlamaScopeLoader:
    """JumpReLU of one threshold, which the file has in units of the activations as they are."""

    def __init__(self, config: LlamaScopeConfig) -> None:
        self._sae, self._scale = config.sae, config.activation_scale

    def detects(self, files: SAEFiles) -> float:
        found = found_files(files, _FINAL if not files.chosen else r"final\.safetensors")
        return 0.95 if any(_above(files, name) for name in found) else 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        for name in found_files(files, r"final\.safetensors" if files.chosen else _FINAL):
            if _above(files, name) is None:
                return f"hyperparams.json in the folder above {name}"
        return missing_beside(files, r"hyperparams\.json", "checkpoints/final.safetensors")

    def load(self, files: SAEFiles) -> PretrainedSAE:
        if files.chosen:
            raise SAEFormatError(
                f"{files.place} is one file of several: load the folder with hyperparams.json and checkpoints in it"
            )
        name = one_file(files, _FINAL, self._sae, "llama_scope")
        said = _above(files, name)
        if said is None:
            raise SAEFormatError(f"{files.place} has no hyperparams.json above {name}")
        config, where = files.json(said), f"{said} in {files.place}"
        _check_kind(config, where)
        scale = self._scale_of(config, where)
        threshold = _number(config, "jump_relu_threshold", where, zero=True)
        tensors = tensors_of(files, name, LINEAR)
        _check_sizes(config, tensors, where)
        tensors["threshold"] = tensors["b_enc"].float().new_full(tensors["b_enc"].shape, threshold * scale)
        return PretrainedSAE(
            architecture="saekit:jumprelu",
            options=options(tensors, apply_b_dec_to_input=False),
            tensors=tensors,
            site=site(_hook(config, where), where),
            activation_scale=scale,
            **fed({"model_name": _MODEL if "Llama3_1-8B-Base" in path_of(files, name) else None}, _FED),
            renamed=LINEAR | {"jump_relu_threshold": "threshold", "d_model": "d_in", "hook_point_in": "hook_name"},
        )

    def _scale_of(self, config: Mapping[str, Any], where: str) -> float:
        """s; the norms of what is read and of what is written must be the same."""
        norms = config.get("dataset_average_activation_norm")
        if not isinstance(norms, dict):
            raise SAEFormatError(f"dataset_average_activation_norm in {where} is {norms!r}, expected an object")
        read, written = (_number(norms, end, f"dataset_average_activation_norm of {where}") for end in ("in", "out"))
        if read != written:
            raise SAEFormatError(
                f"{where} has the norms {read:g} in and {written:g} out: this loader reads SAEs, whose norms are one"
            )
        scale = math.sqrt(whole_number(config, "d_model", where)) / read
        if self._scale is not None and not math.isclose(self._scale, scale, rel_tol=1e-5):
            raise SAEFormatError(f"activation_scale is {self._scale}, but {where} says {scale}; leave the option out")
        return scale


class LlamaScopeR1Loader:
    """JumpReLU of a threshold for each feature, in units of scaled activations."""

    def __init__(self, config: LlamaScopeR1Config) -> None:
        self._sae, self._scale = config.sae, config.activation_scale

    def detects(self, files: SAEFiles) -> float:
        for name in found_files(files, _DISTILLED):
            if {*_KEYS} <= peeked(files, beside(files, name, "config.json")).keys():
                return 0.95
        return 0.0

    def missing_part(self, files: SAEFiles) -> str | None:
        return missing_beside(files, r"config\.json", "sae_weights.safetensors", keys=_KEYS)

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _DISTILLED, self._sae, "llama_scope_r1_distill")
        said = beside(files, name, "config.json")
        if said is None:
            raise SAEFormatError(f"{files.place} has no config.json beside {name}")
        config, where = files.json(said), f"{said} in {files.place}"
        _check_kind(config, where)
        said = files.said("norm_scaling_factor")
        scale = said if self._scale is None else self._scale
        if scale is None:
            raise SAEFormatError(
                f"{files.place} is for activations that are multiplied by a factor, and no file of this release says "
                "which: it is sqrt(d_model) / their mean norm. Give it: "
                "loader={'name': 'llama_scope_r1_distill', 'activation_scale': ...}"
            )
        tensors = tensors_of(files, name, LINEAR | {_THRESHOLD: "threshold"})
        tensors["threshold"] = tensors["threshold"].exp()
        _check_sizes(config, tensors, where)
        return PretrainedSAE(
            architecture="saekit:jumprelu",
            options=options(tensors, apply_b_dec_to_input=False),
            tensors=tensors,
            site=site(_hook(config, where), where),
            activation_scale=scale,
            **fed({}, _FED | {"model_name": _MODEL}),
            renamed=LINEAR | {_THRESHOLD: "log of threshold", "d_model": "d_in", "hook_point_in": "hook_name"},
        )


_MODEL = "meta-llama/Llama-3.1-8B"
_FED = {"context_size": 1024, "prepend_bos": True, "dataset_path": "cerebras/SlimPajama-627B"}


def _above(files: SAEFiles, name: str) -> str | None:
    """The ``hyperparams.json`` of a file in ``checkpoints``."""
    folder = name.rpartition("checkpoints/")[0]
    return f"{folder}hyperparams.json" if f"{folder}hyperparams.json" in files.names else None


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    """:class:`SAEFormatError` for what is computed in another way."""
    expected = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "use_glu_encoder": False,
                "apply_decoder_bias_to_pre_encoder": False, "sae_type": "sae"}  # fmt: skip
    for name, value in expected.items():
        needed = name in ("act_fn", "norm_activation")
        if config.get(name, None if needed else value) != value:
            raise SAEFormatError(f"{name} in {where} is {config.get(name)!r}, and this loader reads {value!r} alone")


def _hook(config: Mapping[str, Any], where: str) -> str:
    read, written = text(config, "hook_point_in", where), text(config, "hook_point_out", where)
    if read is None or written not in (None, read):
        raise SAEFormatError(
            f"hook_point_in and hook_point_out in {where} are {read!r} and {written!r}, expected one hook: this loader "
            "reads SAEs, and no transcoders"
        )
    return read


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> None:
    d_model = whole_number(config, "d_model", where)
    d_sae = config.get("d_sae")
    d_sae = d_model * whole_number(config, "expansion_factor", where) if d_sae is None else d_sae
    if (found := list(tensors["W_enc"].shape)) != [d_model, d_sae]:
        raise SAEFormatError(f"the encoder beside {where} is for {found}, and that says {[d_model, d_sae]}")


def _number(table: Mapping[str, Any], name: str, where: str, *, zero: bool = False) -> float:
    value = table.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (0 < value < math.inf or (zero and not value))
    ):
        raise SAEFormatError(
            f"{name} in {where} is {value!r}, expected a number {'of 0 or more' if zero else 'above 0'}"
        )
    return float(value)


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    yield Entry(
        "llama_scope",
        LlamaScopeConfig,
        f"{__name__}:LlamaScopeLoader",
        summary="SAEs of Llama Scope (hyperparams.json, checkpoints/final.safetensors)",
    )
    yield Entry(
        "llama_scope_r1_distill",
        LlamaScopeR1Config,
        f"{__name__}:LlamaScopeR1Loader",
        summary="SAEs of Llama Scope R1 Distill (config.json, sae_weights.safetensors)",
    )
