"""SAE architecture ``matryoshka``: a ``batchtopk`` whose first features reconstruct alone, too.

Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders" (arXiv 2503.17547).  General
features come first, which special ones do not take over.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.config import NEEDED_TO_LOAD
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.coefficients import check_coefficients

_PAPER = (1 / 32, 3 / 32, 7 / 32, 15 / 32)


def _is_width(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value <= 1


def _check_widths(_: object, attribute: Any, value: tuple[int | float, ...]) -> None:
    if wrong := [width for width in value if not _is_width(width)]:
        raise ConfigError(
            [(attribute.name, f"must be numbers of features (whole, 1 or more) or parts of them all (with a point, "
              f"above 0 and at most 1.0), found {wrong[0]!r}")]
        )  # fmt: skip


def _check_weights(_: object, attribute: Any, value: tuple[float, ...] | None) -> None:
    if value is not None and any(not 0 <= weight < float("inf") for weight in value):
        raise ConfigError([(attribute.name, f"must be finite numbers of 0 or more, found {list(value)}")])
    if value is not None and not any(value):
        raise ConfigError([(attribute.name, f"must not all be 0, found {list(value)}: nothing would be learned")])


@attrs.frozen(kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """``(Σ_g c_g mse_g + auxk) / unit``, where ``mse_g`` is of the reconstruction by the first features up to a width.

    The last level has all of them.  Which features are active is decided once, among all, as in ``batchtopk``.
    """

    widths: tuple[int | float, ...] = attrs.field(
        default=_PAPER, validator=_check_widths, metadata={NEEDED_TO_LOAD: True}
    )
    """Where levels end, rising: whole numbers are numbers of features (`[512, 2048]`), others parts of `d_sae` (`[0.25,
    0.5]`).  All features are the last level, whether it is named or not.  The default are the paper's levels."""
    level_loss: Literal["sum", "mean"] = "sum"
    """The levels' squared errors, each times its weight, summed as in the paper and in sae-lens, or their mean as in
    dictionary_learning."""
    level_weights: tuple[float, ...] | None = attrs.field(default=None, validator=_check_weights)
    """A weight for each level, with that of all features.  None: 1 each.  dictionary_learning's are 1 over the number
    of levels, beside `level_loss = "mean"`."""
    aux_loss_levels: Literal["each", "whole"] = "each"
    """What dead features learn by AuxK: what the first level that they are in leaves over, or (`whole`) what all
    features do, as in dictionary_learning, and in sae-lens without `use_matryoshka_aux_loss`."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.aux_loss_levels != "each" and not self.aux_weight:
            raise ConfigError([("aux_loss_levels", "is of AuxK, and aux_loss_coefficient is 0: leave it out")])

    def check_features(self, d_sae: int) -> None:
        super().check_features(d_sae)
        self.level_factors(d_sae)

    def level_ends(self, d_sae: int) -> tuple[int, ...]:
        """Of ``d_sae`` features those that each level has, rising to all; :class:`ConfigError` if they do not rise."""
        ends = [width if isinstance(width, int) else round(Fraction(repr(width)) * d_sae) for width in self.widths]
        if not ends or ends[-1] != d_sae:
            ends.append(d_sae)
        if any(end >= after for end, after in zip([0, *ends], ends, strict=False)):
            raise ConfigError(
                [("sae.widths", f"are {list(self.widths)}, so that levels end at {ends}; each must be larger than the "
                  f"one before, from 1 or more to all {d_sae:,} features, which need not be written")]
            )  # fmt: skip
        return tuple(ends)

    def level_factors(self, d_sae: int) -> tuple[float, ...]:
        """What each level's mean squared error is multiplied by; :class:`ConfigError` unless each has a weight."""
        levels = len(self.level_ends(d_sae))
        weights = (1.0,) * levels if self.level_weights is None else self.level_weights
        if len(weights) != levels:
            raise ConfigError(
                [("sae.level_weights", f"are {len(weights)}, and there are {levels} levels: those that end at widths, "
                  "and all features")]
            )  # fmt: skip
        return weights if self.level_loss == "sum" else tuple(weight / levels for weight in weights)


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = f"{__name__}.module:MatryoshkaSAE", "a batchtopk whose first features reconstruct alone, too"
    yield Entry("matryoshka", MatryoshkaConfig, build, summary=summary, precheck=check_coefficients)
