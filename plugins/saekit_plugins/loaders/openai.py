"""Pretrained loader ``openai``: the ReLU SAEs of OpenAI for GPT-2 small, ``LOCATION/autoencoders/LAYER.pt``.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import OneOfSeveral, found_files, named, one_file, options, path_of

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
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PLAIN = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")


@attrs.frozen(kw_only=True)
class OpenAIConfig(OneOfSeveral):
    """Which location and layer."""


class OpenAILoader:
    """Reads files whose activation is ReLU."""

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
        if activation == "TopK":
            raise SAEFormatError(
                f"{where} is a TopK SAE, which normalizes each row before it encodes it (layer norm), and saekit has "
                "no such input transform"
            )
        if activation != "ReLU":
            raise SAEFormatError(f"activation of {where} is {activation!r}, expected 'ReLU'")
        tensors = named(state, _NAMES, where, unused=(*_STATISTICS, *_PLAIN))
        said = _LOCATION.search(path_of(files, name))
        return PretrainedSAE(
            options=options(tensors, apply_b_dec_to_input=True, activation="saekit:relu"),
            tensors=tensors,
            site=None if said is None else Site(hook_name=f"blocks.{int(said[3])}.{_HOOKS[said[1]]}"),
            # Of the model as it was published, not centered as TransformerLens does by default.
            metadata={"model_name": "gpt2", "model_from_pretrained_kwargs": {"center_writing_weights": False}},
            renamed=_NAMES,
        )


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "OpenAI's ReLU SAEs for GPT-2 small (LOCATION/autoencoders/LAYER.pt)"
    yield Entry("openai", OpenAIConfig, f"{__name__}:OpenAILoader", summary=summary)
