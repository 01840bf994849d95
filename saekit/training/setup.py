"""From a configuration to the objects of a run; every check here happens before the first long computation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from saekit.config import ALWAYS_TRACKED, PluginChoice, SAEConfig, TrainConfig
from saekit.data import Corpus
from saekit.data.activations import check_contexts
from saekit.data.normalise import activation_scale
from saekit.data.opening import seed_for
from saekit.devices import resolve_device
from saekit.errors import ConfigError, StorageError
from saekit.manager import PluginManager
from saekit.pretrained.load import build_module
from saekit.protocols import ActivationSource, Eval, ModelBackend
from saekit.sae.init import initialise
from saekit.training.firing import FiringStatistics
from saekit.training.optimiser import Optimiser
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer

if TYPE_CHECKING:
    from saekit.sae.module import SAE

__all__ = ["check_run_folder", "chosen_trackers", "make_evals", "make_schedule", "make_trainer", "run_folder"]


def make_schedule(config: TrainConfig, plugins: PluginManager) -> ComposedSchedule:
    """The learning rate at every step."""
    lr = config.training.lr
    return ComposedSchedule(
        config.training, lambda steps: plugins.build("lr_schedules", config.lr_schedule, lr=lr, steps=steps)
    )


def make_evals(config: TrainConfig, plugins: PluginManager) -> dict[str, Eval]:
    """What is measured, by qualified key."""
    _refuse_twice("evals.run", [plugins.find("evals", choice).key for choice in config.evals.run])
    return {plugins.find("evals", choice).key: plugins.build("evals", choice) for choice in config.evals.run}


def chosen_trackers(config: TrainConfig, plugins: PluginManager) -> dict[str, PluginChoice]:
    """The trackers of a run by qualified key, with the one that is always there."""
    _refuse_twice("trackers", [plugins.find("trackers", choice).key for choice in config.trackers])
    return {plugins.find("trackers", choice).key: choice for choice in (ALWAYS_TRACKED, *config.trackers)}


def _refuse_twice(path: str, keys: Sequence[str]) -> None:
    if len(set(keys)) < len(keys):
        raise ConfigError([(path, f"names a plugin twice: {', '.join(keys)}")])


def make_trainer(
    config: TrainConfig,
    plugins: PluginManager,
    backend: ModelBackend,
    corpus: Corpus,
    d_in: int,
    source: ActivationSource,
    schedule: ComposedSchedule,
) -> SAETrainer:
    """An initialised SAE with everything that trains it."""
    device = resolve_device(config.training.device, "training.device")
    options: SAEConfig = plugins.options("sae_architectures", config.sae)
    sae: SAE = build_module(plugins.find("sae_architectures", config.sae), options, d_in, plugins)
    normalised = config.activations.normalize_activations != "none"
    sample = source.peek()[config.site].cpu() if normalised or options.b_dec_init_method != "zeros" else None
    if sample is not None:
        check_contexts(len(sample), corpus.context_size)
    scale = activation_scale(sample) if normalised and sample is not None else 1.0
    generator = torch.Generator().manual_seed(seed_for(config.training.seed, "init"))
    parameters = dict(sae.named_parameters())
    initialise(parameters, options, generator, sample, scale)
    sae.to(device)
    metadata = _metadata(config, backend, corpus, plugins) | {"activation_scale": scale}
    sae.info = attrs.evolve(sae.info, site=config.site, metadata=metadata)
    training = config.training
    return SAETrainer(
        sae=sae,
        site=config.site,
        optimiser=Optimiser(sae.parameters(), config.optimiser, schedule),
        firing=FiringStatistics(
            sae.d_sae,
            dead_after=training.dead_feature_window,
            window=training.feature_sampling_window,
            device=device,
        ),
        generator=torch.Generator(device).manual_seed(seed_for(training.seed, "noise")),
        device=device,
        log_frequency=training.log_frequency,
        scale=scale,
    )


def _metadata(config: TrainConfig, backend: ModelBackend, corpus: Corpus, plugins: PluginManager) -> dict[str, Any]:
    dataset = corpus.config
    return {
        "model_name": backend.name,
        "model_class_name": plugins.find("model_backends", config.model.backend).entry.name,
        "dataset_path": dataset.path if corpus.dataset is None else None,  # data in memory has no path to name
        "context_size": dataset.context_size,
        "prepend_bos": dataset.prepend_bos,
        "begin_batch_token": dataset.begin_batch_token,
        "begin_sequence_token": dataset.begin_sequence_token,
        "sequence_separator_token": dataset.sequence_separator_token,
        "training_tokens": config.training.training_tokens,
        "seed": config.training.seed,
    }


def check_run_folder(config: TrainConfig) -> None:
    """A named run folder must be new."""
    if config.checkpoints.name is not None:
        folder = Path(config.checkpoints.folder) / config.checkpoints.name
        if folder.exists():
            raise ConfigError(
                [("checkpoints.name", f"the run folder {folder} exists already; choose another name, or remove it")]
            )


def run_folder(config: TrainConfig) -> Path:
    """Make the run's folder, which must be new."""
    parent = Path(config.checkpoints.folder)
    name = config.checkpoints.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name is not None:
            check_run_folder(config)
            (parent / name).mkdir()
            return parent / name
        stem = f"{datetime.now():%Y-%m-%d}-{config.site.name}"
        for number in itertools.count(1):
            try:
                (parent / f"{stem}-{number}").mkdir()
            except FileExistsError:
                continue
            return parent / f"{stem}-{number}"
    except OSError as error:
        raise StorageError(f"cannot make a run folder in {parent}: {error.strerror} (checkpoints.folder)") from error
    raise AssertionError("unreachable")
