"""Progress of training, as an observer of the loop."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from saekit.progress import ProgressDisplay
from saekit.runs.banner import banner
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

    def __init__(self, session: Session, folder: Path) -> None:
        verbose = session.world.main and any(member.config.training.verbose for member in session.members.values())
        number = len(session.members)
        doing = "training" if number == 1 else f"training {number} SAEs"
        super().__init__(session.total_tokens, doing=doing, verbose=verbose, steady=True)
        self._session, self._folder, self._before, self._verbose = session, folder, session.tokens, verbose

    def __enter__(self) -> Self:
        session = self._session
        if self._verbose:
            loss = session.first_loss_text()
            session.status.rest()
            self.say("\n".join(banner(session, self._folder)))
            if loss is not None:
                self.say(f"model loss: {loss}")
        super().__enter__()
        session.say = self.doing
        self.doing("running the model on the first text" if session.has_model else "taking the first activations")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.say = self._session.status
        super().__exit__(kind, error, trace)

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
