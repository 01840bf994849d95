"""Progress of training, as an observer of the loop."""

from __future__ import annotations

from collections.abc import Sequence

from saekit.progress import ProgressDisplay
from saekit.training.trainer import SAETrainer

__all__ = ["TrainingProgress"]

_SHOWN = {
    "loss": "losses/overall_loss",
    "EV": "metrics/explained_variance",
    "L0": "metrics/l0",
    "dead": "sparsity/dead_features",
}


class TrainingProgress(ProgressDisplay):
    """Tokens done, rate, loss, explained variance, L0, dead features and the time left."""

    def __init__(self, training_tokens: int, *, verbose: bool = True) -> None:
        super().__init__(training_tokens, doing="training", verbose=verbose)
        self._text = ""

    def after_step(self, trainers: Sequence[SAETrainer], metrics: Sequence[dict[str, float]]) -> None:
        """Show the first SAE's numbers."""
        if metrics[0]:
            self._text = "  ".join(f"{name} {metrics[0][key]:.4g}" for name, key in _SHOWN.items() if key in metrics[0])
        self.update(trainers[0].tokens, self._text)
