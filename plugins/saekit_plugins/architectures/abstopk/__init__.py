"""SAE architecture ``abstopk``: the k features of each row that are largest by size, with their signs.

"AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features" (arXiv 2510.00404).  Features may be below zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit_plugins.architectures.coefficients import check_coefficients
from saekit_plugins.architectures.topk import TopKConfig


@attrs.frozen(kw_only=True)
class AbsTopKConfig(TopKConfig):
    """``mse + auxk``, where ``k`` features of a row are active: the largest by size, whatever their signs."""


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = f"{__name__}.module:AbsTopKSAE", "the k features of each row largest by size, of either sign"
    yield Entry("abstopk", AbsTopKConfig, build, summary=summary, precheck=check_coefficients)
