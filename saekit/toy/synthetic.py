"""Known ground truth of growing difficulty: what `saekit bench-synthetic` trains on, and the table of what came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from saekit.config.fields import a_seed, a_size, at_least_1, positive
from saekit.errors import ConfigError
from saekit.toy.config import ToyConfig

__all__ = [
    "AXES", "MEASURES", "Setting", "SyntheticBench", "averaged", "short_names", "sparsity_choices",
    "told_problem",
]  # fmt: skip

AXES: Mapping[str, str] = {
    "l0": "True features that fire in a row (L0)",
    "correlated": "Share of features in correlated pairs",
    "superposition": "True features per dimension",
}
"""What changes, by option, in words."""
MEASURES: Mapping[str, str] = {
    "mmcs": "MMCS", "precision": "Precision", "recall": "Recall", "f1": "F1", "l0": "L0", "true_l0": "True L0",
}  # fmt: skip
"""What is told of each SAE, by the names of :class:`saekit.toy.Recovery`."""
_COEFFICIENTS, _FACTORS = ("l1_coefficient", "l0_coefficient"), (0.3, 1.0, 3.0)


@attrs.frozen
class Setting:
    """One kind of data."""

    l0: float
    correlated: float
    superposition: float
    n_hidden: int

    def toy(self, seed: int) -> ToyConfig:
        """The toy model's options; :class:`ConfigError` where there are none like it."""
        n_features = round(self.superposition * self.n_hidden)
        if self.l0 > n_features:
            raise ConfigError(
                [("l0", f"is {self.l0:g}, and {self.superposition:g} features for each of {self.n_hidden} dimensions "
                  f"are {n_features} features, of which no more can fire; lower it, or raise superposition")]
            )  # fmt: skip
        return ToyConfig(
            n_features=n_features, n_hidden=self.n_hidden, feature_probability=self.l0 / n_features,
            n_correlated_pairs=round(self.correlated * n_features / 2), seed=seed,
        )  # fmt: skip

    def length(self) -> float:
        """Of each true direction: rows then have a mean square norm near ``n_hidden``, for which defaults of
        architectures are made.  A feature that fires has a mean square of 1/3."""
        return math.sqrt(3 * self.n_hidden / self.l0)


def _values(name: str, fine: Any, expected: str) -> Any:
    def check(_: object, attribute: object, values: Sequence[float]) -> None:
        wrong = [value for value in values if not (math.isfinite(value) and fine(value))]
        if wrong or not values:
            found = f"{wrong[0]!r}" if wrong else "none"
            raise ConfigError([(name, f"must be one or more numbers, each {expected}; found {found}")])

    return check


@attrs.frozen(kw_only=True)
class SyntheticBench:
    """What is trained, and on what.  Of each axis the first value stays while another axis changes."""

    architectures: tuple[str, ...] = ()
    """Keys of architectures; none: every one that trains on one site."""
    l0: tuple[float, ...] = attrs.field(default=(2, 1, 4), validator=_values("l0", lambda v: v > 0, "above 0"))
    """How many true features fire in a row, on average."""
    correlated: tuple[float, ...] = attrs.field(
        default=(0, 0.5, 1), validator=_values("correlated", lambda v: 0 <= v <= 1, "from 0 to 1")
    )
    """The share of features that are in pairs which fire together."""
    superposition: tuple[float, ...] = attrs.field(
        default=(2, 1, 4), validator=_values("superposition", lambda v: v > 0, "above 0")
    )
    """True features for each dimension of the hidden layer."""
    n_hidden: int = attrs.field(default=20, validator=a_size)
    """The width of the hidden layer."""
    steps: int = attrs.field(default=300, validator=at_least_1)
    """Steps of each SAE."""
    batch_size: int = attrs.field(default=1024, validator=a_size)
    """Rows in a step."""
    lr: float = attrs.field(default=3e-3, validator=positive)
    """The peak learning rate; it falls to zero over the second half."""
    seeds: int = attrs.field(default=1, validator=at_least_1)
    """How often all is trained, each time with other directions, rows and starting weights."""
    seed: int = attrs.field(default=0, validator=a_seed)
    """The first seed; the others follow it."""

    def __attrs_post_init__(self) -> None:
        for setting in self.settings():
            setting.toy(self.seed)

    def settings(self) -> dict[Setting, list[str]]:
        """Each kind of data with the axes that it is a point of."""
        base = Setting(self.l0[0], self.correlated[0], self.superposition[0], self.n_hidden)
        found: dict[Setting, list[str]] = {base: []}
        for axis in AXES:
            for value in sorted(set(getattr(self, axis))):
                found.setdefault(attrs.evolve(base, **{axis: value}), []).append(axis)
        return found

    def run(self, sae: Mapping[str, Any], toy: str, folder: str, seed: int) -> dict[str, Any]:
        """The configuration of a run, all but the backend and the source: ``sae`` on the toy model ``toy``, a file."""
        return {
            "activations": {"source": {"path": toy}},
            "site": {"hook_name": "hidden"},
            "sae": dict(sae),
            "evals": {"run": [], "held_out_every": 0},
            "training": {
                "training_tokens": self.steps * self.batch_size, "train_batch_size_tokens": self.batch_size,
                "lr": self.lr, "lr_decay_steps": self.steps // 2, "seed": seed, "device": "cpu", "verbose": False,
            },
            "checkpoints": {"folder": folder},
            "reports": {"pictures": False},
        }  # fmt: skip


def sparsity_choices(options: type, setting: Setting, n_features: int) -> list[dict[str, Any]]:
    """The options to try of an architecture whose options class is ``options``.

    ``k`` is the true L0.  A coefficient means something else for each architecture, so a few are tried, as parts of its
    default, and the SAE counts whose L0 is nearest to the true one: nobody needs the true directions for that.
    """
    fields = {field.name: field for field in attrs.fields(options)}
    table: dict[str, Any] = {"d_sae": n_features}
    if "k" in fields:
        table["k"] = max(round(setting.l0), 1)
    for name in _COEFFICIENTS:
        if name in fields and isinstance(fields[name].default, (int, float)):
            return [{**table, name: factor * fields[name].default} for factor in _FACTORS]
    return [table]


def averaged(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows that differ in their seed alone as one, with the mean of their numbers and how many there are (``n``)."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], *(row["setting"][axis] for axis in AXES)), []).append(row)
    for members in groups.values():
        means = {name: sum(row[name] for row in members) / len(members) for name in MEASURES}
        yield {**members[0], **means, "n": len(members)}


def short_names(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What to call each architecture: its name, with its distribution only where two have the same."""
    keys = list(dict.fromkeys(str(row["architecture"]) for row in rows))
    names = [key.partition(":")[2] for key in keys]
    return {key: name if names.count(name) == 1 else key for key, name in zip(keys, names, strict=True)}


def told_problem(row: Mapping[str, Any]) -> str:
    """In words, of a row without numbers."""
    kind = ", ".join(f"{axis} {row['setting'][axis]:g}" for axis in AXES)
    return f"{row['architecture']} ({kind}, seed {row['seed']}): {row['problem']}"
