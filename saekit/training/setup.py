"""From a configuration to the objects of a run; every check here happens before the first long computation."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from saekit.config import DatasetConfig, SAEConfig, TrainConfig
from saekit.data import ContextStream, Documents, StreamContext, TokenPolicy
from saekit.data.normalise import activation_scale
from saekit.data.text import STDLIB
from saekit.devices import resolve_device
from saekit.errors import ConfigError, DataError, ModelError, StorageError
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
    "check_run_folder",
    "held_out_contexts",
    "make_schedule",
    "make_trainer",
    "open_backend",
    "open_source",
    "probe_width",
    "run_folder",
    "seed_for",
]

_PROBE_TOKENS = 7  # unlike any usual number of heads, so that [batch, head, ...] is not taken for positions


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each thing that draws, so that none changes what another draws."""
    return int.from_bytes(blake2b(f"{seed}:{purpose}".encode(), digest_size=7).digest(), "big")


def open_backend(config: TrainConfig, plugins: PluginManager, model: object | None) -> ModelBackend:
    """The model, checked against the site and the context size."""
    backend: ModelBackend = plugins.build("model_backends", config.model.backend, model=config.model, loaded=model)
    names = backend.hook_names()
    if config.site.hook_name not in names:
        close = difflib.get_close_matches(config.site.hook_name, names, n=3)
        hint = (
            f"Did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"It has {len(names)} hooks, such as {names[0]!r}."
        )
        raise ModelError(f"the model {backend.name!r} has no hook {config.site.hook_name!r} (site.hook_name). {hint}")
    if backend.n_ctx is not None and config.dataset.context_size > backend.n_ctx:
        raise ConfigError(
            [("dataset.context_size", f"is {config.dataset.context_size}, but the model {backend.name!r} takes at most "
              f"{backend.n_ctx} tokens")]
        )  # fmt: skip
    return backend


def probe_width(backend: ModelBackend, site: Site, stated: int | None) -> int:
    """``d_in`` at ``site``, found by running the model on a few tokens; a different stated one is an error."""
    tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long)
    held = backend.activations(tokens, {site.hook_name})[site.hook_name]
    if held.shape[:2] != tokens.shape:
        raise ConfigError(
            [("site.hook_name", f"{site.hook_name!r} holds a tensor of shape {list(held.shape)} for "
              f"{list(tokens.shape)} tokens; an SAE needs one vector per token: [batch, position, ...]")]
        )  # fmt: skip
    d_in = site.extract(held).shape[-1]
    if stated is not None and stated != d_in:
        raise ConfigError([("sae.d_in", f"is {stated}, but {site.name} of {backend.name!r} has width {d_in}")])
    return d_in


def open_contexts(config: TrainConfig, backend: ModelBackend, dataset: Any) -> ContextStream:
    """The training contexts."""
    hold_out = config.evals.held_out_every if config.evals.split is None else 0
    documents = Documents.open(
        config.dataset,
        dataset=dataset,
        keep=(lambda index: index % hold_out != hold_out - 1) if hold_out else None,
    )
    return _stream(config.dataset, backend, documents, repeat=config.dataset.on_exhausted == "repeat")


def held_out_contexts(config: TrainConfig, backend: ModelBackend, dataset: Any) -> Tensor:
    """``[n, context_size]`` token ids that training never sees, drawn from a stretch of text eight times as long."""
    every, split = config.evals.held_out_every, config.evals.split
    if (
        config.dataset.path == STDLIB
        and dataset is None
        and split is not None
        and "all" in (split, config.dataset.split)
    ):
        raise ConfigError([("evals.split", f"{STDLIB} 'all' holds its other splits; use 'train' and 'heldout'")])
    documents = Documents.open(
        config.dataset,
        split=split,
        dataset=dataset,
        keep=None if split is not None else (lambda index: index % every == every - 1),
    )
    contexts = _stream(config.dataset, backend, documents, repeat=False).take(8 * config.evals.n_contexts)
    if not len(contexts):
        raise DataError(
            f"the held-out text does not fill one context of {config.dataset.context_size} tokens. Lower "
            "evals.held_out_every, name a split of its own in evals.split, use more or smaller documents, or measure "
            "nothing: evals.run = []"
        )
    generator = torch.Generator().manual_seed(seed_for(config.training.seed, "held out"))
    picked = torch.randperm(len(contexts), generator=generator)[: config.evals.n_contexts]
    return torch.from_numpy(contexts)[picked.sort().values]


def _stream(config: DatasetConfig, backend: ModelBackend, documents: Documents, *, repeat: bool) -> ContextStream:
    policy = TokenPolicy.of(config, backend.special_tokens)
    return ContextStream(documents, backend.tokenize, policy, d_vocab=backend.d_vocab, repeat=repeat)


def open_source(
    config: TrainConfig, plugins: PluginManager, backend: ModelBackend, widths: dict[Site, int], dataset: Any
) -> ActivationSource:
    """The stream of shuffled batches."""
    stream = StreamContext(
        backend=backend,
        contexts=open_contexts(config, backend, dataset),
        widths=widths,
        batch_size=config.training.train_batch_size_tokens,
        seed=seed_for(config.training.seed, "shuffle"),
    )
    source: ActivationSource = plugins.build("activation_sources", config.activations.source, stream=stream)
    return source


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
    d_in: int,
    source: ActivationSource,
    schedule: ComposedSchedule,
    provenance: Mapping[str, Any] | None = None,
) -> SAETrainer:
    """An initialised SAE with everything that trains it; ``provenance`` is added to what is saved about its origin."""
    device = resolve_device(config.training.device, "training.device")
    options: SAEConfig = plugins.options("sae_architectures", config.sae)
    sae: SAE = build_module(plugins.find("sae_architectures", config.sae), options, d_in, plugins)
    normalised = config.activations.normalize_activations != "none"
    sample = source.peek()[config.site].cpu() if normalised or options.b_dec_init_method != "zeros" else None
    if sample is not None and not len(sample):
        raise DataError(f"the data does not fill one context of {config.dataset.context_size} tokens")
    scale = activation_scale(sample) if normalised and sample is not None else 1.0
    generator = torch.Generator().manual_seed(seed_for(config.training.seed, "init"))
    parameters = dict(sae.named_parameters())
    initialise(parameters, options, generator, sample if sample is None else sample.to(sae.W_enc.dtype) * scale)
    sae.to(device)
    metadata = _metadata(config, backend, plugins) | {"activation_scale": scale} | dict(provenance or {})
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


def _metadata(config: TrainConfig, backend: ModelBackend, plugins: PluginManager) -> dict[str, Any]:
    dataset = config.dataset
    return {
        "model_name": backend.name,
        "model_class_name": plugins.find("model_backends", config.model.backend).entry.name,
        "dataset_path": dataset.path,
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
