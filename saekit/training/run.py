"""``saekit.train``: one run from configuration to saved SAE."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from saekit.config import TrainConfig
from saekit.config_files import dump_config, load_config
from saekit.converter import ConfigConverter
from saekit.data import Corpus
from saekit.data.activations import check_contexts
from saekit.data.opening import checked_width, open_backend, open_source, open_stream, seed_for
from saekit.devices import resolve_device
from saekit.errors import DataError, DivergedError, PluginError, SaekitError, TrainingInterrupted
from saekit.manager import PluginManager, default_manager
from saekit.protocols import ActivationSource, ModelBackend, RunInfo, Tracker
from saekit.sae.module import SAE
from saekit.storage import write_text
from saekit.training.loop import Observer, fit
from saekit.training.observers import EvalObserver, TrackerObserver, Trackers
from saekit.training.progress import TrainingProgress
from saekit.training.setup import (
    check_run_folder,
    chosen_trackers,
    make_evals,
    make_schedule,
    make_trainer,
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
    corpus: Corpus
    """The text, to go on with."""


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
    check_run_folder(config)
    resolve_device(config.training.device, "training.device")
    schedule = make_schedule(config, plugins)
    evals = make_evals(config, plugins)
    corpus = Corpus.of(config.dataset, config.evals, dataset)
    backend = open_backend(config, corpus, plugins, model, [config.site])
    held_out = corpus.held_out(backend, seed_for(config.training.seed, "held out")) if evals else None
    stream = open_stream(config, corpus, plugins, backend, [config.site])
    source = open_source(config, plugins, stream)

    def evaluate(trainer: SAETrainer) -> dict[str, float]:
        found: dict[str, float] = {}
        if held_out is None:
            return found
        sae = trainer.raw_sae()
        with stream.model_lock:  # the source's thread must not run the model while its hooks are in place
            for measure in evals.values():
                found |= measure(sae, backend=backend, site=config.site, contexts=held_out)
        return {f"evals/{name}": value for name, value in found.items()}

    with contextlib.closing(source):
        d_in = checked_width(stream, config.site, plugins.options("sae_architectures", config.sae).d_in)
        trainer = make_trainer(config, plugins, backend, corpus, d_in, source, schedule)
        folder = run_folder(config)
        write_text(folder / "config.toml", dump_config(config, plugins=plugins))
        with contextlib.closing(_trackers(config, plugins, folder)) as trackers:
            metrics = _fit(config, corpus, trainer, source, evaluate, trackers, folder)
    return TrainResult(
        sae=trainer.raw_sae(), folder=folder, metrics=metrics, backend=backend, held_out=held_out, corpus=corpus
    )


def _fit(
    config: TrainConfig,
    corpus: Corpus,
    trainer: SAETrainer,
    source: ActivationSource,
    evaluate: Callable[[SAETrainer], dict[str, float]],
    trackers: Trackers,
    folder: Path,
) -> dict[str, float]:
    """Train, save, evaluate, and return the last metrics; whatever ends training early leaves a checkpoint."""
    logged = TrackerObserver([trackers])
    saved: Path | None = None
    try:
        with TrainingProgress(config.training.training_tokens, verbose=config.training.verbose) as progress:
            observers: list[Observer] = [EvalObserver(config.evals.every_n_steps, evaluate), logged, progress]
            tokens = fit([trainer], source, config.training.training_tokens, observers)
        _check_exhausted(config, corpus, tokens)
        saved = trainer.raw_sae().save(folder / "sae")  # before the last eval, which may fail
        every = config.evals.every_n_steps
        if not (every and trainer.step % every == 0):  # else the loop has just measured
            final = evaluate(trainer)
            trackers.log(final, trainer.step)
            logged.latest[0].update(final)
    except DivergedError:
        raise  # there is nothing worth keeping in its weights
    except BaseException as error:
        if saved is None and trainer.step:
            saved = trainer.raw_sae().save(folder / "checkpoints" / f"step-{trainer.step}")
        if isinstance(error, KeyboardInterrupt):
            raise TrainingInterrupted(trainer.step, trainer.tokens, saved) from error
        raise
    return logged.latest[0]


def _check_exhausted(config: TrainConfig, corpus: Corpus, tokens: int) -> None:
    wanted = config.training.training_tokens
    check_contexts(tokens, corpus.context_size)
    if tokens < wanted and config.dataset.on_exhausted == "error":
        raise DataError(
            f"the data ended after {tokens:,} activations, and {wanted:,} were asked for (training.training_tokens). "
            'Train on fewer, or set dataset.on_exhausted to "repeat" or "stop"'
        )


def _trackers(config: TrainConfig, plugins: PluginManager, folder: Path) -> Trackers:
    """The configured trackers and the one that is always there."""
    run = RunInfo(name=folder.name, folder=folder, config=ConfigConverter(plugins).unstructure(config))
    built: dict[str, Tracker] = {}
    for key, choice in chosen_trackers(config, plugins).items():
        try:
            built[key] = plugins.build("trackers", choice, run=run)
        except SaekitError:
            Trackers(built).close()
            raise
        except Exception as error:  # whatever a stranger's package raises when it has no login or no network
            Trackers(built).close()
            raise PluginError(f"the tracker {key} cannot start: {type(error).__name__}: {error}") from error
    return Trackers(built)
