"""Pretrained loader ``qwen_scope``: Qwen's topk SAEs, ``layer0.sae.pt`` and so on.

Repositories are called ``SAE-Res-MODEL-W32K-L0_50``, and nothing but this name says k.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from saekit import Entry, PretrainedSAE, SAEFiles, hookimpl
from saekit.config import check
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.reading import (
    OneOfSeveral,
    fed,
    found_files,
    layer_of,
    one_file,
    options,
    path_of,
    site,
    tensors_of,
)

_PATTERN = r"layer\d+\.sae\.pt"
_REPOSITORY = re.compile(r"SAE-Res-([^/]+)-W\d+K-L0_(\d+)(?=/)")
_NAMES = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"}


@attrs.frozen(kw_only=True)
class QwenScopeConfig(OneOfSeveral):
    """What the files do not say."""

    k: int | None = attrs.field(default=None, validator=check(lambda value: value >= 1, "1 or more"))
    """Active features of a row.  None: the number at the end of the repository's name."""


class QwenScopeLoader:
    """Reads ``layer0.sae.pt``, whose matrices lie the other way than saekit's."""

    def __init__(self, config: QwenScopeConfig) -> None:
        self._sae, self._k = config.sae, config.k

    def detects(self, files: SAEFiles) -> float:
        return 0.9 if found_files(files, _PATTERN) else 0.0

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, "qwen_scope")
        tensors = tensors_of(files, name, _NAMES)
        d_sae = tensors["W_enc"].shape[1]
        said = _REPOSITORY.search(path_of(files, name))
        k = self._k if self._k is not None else int(said[2]) if said else None
        if k is None:
            raise SAEFormatError(
                f"{files.place} does not say k: only the name of the repository does (SAE-Res-...-L0_50), which is not "
                "in the path. Give it: loader={'name': 'qwen_scope', 'k': 50}"
            )
        if not 1 <= k <= d_sae:
            raise SAEFormatError(f"k of the SAE in {files.place} is {k}, expected 1 to d_sae = {d_sae}")
        layer = layer_of(name)
        return PretrainedSAE(
            architecture="saekit:topk",
            options=options(tensors, apply_b_dec_to_input=False, k=k, rescale_acts_by_decoder_norm=False),
            tensors=tensors,
            site=site(f"blocks.{layer}.hook_resid_post", name),
            **fed(
                {"model_name": f"Qwen/{said[1]}" if said else None, "hf_hook_name": f"model.layers.{layer}"},
                {"context_size": 1024, "prepend_bos": True},
            ),
            renamed=_NAMES,
        )


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "Qwen's topk SAEs (layer0.sae.pt)"
    yield Entry("qwen_scope", QwenScopeConfig, f"{__name__}:QwenScopeLoader", summary=summary)
