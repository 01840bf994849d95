"""Pretrained loaders ``gemma_2``, ``gemma_2_transcoder`` and ``gemma_3``: Gemma Scope and Gemma Scope 2.

Lieberum et al. 2024, "Gemma Scope" (arXiv 2408.05147).  What an SAE is for stands in the path alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs

from saekit import Entry, hookimpl
from saekit_plugins.loaders.reading import OneOfSeveral

FED = {"context_size": 1024, "prepend_bos": True, "dataset_path": "monology/pile-uncopyrighted"}
"""Metadata that no file of either says."""


@attrs.frozen(kw_only=True)
class GemmaScopeConfig(OneOfSeveral):
    """What the path does not say."""

    repo: str | None = None
    """The repository's name, such as `google/gemma-scope-2b-pt-res`, from which model and hook follow.  None: as in the
    path, if it is there."""


@attrs.frozen(kw_only=True)
class Gemma2Config(GemmaScopeConfig):
    """For ``layer_7/width_16k/average_l0_30/params.npz``."""


@attrs.frozen(kw_only=True)
class Gemma2TranscoderConfig(GemmaScopeConfig):
    """The same, from the input of an MLP to its output."""


@attrs.frozen(kw_only=True)
class Gemma3Config(GemmaScopeConfig):
    """For ``resid_post/layer_9_width_16k_l0_small/params.safetensors``."""

    kind: Literal["resid_post", "attn_out", "mlp_out", "transcoder", "clt"] | None = None
    """What it is, as the folders of the repository are named.  None: as `config.json` or else the path says."""


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    older, newer = f"{__name__}.gemma_2", f"{__name__}.gemma_3"
    yield Entry("gemma_2", Gemma2Config, f"{older}:Gemma2Loader", summary="SAEs of Gemma Scope (params.npz)")
    yield Entry(
        "gemma_2_transcoder",
        Gemma2TranscoderConfig,
        f"{older}:Gemma2TranscoderLoader",
        summary="transcoders of Gemma Scope (params.npz)",
    )
    yield Entry(
        "gemma_3",
        Gemma3Config,
        f"{newer}:Gemma3Loader",
        summary="SAEs, transcoders and cross-layer transcoders of Gemma Scope 2 (params.safetensors)",
    )
