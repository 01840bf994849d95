"""Saved SAEs of every format: the files, what a loader makes of them, and the SAE in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports

if TYPE_CHECKING:
    from saekit.pretrained.files import PretrainedSAE, SAEFiles
    from saekit.pretrained.load import load_sae

__all__ = ["PretrainedSAE", "SAEFiles", "load_sae"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "SAEFiles": "saekit.pretrained.files",
        "PretrainedSAE": "saekit.pretrained.files",
        "load_sae": "saekit.pretrained.load",
    },
)
