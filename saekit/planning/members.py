"""The SAEs of a plan: which there are, which are alike, and which of them one process trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from saekit.config import SAEConfig, TrainConfig, TrainingConfig
from saekit.planning.findings import of_all
from saekit.plugins.manager import PluginManager
from saekit.runs.sweep import spelled_out
from saekit.training.elsewhere import dealt_out
from saekit.values import Ports

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["PlannedMember", "here_of", "longest_of", "training_doubts", "training_text"]

_NO_COST = (
    "model.", "dataset.", "site.", "inputs", "targets", "tokens.", "activations.source", "activations.cache",
    "lr_schedule", "training.seed", "evals.", "trackers", "checkpoints.", "reports.",
)  # fmt: skip
"""What of a configuration says nothing of what a step takes; of the sites, their widths do."""


@attrs.define(eq=False)
class PlannedMember:
    """One SAE of a plan."""

    name: str
    config: TrainConfig
    options: SAEConfig
    start: SAEModule | None = None
    """The saved SAE that it starts from."""
    refused: bool = False
    """Whether its options do not go together."""
    ports: Ports | None = None
    """Its widths, once they are known."""

    @property
    def fits_ports(self) -> bool:
        """Whether it is as wide as its activations."""
        return self.ports is not None and self.options.d_in in (None, self.ports.d_in)

    def kind(self, plugins: PluginManager) -> str:
        """The same text for all that have the same sizes, and steps that take as long.

        That is taken to be so where nothing differs but learning rates and coefficients (0 and 1 may be none), seeds,
        and sites of the same widths.
        """
        said = {
            path: "some" if _is_factor(path, value) else value
            for path, value in spelled_out(self.config, plugins).items()
            if not path.startswith(_NO_COST)
        }
        ports = self.ports
        assert ports is not None
        sizes = [*ports.inputs.values()], [*ports.targets.values()], ports.same, self.options.features(ports.d_in)
        return repr((sizes, said))

    def measured(self, plugins: PluginManager) -> str:
        """The same text for all of a kind that are measured by the same evals on as many contexts."""
        said = {path: value for path, value in spelled_out(self.config, plugins).items() if path.startswith("evals.")}
        return repr((self.kind(plugins), {**said, "evals.every_n_steps": None}))

    @property
    def weights(self) -> int:
        """How many numbers its encoder and its decoder have together."""
        assert self.ports is not None
        return int(self.options.features(self.ports.d_in)) * (self.ports.d_in + self.ports.d_out)


def _is_factor(path: str, value: object) -> bool:
    """Whether an option only says by how much something is multiplied.  Of other fractions, a step may take longer."""
    name = path.rpartition(".")[2]
    return isinstance(value, float) and value not in (0.0, 1.0) and (name == "lr" or name.endswith("_coefficient"))


def here_of(members: Sequence[PlannedMember], groups: int) -> list[PlannedMember]:
    """Of ``members``, which are dealt out over so many ``groups`` of processes, those of the one that has the most."""
    weights = [member.weights for member in members]
    groups_of = dealt_out(weights, groups)
    loads = [sum(own for own, group in zip(weights, groups_of, strict=True) if group == n) for n in range(groups)]
    most = loads.index(max(loads))
    return [member for member, group in zip(members, groups_of, strict=True) if group == most]


def longest_of(members: Sequence[PlannedMember]) -> PlannedMember:
    """The first of those that train on the most tokens."""
    return max(members, key=lambda member: member.config.training.total_tokens)


def training_text(training: Mapping[str, TrainingConfig]) -> str:
    """How long the SAEs of these names train, in words."""

    def text(one: TrainingConfig) -> str:
        tuned = f", the last {one.finetuning_tokens:,} for fine-tuning" if one.finetuning_tokens else ""
        steps = f"{one.steps:,} step{'s' * (one.steps != 1)}"
        return f"{steps} of {one.batch_text} tokens, {one.total_tokens:,} in all{tuned}"

    return of_all({name: text(one) for name, one in training.items()}, training)


def training_doubts(training: TrainingConfig) -> list[str]:
    """What is never counted or logged in so few steps, in words."""
    found = []
    if training.dead_after >= training.steps:
        found.append(
            f"training.dead_feature_window is {training.dead_after}, so in {training.steps} steps no feature is ever "
            "counted as dead"
        )
    window = attrs.fields(TrainingConfig).feature_sampling_window.default  # for long runs: no fault of theirs
    if training.feature_sampling_window > training.steps and training.feature_sampling_window != window:
        found.append(
            f"training.feature_sampling_window is {training.feature_sampling_window}, so in {training.steps} steps no "
            "firing fractions are logged"
        )
    return found
