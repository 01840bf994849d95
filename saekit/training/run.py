"""``saekit.train``: one run from configuration to saved SAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from saekit.config import TrainConfig
from saekit.config_files import dump_config, load_config
from saekit.converter import ConfigConverter
from saekit.errors import TrainingInterrupted
from saekit.manager import PluginManager, default_manager
from saekit.protocols import ModelBackend, RunInfo
from saekit.sae.module import SAE
from saekit.storage import write_text
from saekit.training.loop import Observer, fit
from saekit.training.observers import EvalObserver, TrackerObserver, Trackers
from saekit.training.progress import ProgressDisplay
from saekit.training.setup import (
    held_out_contexts,
    make_trainer,
    open_backend,
    open_source,
    probe_width,
    run_folder,
)
from saekit.training.trainer import SAETrainer

__all__ = ["TrainResult", "train"]


@attrs.frozen
class TrainResult:
    """What a run leaves behind."""

    sae: SAE
    folder: Path
    """The run folder: ``config.toml``, ``metrics.jsonl`` and the SAE in ``sae/``."""
    metrics: Mapping[str, float]
    """The last value of every metric, the evals' among them."""
    backend: ModelBackend
    """The model, to go on with."""
    held_out: Tensor | None
    """``[n, context_size]`` token ids that training never saw, if there are evals."""


def train(
    cfg: TrainConfig | Mapping[str, Any] | str | Path,
    *,
    plugins: PluginManager | None = None,
    model: object | None = None,
    dataset: object | None = None,
) -> TrainResult:
    """Train the SAE that ``cfg`` describes: a config, a dict, or the path of a TOML, YAML or JSON file.

    ``model`` is an in-memory model for the backend (a ``HookedTransformer``, say) and ``dataset`` an in-memory
    dataset (a HF ``Dataset``, or a list of ``{"text": ...}`` records); they take the place of ``model.name`` and
    ``dataset.path``.  ``plugins`` replaces the installed plugins.

    Raises :class:`saekit.errors.SaekitError` for what is wrong with the configuration, model or data.  When it is
    interrupted, it saves the SAE as it is and raises :class:`saekit.errors.TrainingInterrupted`.
    """
    plugins = plugins or default_manager()
    config = load_config(cfg, plugins=plugins)
    backend = open_backend(config, plugins, model)
    d_in = probe_width(backend, config.site, plugins.options("sae_architectures", config.sae).d_in)
    held_out = held_out_contexts(config, backend, dataset) if config.evals.run else None
    source = open_source(config, plugins, backend, {config.site: d_in}, dataset)
    try:
        provenance = {} if dataset is None else {"dataset_path": None}  # data in memory has no path to name
        trainer = make_trainer(config, plugins, backend, d_in, source, provenance)
        folder = run_folder(config)
        write_text(folder / "config.toml", dump_config(config, plugins=plugins))
        trackers = _trackers(config, plugins, folder)
        try:
            metrics = _fit(config, plugins, trainer, source, backend, held_out, trackers, folder)
        finally:
            trackers.close()
        sae = trainer.raw_sae()
        sae.save(folder / "sae")
    finally:
        source.close()
    return TrainResult(sae=sae, folder=folder, metrics=metrics, backend=backend, held_out=held_out)


def _fit(
    config: TrainConfig,
    plugins: PluginManager,
    trainer: SAETrainer,
    source: Any,
    backend: ModelBackend,
    held_out: Tensor | None,
    trackers: Trackers,
    folder: Path,
) -> dict[str, float]:
    """Train, evaluate, and return the last metrics; whatever ends training early leaves a checkpoint."""
    evals = {plugins.find("evals", choice).key: plugins.build("evals", choice) for choice in config.evals.run}

    def evaluate(trainer: SAETrainer) -> dict[str, float]:
        found: dict[str, float] = {}
        sae = trainer.raw_sae()
        for measure in evals.values():
            found |= measure(sae, backend=backend, site=config.site, contexts=held_out)
        return {f"evals/{name}": value for name, value in found.items()}

    logged = TrackerObserver([trackers])
    try:
        with ProgressDisplay(config.training.training_tokens, verbose=config.training.verbose) as progress:
            observers: list[Observer] = [EvalObserver(config.evals.every_n_steps, evaluate), logged, progress]
            fit([trainer], source, config.training.training_tokens, observers)
    except BaseException as error:
        checkpoint = trainer.raw_sae().save(folder / "checkpoints" / f"step-{trainer.step}")
        if isinstance(error, KeyboardInterrupt):
            raise TrainingInterrupted(trainer.step, trainer.tokens, checkpoint) from error
        raise
    final = evaluate(trainer)
    trackers.log(final, trainer.step)
    return logged.latest[0] | final


def _trackers(config: TrainConfig, plugins: PluginManager, folder: Path) -> Trackers:
    run = RunInfo(name=folder.name, folder=folder, config=ConfigConverter(plugins).unstructure(config))
    return Trackers({plugins.find("trackers", c).key: plugins.build("trackers", c, run=run) for c in config.trackers})
