"""What trackers are handed, and what of it they have not taken yet, as a part of a run's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from saekit.abilities import TakesCheckpoints
from saekit.files.names import is_plain_name
from saekit.protocols import Tracker
from saekit.values import Histogram, Metrics

__all__ = ["Record", "TrackersState", "metrics_of", "metrics_state", "waiting_of", "waiting_state"]


@attrs.frozen
class Record:
    """One call of a tracker: ``metrics``, or that an SAE was saved in ``folder``."""

    step: int
    metrics: Metrics = attrs.field(factory=dict)
    folder: Path | None = None
    there: Callable[[], bool] | None = attrs.field(default=None, eq=False, repr=False)
    """Of a folder that is being written: waits for it, and says whether it is there."""

    def give(self, tracker: Tracker) -> None:
        """Make the call; a tracker that does not care of saved SAEs is not told of them."""
        if self.folder is None:
            tracker.log(dict(self.metrics), self.step)  # a copy: it goes on with its own, and so may others
        elif isinstance(tracker, TakesCheckpoints) and (self.there is None or self.there()):
            tracker.log_checkpoint(self.folder, self.step)


TrackersState: TypeAlias = Mapping[str, Sequence[Record]]
"""What each tracker has not taken, by its key, in order."""


def waiting_state(waiting: TrackersState, checkpoints: Path) -> dict[str, Any]:
    """``waiting`` as plain values; folders are named as they lie in ``checkpoints``, for a run may be moved."""
    return {key: [_plain(record, checkpoints) for record in records] for key, records in waiting.items() if records}


def _plain(record: Record, checkpoints: Path) -> dict[str, Any]:
    if record.folder is not None:
        return {"step": record.step, "saved": list(record.folder.relative_to(checkpoints).parts)}
    return {"step": record.step, "metrics": metrics_state(record.metrics)}


def waiting_of(state: Mapping[str, Any], checkpoints: Path) -> TrackersState:
    """What :func:`waiting_state` made plain, but for SAEs that are not there any more.

    :class:`ValueError`, or whatever else a wrong type gives, for what it did not make.
    """
    found = {}
    for key, records in state.items():
        made = [_record(entry, checkpoints) for entry in records]
        found[key] = [record for record in made if record.folder is None or record.folder.is_dir()]
    return found


def _record(entry: Mapping[str, Any], checkpoints: Path) -> Record:
    step = entry["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"a tracker's record is of step {step!r}")
    if "saved" not in entry:
        return Record(step, metrics_of(entry["metrics"]))
    parts = entry["saved"]
    if not isinstance(parts, list) or not parts or not all(map(is_plain_name, parts)):
        raise ValueError(f"a tracker's record is of an SAE in {parts!r}")
    return Record(step, folder=checkpoints.joinpath(*parts))


def metrics_state(metrics: Metrics) -> dict[str, Any]:
    """``metrics`` as plain values."""
    return {
        name: {"counts": value.counts, "edges": value.edges} if isinstance(value, Histogram) else value
        for name, value in metrics.items()
    }


def metrics_of(state: Mapping[str, Any]) -> dict[str, float | Histogram]:
    """The metrics whose :func:`metrics_state` is ``state``; :class:`ValueError` for what is none."""
    return {name: _metric(name, value) for name, value in state.items()}


def _metric(name: str, value: Any) -> float | Histogram:
    numbers = [*value["counts"], *value["edges"]] if isinstance(value, Mapping) else [value]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"the metric {name} is {value!r:.80}, expected a number or a histogram")
    return Histogram(tuple(value["counts"]), tuple(value["edges"])) if isinstance(value, Mapping) else value
