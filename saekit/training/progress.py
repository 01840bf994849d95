"""What a person sees while an SAE trains: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from saekit.training.trainer import SAETrainer

__all__ = ["ProgressDisplay"]

_SHOWN = {
    "loss": "losses/overall_loss",
    "EV": "metrics/explained_variance",
    "L0": "metrics/l0",
    "dead": "sparsity/dead_features",
}


class ProgressDisplay:
    """Shows tokens done, rate, loss, explained variance, L0, dead features and the time left.

    A context manager and an observer of the loop.  ``verbose`` off shows nothing.
    """

    _SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, training_tokens: int, *, verbose: bool = True, console: Console | None = None) -> None:
        self._total = training_tokens
        self._console = console or Console(stderr=True, quiet=not verbose)
        self._bar: Progress | None = None
        self._start = self._last_line = 0.0
        self._text = ""
        if verbose and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}  {task.fields[metrics]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=training_tokens, rate="", metrics="")

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def after_step(self, trainers: Sequence[SAETrainer], metrics: Sequence[dict[str, float]]) -> None:
        """Show the first SAE's numbers."""
        if metrics[0]:
            self._text = "  ".join(f"{name} {metrics[0][key]:.4g}" for name, key in _SHOWN.items() if key in metrics[0])
        now, tokens = time.monotonic(), trainers[0].tokens
        rate = f"{tokens / max(now - self._start, 1e-9):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=tokens, rate=rate, metrics=self._text)
        elif now - self._last_line >= self._SECONDS_BETWEEN_LINES or tokens >= self._total:
            self._last_line = now
            left = (now - self._start) * (self._total - tokens) / max(tokens, 1)
            self._console.print(
                f"{tokens:,}/{self._total:,} tokens  {rate}  {self._text}  {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
