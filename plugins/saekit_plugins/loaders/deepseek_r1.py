"""Pretrained loader ``deepseek_r1``: the SAE of qresearch for DeepSeek-R1-Distill-Llama-8B, one ``.pt`` file."""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, hookimpl
from saekit_plugins.loaders.reading import LINEAR, OneOfSeveral, found_files, one_file, options, site, tensors_of

_PATTERN = r"DeepSeek-R1-[^/]*-SAE-l\d+\.pt"


@attrs.frozen(kw_only=True)
class DeepSeekR1Config(OneOfSeveral):
    """Which file."""


class DeepSeekR1Loader:
    """Reads ``DeepSeek-R1-...-SAE-l19.pt``; ReLU, and no bias is taken from the input."""

    def __init__(self, config: DeepSeekR1Config) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        return 0.9 if found_files(files, _PATTERN) else 0.0

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "deepseek_r1")
        tensors = tensors_of(files, name, LINEAR)
        said = re.search(r"(DeepSeek-R1-[^/]*)-SAE-l(\d+)\.pt$", name)
        model, layer = said.groups() if said else ("", "")
        return PretrainedSAE(
            options=options(tensors, apply_b_dec_to_input=False, activation="saekit:relu"),
            tensors=tensors,
            site=site(f"blocks.{int(layer)}.hook_resid_post", name),
            # The format has no field for the rest, which is the same for all of it.
            metadata={
                "model_name": f"deepseek-ai/{model}",
                "context_size": 1024,
                "prepend_bos": True,
                "dataset_path": "lmsys/lmsys-chat-1m",
            },
            renamed=LINEAR,
        )


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "the SAE for DeepSeek-R1-Distill-Llama-8B (DeepSeek-R1-...-SAE-l19.pt)"
    yield Entry("deepseek_r1", DeepSeekR1Config, f"{__name__}:DeepSeekR1Loader", summary=summary)
