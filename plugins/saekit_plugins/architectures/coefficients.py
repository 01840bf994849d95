"""How the weight of sparsity goes over a run: λ, or the number k of active features.

As with learning rates, a warm-up is at the beginning of training and a decay at its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from saekit import ConfigError, SAEConfig
from saekit.config import check

if TYPE_CHECKING:
    from saekit import StepInput
    from saekit.config import TrainConfig

__all__ = ["L1Options", "at_least_0", "check_coefficients", "check_decay", "check_k", "coefficient_at", "k_at"]


@runtime_checkable
class ChecksFeatures(Protocol):
    """Options that not every number of features goes with."""

    def check_features(self, d_sae: int) -> None:
        """:class:`ConfigError` for what so many features cannot be asked for."""
        ...


at_least_0 = check(lambda value: value >= 0, "0 or more")


@attrs.frozen(kw_only=True)
class L1Options(SAEConfig):
    """λ, and how it goes, of architectures with a penalty."""

    l1_coefficient: float = attrs.field(default=5.0, validator=at_least_0)
    """λ, the weight of the sparsity penalty."""
    l1_warm_up_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps over which λ rises from 0: step t of w has `λ t / w`."""
    l1_decay_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps at the end of training over which λ goes to `l1_end`: step j of the last n has `λ + (l1_end − λ) j / n`."""
    l1_end: float = attrs.field(default=0.0, validator=at_least_0)
    """Where λ goes in `l1_decay_steps`."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_decay(self, "l1")

    def l1_at(self, step: StepInput) -> float:
        """λ at a step."""
        return coefficient_at(self, "l1", step)


def check_decay(options: Any, name: str) -> None:
    """:class:`ConfigError` for an end without a decay, or one that changes nothing; λ is ``{name}_coefficient``."""
    whole, steps, end = (getattr(options, f"{name}_{part}") for part in ("coefficient", "decay_steps", "end"))
    if end and not steps:
        raise ConfigError([(f"{name}_end", f"is where {name}_coefficient goes in {name}_decay_steps: give these, too")])
    if steps and end == whole:
        raise ConfigError(
            [(f"{name}_decay_steps", f"lead from {name}_coefficient to {name}_end, and both are {end:g}: leave them "
              "out")]
        )  # fmt: skip


def coefficient_at(options: Any, name: str, at: StepInput) -> float:
    """λ, which is ``{name}_coefficient``, at a step: the first of a warm-up has none.

    A run may take more steps than it was to take, where a source gives batches that are not full: they have the last
    one's.  :class:`ConfigError` for a decay where nobody says how many steps there are.
    """
    whole, rising, falling, end = (
        getattr(options, f"{name}_{part}") for part in ("coefficient", "warm_up_steps", "decay_steps", "end")
    )
    step, steps = at.step, at.steps
    if falling:
        if steps is None:
            raise ConfigError(
                f"sae.{name}_decay_steps are the last steps of training, and StepInput.steps does not say how many "
                "there are"
            )
        into = min(step, steps - 1) - (steps - falling)
        if into >= 0:
            return float(whole + (end - whole) * into / falling)
    return float(whole * min(1.0, step / rising)) if rising else float(whole)


def check_k(options: Any) -> None:
    """:class:`ConfigError` unless ``k_start`` and ``k_warm_up_steps`` are both given, or neither, and lead to ``k``."""
    if (options.k_start is None) != (options.k_warm_up_steps == 0):
        given, lacking = ("k_warm_up_steps", "k_start") if options.k_start is None else ("k_start", "k_warm_up_steps")
        raise ConfigError(
            [(given, f"is of the way from k_start to k in k_warm_up_steps: give {lacking}, too, or neither")]
        )
    if options.k_start == options.k:
        raise ConfigError([("k_start", f"is {options.k:g}, and so is k: leave it and k_warm_up_steps out")])


def k_at(options: Any, step: int) -> int:
    """k at ``step``: linear from ``k_start``, rounded, as sparsify has it."""
    first, last, steps = int(options.k_start), int(options.k), options.k_warm_up_steps
    return last if step >= steps else round(first * (1 - step / steps) + last * (step / steps))


def check_coefficients(options: Any, whole: TrainConfig) -> None:
    """:class:`ConfigError` where training ends before λ or k is what was asked for, and for what as many features as
    the configuration says cannot be asked for."""
    d_sae = options.d_sae or (options.features(options.d_in) if options.d_in else None)
    if d_sae is not None and isinstance(options, ChecksFeatures):
        options.check_features(d_sae)
    steps = whole.training.steps
    for name, aim in (("l1", "l1_coefficient"), ("l0", "l0_coefficient"), ("k", "k")):
        rising, falling = (getattr(options, f"{name}_{part}_steps", 0) for part in ("warm_up", "decay"))
        if rising > steps:
            raise ConfigError(
                [(f"sae.{name}_warm_up_steps", f"is {rising:,}, and training has {steps:,} steps, so {aim} would "
                  "never be reached; lower it, or train longer (training.training_tokens)")]
            )  # fmt: skip
        if rising + falling > steps:
            raise ConfigError(
                [(f"sae.{name}_decay_steps", f"is {falling:,}, after a warm-up of {rising:,}, and training has "
                  f"{steps:,} steps; lower one, or train longer (training.training_tokens)")]
            )  # fmt: skip
