"""Every error that saekit raises on purpose: what was found, what was expected, what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "AmbiguousKeyError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "MissingPackageError",
    "ModelError",
    "PlaceError",
    "PluginError",
    "PluginFailedError",
    "PluginWarning",
    "SAEFormatError",
    "SaekitError",
    "StorageError",
    "TrainingInterrupted",
    "UnknownKeyError",
]


class SaekitError(Exception):
    """Base of all errors below.  ``exit_code`` is what the command line exits with: 2 for the user's mistake."""

    exit_code = 2


class ConfigError(SaekitError, ValueError):
    """A configuration that cannot be used.  ``problems`` holds ``(dotted path, message)`` for every fault found.

    ``source`` is where the configuration is from: a file, or words such as "the configuration".  A file is named
    whenever there is a problem, words where there are several.
    """

    def __init__(self, problems: Sequence[tuple[str, str]] | str, source: str = "the configuration") -> None:
        self.problems = [("", problems)] if isinstance(problems, str) else list(problems)
        self.source = source
        lines = [f"{path}: {message}" if path else message for path, message in self.problems]
        if len(lines) == 1:
            super().__init__(lines[0] if source.startswith("the ") else f"{lines[0]} (in {source})")
        else:
            said = _once(lines)
            super().__init__("\n".join([f"{source} has {len(lines)} problems:", *(f"  - {line}" for line in said)]))


def _once(texts: Sequence[str]) -> list[str]:
    """The same texts; of what follows their first lines, no line is said again with all that is indented below it."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        first, *blocks = re.split(r"\n(?! )", text)
        kept.append("\n".join([first, *(block for block in blocks if block not in seen)]))
        seen.update(blocks)
    return kept


class PluginError(SaekitError):
    """A plugin that does not keep to the hooks' contract."""


class PluginFailedError(PluginError):
    """A chosen plugin whose own code raised something (the ``__cause__``), or built what it should not."""

    exit_code = 1


class UnknownKeyError(PluginError, KeyError):
    """A key that no plugin has registered."""

    __str__ = Exception.__str__  # KeyError would show the message's repr


class AmbiguousKeyError(PluginError):
    """A bare key that several plugins have registered."""


class MissingPackageError(SaekitError, ImportError):
    """An optional package that a chosen plugin needs."""


class PluginWarning(UserWarning):
    """A plugin was left out; everything else works."""


class ModelError(SaekitError):
    """A language model that cannot be loaded, or does not have what was asked of it."""


class DataError(SaekitError):
    """Text or tokens that cannot be read, or that ran out."""


class SAEFormatError(SaekitError):
    """A saved SAE that cannot be read, or one that could not be read again if it were saved."""


class StorageError(SaekitError):
    """A run folder, checkpoint or file that cannot be written, or gone on from."""

    exit_code = 1


class PlaceError(StorageError):
    """A folder that was named and is not the one: there is nothing to go on from, or nobody may write there."""

    exit_code = 2


class DivergedError(SaekitError):
    """Training produced a loss that is not a finite number."""

    exit_code = 1


def resume_command(run: Path, processes: int = 1) -> str:
    """What goes on with ``run``, which so many processes trained."""
    start = "" if processes == 1 else f"torchrun --nproc-per-node {processes} --no-python "
    return f"{start}saekit train --resume {shlex.quote(str(run))}"


class LostProcessError(SaekitError):
    """Another process of a run has gone, or does not answer."""

    exit_code = 1
    accounted = False
    """Whether its notes say which process it is."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted; what it needs to go on is saved at ``checkpoint`` in the run folder ``run``."""

    def __init__(
        self,
        step: int,
        tokens: int,
        checkpoint: Path | None,
        run: Path,
        *,
        signal: int = 2,
        problem: str | None = None,
        newest: Path | None = None,
        processes: int = 1,
    ) -> None:
        """``newest`` is the checkpoint to go on from, if there is one, and ``problem`` why it is not of this step."""
        command = resume_command(run, processes)
        on = f"go on from {newest} with: {command}" if newest else "there is none to go on from"
        if checkpoint is not None and checkpoint == newest:
            where = f"saved in {checkpoint}. Go on with: {command}"
        elif checkpoint is not None:
            where = f"the SAEs are saved in {checkpoint}, without what training needs; {on}"
        elif problem is not None:
            where = f"and a checkpoint could not be saved: {problem}; {on}"
        else:
            where = "there is nothing to save yet"
        super().__init__(f"interrupted after {step:,} step{'s' * (step != 1)} ({tokens:,} tokens); {where}")
        self.step, self.tokens, self.checkpoint, self.run, self.signal = step, tokens, checkpoint, run, signal
