"""SAE architecture ``groupmax``: of each of k groups of features the largest one, as sparsify has it.

A group is ``d_sae / k`` features that follow each other.  To choose in groups is cheaper than to choose among all.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.config import NEEDED_TO_LOAD, check
from saekit_plugins.architectures.coefficients import check_coefficients
from saekit_plugins.architectures.topk import TopKConfig


@attrs.frozen(kw_only=True)
class GroupMaxConfig(TopKConfig):
    """``mse + auxk``, where one feature of each of ``k`` groups is active: the largest, if it is above zero."""

    k: int = attrs.field(
        default=32, validator=check(lambda value: value >= 1, "1 or more"), metadata={NEEDED_TO_LOAD: True}
    )
    """Groups, and so the most features of a row that are active.  It divides `d_sae`."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.k_start is not None:
            raise ConfigError([("k_start", "is not for groupmax, whose k groups are of one size; leave it out")])

    def check_features(self, d_sae: int) -> None:
        super().check_features(d_sae)
        if d_sae % self.k:
            raise ConfigError(
                [("sae.k", f"is {self.k}, and {d_sae} features are not so many groups of one size; choose a k that "
                  "divides d_sae")]
            )  # fmt: skip


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = f"{__name__}.module:GroupMaxSAE", "the largest feature of each of k groups"
    yield Entry("groupmax", GroupMaxConfig, build, summary=summary, precheck=check_coefficients)
