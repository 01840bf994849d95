"""What can be checked of a run before torch is imported: see :mod:`saekit.commands.preflight`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from saekit.config import ALWAYS_TRACKED, SAEConfig, TrainConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.files.storage import locked
from saekit.kinds import EVALS, TRACKERS
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.pretrained.files import SAEFiles
from saekit.protocols import Eval, Tracker

__all__ = ["alone_in", "check_finetuning", "chosen_evals", "chosen_trackers", "start_files"]


def chosen_trackers(config: TrainConfig, plugins: PluginManager) -> dict[str, Choice[Tracker]]:
    """The trackers of a run by qualified key, with the one that is always there."""
    chosen = [plugins.bound(TRACKERS, choice) for choice in config.trackers]
    _refuse_twice("trackers", [choice.key for choice in chosen])
    always = plugins.bound(TRACKERS, ALWAYS_TRACKED)
    return {always.key: always, **{choice.key: choice for choice in chosen}}


def chosen_evals(config: TrainConfig, plugins: PluginManager) -> dict[str, Choice[Eval]]:
    """What is measured, by qualified key."""
    chosen = [plugins.bound(EVALS, choice) for choice in config.evals.run]
    _refuse_twice("evals.run", [choice.key for choice in chosen])
    return {choice.key: choice for choice in chosen}


def _refuse_twice(path: str, keys: Sequence[str]) -> None:
    if len(set(keys)) < len(keys):
        raise ConfigError([(path, f"names a plugin twice: {', '.join(keys)}")])


def check_finetuning(config: TrainConfig, options: SAEConfig) -> None:
    """The decoder's bias can be tuned only where the encoder does not see it."""
    if config.training.finetuning_method == "decoder" and options.apply_b_dec_to_input:
        raise ConfigError(
            [("training.finetuning_method", "is 'decoder', which moves b_dec, and sae.apply_b_dec_to_input takes b_dec "
              "from the input, so that the encoder would change too; set sae.apply_b_dec_to_input = false, or choose "
              "another method")]
        )  # fmt: skip


def start_files(path: str) -> SAEFiles:
    """The files of the saved SAE that training starts from."""
    try:
        return SAEFiles.in_folder(path)
    except SAEFormatError as error:
        raise SAEFormatError(f"{error} (training.from_pretrained_path)") from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No two processes may train in one run folder."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError:
            raise ConfigError(f"another process is still training in {folder}; end it first") from None
        yield
