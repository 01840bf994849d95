"""saekit: train, load and study sparse autoencoders on language models, with everything pluggable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports

if TYPE_CHECKING:
    from saekit.config import PretokenizeConfig, SAEConfig, TrainConfig
    from saekit.config_files import dump_config, load_config
    from saekit.errors import ConfigError, DataError, ModelError, SaekitError
    from saekit.hookspecs import hookimpl
    from saekit.jobs import cache_activations, plan, pretokenize, resume, train
    from saekit.manager import PluginManager, default_manager
    from saekit.pretrained import PretrainedSAE, SAEFiles
    from saekit.protocols import Batch, RunInfo
    from saekit.registry import Entry
    from saekit.sae.module import SAE
    from saekit.site import Site
    from saekit.training.run import SweepResult, TrainResult
    from saekit.training.sweep import grid

__version__ = "0.2.0"

_HOMES = {
    "Batch": "saekit.protocols",
    "ConfigError": "saekit.errors",
    "DataError": "saekit.errors",
    "Entry": "saekit.registry",
    "ModelError": "saekit.errors",
    "PluginManager": "saekit.manager",
    "PretokenizeConfig": "saekit.config",
    "PretrainedSAE": "saekit.pretrained",
    "RunInfo": "saekit.protocols",
    "SAE": "saekit.sae.module",
    "SAEConfig": "saekit.config",
    "SAEFiles": "saekit.pretrained",
    "SaekitError": "saekit.errors",
    "SweepResult": "saekit.training.run",
    "Site": "saekit.site",
    "TrainConfig": "saekit.config",
    "TrainResult": "saekit.training.run",
    "cache_activations": "saekit.jobs",
    "default_manager": "saekit.manager",
    "dump_config": "saekit.config_files",
    "hookimpl": "saekit.hookspecs",
    "load_config": "saekit.config_files",
    "grid": "saekit.training.sweep",
    "plan": "saekit.jobs",
    "pretokenize": "saekit.jobs",
    "resume": "saekit.jobs",
    "train": "saekit.jobs",
}

__all__ = [
    "SAE",
    "Batch",
    "ConfigError",
    "DataError",
    "Entry",
    "ModelError",
    "PluginManager",
    "PretokenizeConfig",
    "PretrainedSAE",
    "RunInfo",
    "SAEConfig",
    "SAEFiles",
    "SaekitError",
    "Site",
    "SweepResult",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "cache_activations",
    "default_manager",
    "dump_config",
    "grid",
    "hookimpl",
    "load_config",
    "plan",
    "pretokenize",
    "resume",
    "train",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
