"""Progress of training, as an observer of the loop."""

from __future__ import annotations

from typing import Self

from saekit.progress import ProgressDisplay
from saekit.runs.session import Session
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["TrainingProgress"]

_SHOWN = {
    "loss": "losses/overall_loss",
    "EV": "metrics/explained_variance",
    "L0": "metrics/l0",
    "dead": "sparsity/dead_features",
}


class TrainingProgress(ProgressDisplay):
    """Tokens done, rate, loss, explained variance, L0, dead features and the time left.

    For several SAEs, the least and the largest of each number, and the tokens of the one that goes on the longest.
    Several SAEs are shown when any of them is verbose.
    """

    def __init__(self, session: Session) -> None:
        verbose = any(member.config.training.verbose for member in session.members.values())
        number = len(session.members)
        doing = "training" if number == 1 else f"training {number} SAEs"
        super().__init__(session.total_tokens, doing=doing, verbose=verbose)
        self._session, self._before = session, session.tokens

    def __enter__(self) -> Self:
        super().__enter__()
        members = self._session.members.values()
        ways = [member.trainer.step_path() for member in members if member.config.training.verbose]
        for way in dict.fromkeys(ways):
            number = f" of {ways.count(way)} SAEs" if len(members) > 1 else ""
            self.say(f"SAE step{number}: {way}")
        if ways and (text := self._session.first_loss_text()) is not None:
            self.say(f"model loss: {text}")
        return self

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        pass

    def after_batch(self) -> None:
        """Show what is known by now."""
        trained = [member for member in self._session.members.values() if member.trainer.diverged is None]
        if trained:  # those that were stopped need no more time
            self.total = max(member.config.training.total_tokens for member in trained)
        self.update(self._session.tokens, self._text(), before=self._before)

    def _text(self) -> str:
        members = self._session.members.values()
        trained = [member.latest for member in members if member.trainer.diverged is None]
        parts = []
        for name, key in _SHOWN.items():
            values = [latest[key] for latest in trained if key in latest]
            if values:
                low, high = f"{min(values):.4g}", f"{max(values):.4g}"
                parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
        if len(trained) < len(members):
            parts.append(f"{len(members) - len(trained)} diverged")
        return "  ".join(parts)
