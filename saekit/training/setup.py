"""From a configuration to the objects of a run; every check here happens before the first long computation."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from saekit.config import SAEConfig, TrainConfig
from saekit.data import Corpus, StreamContext
from saekit.data.activations import check_contexts
from saekit.data.normalise import activation_scale
from saekit.devices import resolve_device
from saekit.errors import ConfigError, ModelError, StorageError
from saekit.manager import PluginManager
from saekit.pretrained.load import build_module
from saekit.protocols import ActivationSource, ModelBackend
from saekit.sae.init import initialise
from saekit.site import Site
from saekit.training.firing import FiringStatistics
from saekit.training.optimiser import Optimiser
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer

if TYPE_CHECKING:
    from saekit.sae.module import SAE

__all__ = [
    "check_hooks",
    "check_run_folder",
    "checked_width",
    "make_schedule",
    "make_trainer",
    "open_backend",
    "open_source",
    "open_stream",
    "run_folder",
    "seed_for",
]


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each thing that draws, so that none changes what another draws."""
    return int.from_bytes(blake2b(f"{seed}:{purpose}".encode(), digest_size=7).digest(), "big")


def open_backend(config: TrainConfig, corpus: Corpus, plugins: PluginManager, model: object | None) -> ModelBackend:
    """The model, checked against the site and the context size; it has not run yet."""
    backend: ModelBackend = plugins.build("model_backends", config.model.backend, model=config.model, loaded=model)
    check_hooks(backend, [config.site])
    if backend.n_ctx is not None and corpus.context_size > backend.n_ctx:
        raise ConfigError(
            [("dataset.context_size", f"is {corpus.context_size}, but the model {backend.name!r} takes at most "
              f"{backend.n_ctx} tokens")]
        )  # fmt: skip
    return backend


def check_hooks(backend: ModelBackend, sites: Sequence[Site]) -> None:
    """Every site's hook must be one of the model's."""
    names = backend.hook_names()
    for site in sites:
        if site.hook_name in names:
            continue
        close = difflib.get_close_matches(site.hook_name, names, n=3)
        hint = (
            f"Did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"It has {len(names)} hooks, such as {names[0]!r}."
        )
        raise ModelError(f"the model {backend.name!r} has no hook {site.hook_name!r} (site.hook_name). {hint}")


def open_stream(
    config: TrainConfig, corpus: Corpus, plugins: PluginManager, backend: ModelBackend, sites: Sequence[Site]
) -> StreamContext:
    """What activations are made from."""
    model = {
        "model.name": backend.name,
        "model.backend": plugins.find("model_backends", config.model.backend).key,
        "model.dtype": config.model.dtype,
        "model.autocast": config.model.autocast,
    }
    return StreamContext(
        backend=backend,
        sites=sites,
        batch_size=config.training.train_batch_size_tokens,
        seed=seed_for(config.training.seed, "shuffle"),
        open_contexts=lambda: corpus.contexts(backend),
        repeat=config.dataset.on_exhausted == "repeat",
        identity={**model, **corpus.identity(backend)},
    )


def open_source(config: TrainConfig, plugins: PluginManager, stream: StreamContext) -> ActivationSource:
    """The source of shuffled batches."""
    source: ActivationSource = plugins.build("activation_sources", config.activations.source, stream=stream)
    return source


def checked_width(stream: StreamContext, site: Site, stated: int | None) -> int:
    """``d_in`` at ``site``; a different stated one is an error."""
    d_in = stream.widths[site]
    if stated is not None and stated != d_in:
        raise ConfigError([("sae.d_in", f"is {stated}, but {site.name} of {stream.backend.name!r} has width {d_in}")])
    return d_in


def make_schedule(config: TrainConfig, plugins: PluginManager) -> ComposedSchedule:
    """The learning rate at every step."""
    lr = config.training.lr
    return ComposedSchedule(
        config.training, lambda steps: plugins.build("lr_schedules", config.lr_schedule, lr=lr, steps=steps)
    )


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
