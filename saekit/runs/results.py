"""What a run leaves behind, for code and for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from saekit.backends.around import LoadedModel
from saekit.data import Corpus
from saekit.pretrained.sae import SAE
from saekit.runs.numbers import main_numbers, short_numbers
from saekit.tables import facts_html, table_html

__all__ = ["SweepResult", "TrainResult"]


@attrs.frozen(repr=False)
class TrainResult:
    """What a run leaves behind."""

    _sae: SAE | Callable[[], SAE] = attrs.field(alias="sae")
    folder: Path
    """The run folder: ``config.toml``, ``metrics.jsonl`` and the SAE in ``sae/``."""
    metrics: Mapping[str, float]
    """The last value of every metric, the evals' among them."""
    backend: LoadedModel
    """The model, to go on with."""
    held_out: Tensor | None
    """``[n, context_size]`` token ids that training never saw, if there are evals."""
    corpus: Corpus
    """The text, to go on with."""
    pictures: Sequence[Path] = ()
    """``curves.png`` and ``curves.html``, as far as they were drawn."""

    @cached_property
    def sae(self) -> SAE:
        """The trained SAE, as it was saved: with norms of decoder rows folded in, where they count.

        Of a run of several processes it is read from the run folder when first asked for, but for what is saved as it
        was trained.
        """
        return self._sae if isinstance(self._sae, SAE) else self._sae()

    def __repr__(self) -> str:
        return f"TrainResult({str(self.folder)!r}: {short_numbers(self.metrics, self.sae.d_sae)}; {self.sae!r})"

    def _repr_html_(self) -> str:
        """The main numbers, for notebooks."""
        measured, facts = main_numbers(self.metrics, self.sae.d_sae)
        return facts_html(f"{self.sae!r}, {measured}", [*facts, ("run folder", str(self.folder))])


@attrs.frozen(repr=False)
class SweepResult:
    """What SAEs leave behind that were trained together."""

    folder: Path
    """The sweep's folder: one for each SAE, ``summary.csv`` and its pictures."""
    results: Mapping[str, TrainResult]
    """By name, in the order of the configurations; without those that diverged."""
    diverged: Mapping[str, str]
    """Why an SAE was stopped, by name."""
    summary: Sequence[Mapping[str, Any]]
    """For each SAE its name, its changed options, its main numbers and its status: the rows of ``summary.csv``."""
    pictures: Sequence[Path] = ()
    """``summary.png`` and ``summary.html``, as far as they were drawn; those of each SAE are in its result."""

    def __repr__(self) -> str:
        diverged = f", {len(self.diverged)} diverged" if self.diverged else ""
        return f"SweepResult({str(self.folder)!r}: {len(self.results)} SAEs{diverged}: {', '.join(self.results)})"

    def _repr_html_(self) -> str:
        """The summary, for notebooks."""
        columns = [name for name in self.summary[0] if any(row[name] is not None for row in self.summary)]
        rows = [[_text(row[name]) for name in columns] for row in self.summary]
        return table_html(f"Sweep in {self.folder}", columns, rows)


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
