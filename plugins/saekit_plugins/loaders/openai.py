"""Pretrained loader ``openai``: the SAEs of OpenAI, ReLU and TopK, for GPT-2 small, ``LOCATION/autoencoders/LAYER.pt``.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import OneOfSeveral, fed, found_files, named, one_file, options, path_of

_PATTERN = r"autoencoders/\d+\.pt"
_LOCATION = re.compile(
    r"(?:^|/)(mlp_post_act|resid_delta_mlp|resid_delta_attn|resid_post_attn|resid_post_mlp)(_v\d[^/]*)?/"
    r"autoencoders/(\d+)\.pt$"
)
_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
_NAMES = {"pre_bias": "b_dec", "latent_bias": "b_enc", "encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T"}
_MODEL: Mapping[str, Any] = {
    "model_name": "gpt2", "model_class_name": "HookedTransformer",
    "model_from_pretrained_kwargs": {"center_writing_weights": False},
}  # fmt: skip
"""Of the model as it was published, not centered as TransformerLens does by default."""
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PLAIN = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")


@attrs.frozen(kw_only=True)
class OpenAIConfig(OneOfSeveral):
    """Which location and layer."""


class OpenAILoader:
    """Reads files whose activation is ReLU, or TopK, whose rows are normalized first."""

    def __init__(self, config: OpenAIConfig) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        if files.chosen:
            return 0.9 if _LOCATION.search(path_of(files, files.chosen)) else 0.0
        names = found_files(files, _PATTERN)
        if not names:
            return 0.0
        return 0.9 if _LOCATION.search(path_of(files, names[0])) else 0.6

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, r"\d+\.pt" if files.chosen else _PATTERN, self._sae, "openai")
        where = f"{name} in {files.place}"
        state = files.state(name)
        activation = state.get("activation")
        if activation not in ("ReLU", "TopK"):
            raise SAEFormatError(f"activation of {where} is {activation!r}, expected 'ReLU' or 'TopK'")
        tensors = named(state, _NAMES, where, unused=(*_STATISTICS, *_PLAIN))
        found = options(tensors, apply_b_dec_to_input=True, activation="saekit:relu")
        topk = activation == "TopK"
        said = _LOCATION.search(path_of(files, name))
        return PretrainedSAE(
            architecture="saekit:topk" if topk else "saekit:standard",
            options={**found, **(_topk(state, found["d_sae"], where) if topk else {})},
            tensors=tensors,
            # Rows are normalized exactly where the activation is TopK.
            input_transform="saekit:layer_norm" if topk else None,
            site=None if said is None else Site(hook_name=f"blocks.{int(said[3])}.{_HOOKS[said[1]]}"),
            **fed({}, _MODEL),
            renamed=_NAMES,
        )


def _topk(state: Mapping[str, Any], d_sae: int, where: str) -> dict[str, Any]:
    """The options of ``topk``, which compares pre-activations as they are, and keeps those above zero."""
    said = state.get("activation_state_dict")
    said = said if isinstance(said, Mapping) else {}
    k, after = said.get("k"), said.get("postact_fn", "ReLU")
    if type(k) is not int or not 1 <= k <= d_sae:
        raise SAEFormatError(f"activation_state_dict.k of {where} is {k!r}, expected a whole number from 1 to {d_sae}")
    if after != "ReLU":
        raise SAEFormatError(f"activation_state_dict.postact_fn of {where} is {after!r}, expected 'ReLU'")
    return {"k": k, "rescale_acts_by_decoder_norm": False}


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "OpenAI's SAEs for GPT-2 small (LOCATION/autoencoders/LAYER.pt)"
    yield Entry("openai", OpenAIConfig, f"{__name__}:OpenAILoader", summary=summary)
