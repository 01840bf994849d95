"""Pretrained loader ``goodfire``: Goodfire's SAEs for Llama 3.1 8B and 3.3 70B, one ``.pth`` file each."""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, hookimpl
from saekit_plugins.loaders.reading import LINEAR, OneOfSeveral, found_files, one_file, options, site, tensors_of

_PATTERN = r"Llama-3[^/]*-SAE-l\d+\.pth"
_NAMES = {theirs.replace(".", "_linear."): ours for theirs, ours in LINEAR.items()}


@attrs.frozen(kw_only=True)
class GoodfireConfig(OneOfSeveral):
    """Which file."""


class GoodfireLoader:
    """Reads ``Llama-3...-SAE-l19.pth``; ReLU, and no bias is taken from the input."""

    def __init__(self, config: GoodfireConfig) -> None:
        self._sae = config.sae

    def detects(self, files: SAEFiles) -> float:
        return 0.9 if found_files(files, _PATTERN) else 0.0

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "goodfire")
        tensors = tensors_of(files, name, _NAMES)
        said = re.search(r"(Llama-3[^/]*)-SAE-l(\d+)\.pth$", name)
        model, layer = said.groups() if said else ("", "")
        return PretrainedSAE(
            options=options(tensors, apply_b_dec_to_input=False, activation="saekit:relu"),
            tensors=tensors,
            site=site(f"blocks.{int(layer)}.hook_resid_post", name),
            metadata={"model_name": f"meta-llama/{model}", "prepend_bos": True, "dataset_path": "lmsys/lmsys-chat-1m"},
            renamed=_NAMES,
        )


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "Goodfire's SAEs for Llama 3 (Llama-3...-SAE-l19.pth)"
    yield Entry("goodfire", GoodfireConfig, f"{__name__}:GoodfireLoader", summary=summary)
