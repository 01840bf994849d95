"""The options of a toy model.  Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import attrs

from saekit.config.fields import PluginChoice, a_seed, a_size, at_least_0, at_least_1, below_1, plugin_field, positive
from saekit.config.showing import changed_repr
from saekit.config.training import TrainingConfig
from saekit.defaults import DEFAULT_SCHEDULE
from saekit.errors import ConfigError
from saekit.kinds import LR_SCHEDULES

__all__ = ["ToyConfig"]

_COUNTS = (
    "n_features", "n_hidden", "n_correlated_pairs", "n_anticorrelated_pairs", "steps", "batch_size",
    "lr_warm_up_steps", "lr_decay_steps", "seed",
)  # fmt: skip
_SUM = 1 + 1e-9  # of two probabilities that are 1 together but for rounding


@attrs.frozen(kw_only=True)
class ToyConfig:
    """A toy model of superposition, and how it trains (Elhage et al., "Toy Models of Superposition", 2022)."""

    n_features: int = attrs.field(default=5, validator=a_size)
    """The number of true features."""
    n_hidden: int = attrs.field(default=2, validator=a_size)
    """The width of the hidden layer, which all of them share."""
    feature_probability: float | tuple[float, ...] = 0.05
    """How often a feature fires: one number for all, or one for each.  1 minus it is the paper's sparsity S."""
    importance: float | tuple[float, ...] = 1.0
    """What an error at a feature counts in the loss: one number for all, or one for each."""
    n_correlated_pairs: int = attrs.field(default=0, validator=at_least_0)
    """Pairs of features that fire together: 0 and 1, 2 and 3, ..."""
    n_anticorrelated_pairs: int = attrs.field(default=0, validator=at_least_0)
    """Pairs of features that never fire together: those after the correlated ones."""
    loss: Literal["mse", "cross_entropy"] = "mse"
    """`mse`: give every feature back; `cross_entropy`: say which is the largest, or that none fires."""
    steps: int = attrs.field(default=2000, validator=at_least_1)
    """Optimizer steps (Adam), each on new rows."""
    batch_size: int = attrs.field(default=1024, validator=a_size)
    """Rows in a step."""
    lr: float = attrs.field(default=1e-2, validator=positive)
    """The peak learning rate."""
    lr_schedule: PluginChoice = plugin_field(LR_SCHEDULES, DEFAULT_SCHEDULE)
    """The learning rate between warm-up and decay."""
    lr_warm_up_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps of linear warm-up."""
    lr_decay_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps of linear decay to zero at the end; as many as `steps`: a rate that falls all the way."""
    beta1: float = attrs.field(default=0.9, validator=below_1)
    """Adam's decay of the mean of gradients."""
    beta2: float = attrs.field(default=0.999, validator=below_1)
    """Adam's decay of the mean of their squares."""
    dtype: Literal["float32", "float64"] = "float32"
    """The type of weights and activations."""
    seed: int = attrs.field(default=0, validator=a_seed)
    """Seeds the starting weights and the rows that it trains on."""

    __repr__ = changed_repr

    def __attrs_post_init__(self) -> None:
        problems = [
            *self._faults_of_counts(),
            *self._faults_of_each("feature_probability", "above 0, at most 1", lambda value: 0 < value <= 1),
            *self._faults_of_each("importance", "0 or more, and finite", lambda value: 0 <= value < float("inf")),
        ]
        if not problems:
            problems = self._faults_of_pairs()
        if problems:
            raise ConfigError(problems)
        self.training()  # which refuses more warm-up and decay than steps

    def training(self) -> TrainingConfig:
        """Steps and rates as schedules are given them."""
        return TrainingConfig(
            training_tokens=self.steps * self.batch_size, train_batch_size_tokens=self.batch_size, lr=self.lr,
            lr_warm_up_steps=self.lr_warm_up_steps, lr_decay_steps=self.lr_decay_steps, seed=self.seed,
        )  # fmt: skip

    @property
    def probabilities(self) -> tuple[float, ...]:
        """How often each feature fires."""
        return self._of_each(self.feature_probability)

    @property
    def importances(self) -> tuple[float, ...]:
        """What an error at each feature counts."""
        return self._of_each(self.importance)

    @property
    def correlated_pairs(self) -> tuple[tuple[int, int], ...]:
        """Features that fire together."""
        return tuple((2 * pair, 2 * pair + 1) for pair in range(self.n_correlated_pairs))

    @property
    def anticorrelated_pairs(self) -> tuple[tuple[int, int], ...]:
        """Features that never fire together."""
        first = self.n_correlated_pairs
        return tuple((2 * pair, 2 * pair + 1) for pair in range(first, first + self.n_anticorrelated_pairs))

    @property
    def mean_l0(self) -> float:
        """Features that fire in a row, on average."""
        return sum(self.probabilities)

    def _of_each(self, value: float | tuple[float, ...]) -> tuple[float, ...]:
        return tuple(map(float, value)) if isinstance(value, (tuple, list)) else (float(value),) * self.n_features

    def _faults_of_counts(self) -> list[tuple[str, str]]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return [
            (name, f"must be a whole number, found {value!r}")
            for name, value in counts.items()
            if type(value) is not int
        ]

    def _faults_of_each(self, name: str, expected: str, fine: Callable[[float], bool]) -> list[tuple[str, str]]:
        value = getattr(self, name)
        several = isinstance(value, (tuple, list))
        if several and len(value) != self.n_features:
            return [(name, f"has {len(value)} numbers for {self.n_features} features; give one, or one for each")]
        numbers = value if several else (value,)
        wrong = [
            number
            for number in numbers
            if isinstance(number, bool) or not (isinstance(number, (int, float)) and fine(number))
        ]
        return [(name, f"must be {expected}, found {wrong[0]!r}")] if wrong else []

    def _faults_of_pairs(self) -> list[tuple[str, str]]:
        wanted = 2 * (self.n_correlated_pairs + self.n_anticorrelated_pairs)
        if wanted > self.n_features:
            return [
                ("n_correlated_pairs", f"{self.n_correlated_pairs} correlated and {self.n_anticorrelated_pairs} "
                 f"anticorrelated pairs are {wanted} features, and there are {self.n_features}; ask for fewer pairs")
            ]  # fmt: skip
        chance = self.probabilities
        faults = [
            ("feature_probability", f"is {chance[one]:g} for feature {one} and {chance[other]:g} for feature {other}, "
             "a correlated pair: features that fire together fire equally often; give both the same")
            for one, other in self.correlated_pairs if chance[one] != chance[other]
        ]  # fmt: skip
        return faults + [
            ("feature_probability", f"is {chance[one]:g} for feature {one} and {chance[other]:g} for feature {other}, "
             "an anticorrelated pair: features that never fire together have at most 1 in sum")
            for one, other in self.anticorrelated_pairs if chance[one] + chance[other] > _SUM
        ]  # fmt: skip
