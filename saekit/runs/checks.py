"""What can be checked of a run before torch is imported: see :mod:`saekit.commands.preflight`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from saekit.config import SAEConfig, TrainConfig
from saekit.defaults import ALWAYS_TRACKED
from saekit.errors import ConfigError, SAEFormatError
from saekit.files.storage import locked
from saekit.kinds import ACTIVATION_SOURCES, EVALS, MODEL_BACKENDS, TRACKERS
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.pretrained.asking import hinting_at_release
from saekit.protocols import Eval, Tracker
from saekit.saved import SAEFiles

__all__ = [
    "alone_in", "check_finetuning", "check_model_runs", "check_without_model", "chosen_evals", "chosen_trackers",
    "has_model", "start_files",
]  # fmt: skip


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


def has_model(config: TrainConfig, plugins: PluginManager) -> bool:
    """Whether a run has a language model (``model.backend`` is not such as ``none``)."""
    return not plugins.find(MODEL_BACKENDS, config.model.backend).entry.no_model


def check_model_runs(config: TrainConfig, plugins: PluginManager) -> None:
    """Of work that is done by running the model: there is one."""
    if not has_model(config, plugins):
        key = plugins.find(MODEL_BACKENDS, config.model.backend).key
        raise ConfigError([("model.backend", f"is '{key}', and activations are written by running a language model")])


def check_without_model(config: TrainConfig, plugins: PluginManager) -> None:
    """Of a run that has no model: nothing that it chooses may need one, or a text, which a model would read."""
    if has_model(config, plugins):
        return
    backend = plugins.find(MODEL_BACKENDS, config.model.backend).key
    problems = []
    source = plugins.find(ACTIVATION_SOURCES, config.activations.source)
    if source.entry.needs_text:
        problems.append(
            ("activations.source", f"is '{source.key}', which reads a text by a language model, and this run has none "
             f"(model.backend={backend}); choose a source that has activations of its own")
        )  # fmt: skip
    if config.tokens.chooses:
        problems.append(
            ("tokens", f"chooses which tokens count, and this run has no language model (model.backend={backend}) "
             "that would say what they are; leave it out: activations are as their source has them")
        )  # fmt: skip
    needing = [key for key, choice in chosen_evals(config, plugins).items() if choice.item.entry.needs_text]
    if needing:
        problems.append(
            ("evals.run", f"has {', '.join(needing)}, which measure on a text by a language model, and this run has "
             f"none (model.backend={backend}); leave them out: evals.run=[]")
        )  # fmt: skip
    if problems:
        raise ConfigError(problems)


def check_finetuning(config: TrainConfig, options: SAEConfig) -> None:
    """The decoder's bias can be tuned only where the encoder does not see it."""
    if config.training.finetuning_method == "decoder" and options.apply_b_dec_to_input:
        raise ConfigError(
            [("training.finetuning_method", "is 'decoder', which moves b_dec, and sae.apply_b_dec_to_input takes b_dec "
              "from the input, so that the encoder would change too; set sae.apply_b_dec_to_input=false, or choose "
              "another method")]
        )  # fmt: skip


def start_files(path: str) -> SAEFiles:
    """The files of the saved SAE that training starts from."""
    with hinting_at_release(path):
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
