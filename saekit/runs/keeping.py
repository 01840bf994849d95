"""Which checkpoints of a run stay, and what of those that are too old to go on from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from saekit.errors import StorageError
from saekit.runs.checkpoints import Checkpoint, all_checkpoints, keep_saes
from saekit.runs.trackers import Trackers

__all__ = ["Keeping", "opened"]

_KEPT_FOR_TRACKERS = 8
"""So many old checkpoints are kept for trackers that have still to read them, beside those that are being read."""


class Keeping:
    """Of the run in ``folder``: its newest ``keep_last`` checkpoints stay, and those that ``trackers`` have to read."""

    def __init__(self, folder: Path, trackers: Collection[Trackers], keep_last: int) -> None:
        self._trackers, self._keep_last = trackers, keep_last
        self._told_of_lag = False
        self.last_good: dict[str, Path] = {}
        """Of each SAE, the newest checkpoint that has it."""
        for path in reversed(list(all_checkpoints(folder))):
            checkpoint = opened(path)
            self.note(() if checkpoint is None else checkpoint.healthy, path)

    def note(self, names: Collection[str], path: Path) -> None:
        """The SAEs of these names are in a checkpoint that is the newest."""
        self.last_good.update(dict.fromkeys(names, path))

    def remove_old(self, folder: Path, diverged: Collection[str], warn: Callable[[str], None]) -> None:
        """Of a checkpoint that is too old to go on from, only what somebody may want to look at stays.

        This is done where checkpoints are written, so ``warn`` keeps its words for the loop.
        """
        old = list(all_checkpoints(folder))[self._keep_last :]
        in_use = [path for path in old if self._in_use(path)]
        for path in in_use[_KEPT_FOR_TRACKERS:]:
            self._forget(path, warn)
        for path in old:
            if self._in_use(path):
                continue  # until the next time
            checkpoint = opened(path)
            if checkpoint is not None and checkpoint.facts["spaced"]:
                names = checkpoint.healthy
            else:
                names = [name for name in diverged if self.last_good.get(name, Path()).name == path.name]
            try:
                keep_saes(path, names)
            except StorageError as error:
                warn(f"an old checkpoint stays: {error}")

    def _in_use(self, path: Path) -> bool:
        return any(trackers.in_use(path.absolute()) for trackers in self._trackers)

    def _forget(self, path: Path, warn: Callable[[str], None]) -> None:
        """Trackers that are far behind, or hang, are not told of ``path`` any more."""
        for trackers in self._trackers:
            trackers.forget(path.absolute())
        if not self._told_of_lag:
            self._told_of_lag = True
            warn(
                f"trackers are more than {_KEPT_FOR_TRACKERS} checkpoints behind: they are not told of {path} and "
                "others that are too old, which go"
            )


def opened(path: Path) -> Checkpoint | None:
    """The checkpoint there; None for one that is of no use to anybody."""
    try:
        return Checkpoint.open(path)
    except StorageError:  # damaged
        return None
