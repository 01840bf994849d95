"""The configuration: frozen data, nested by owner.  Nothing here imports torch, logs or touches a file.

Fields made by :func:`plugin_field` hold a plugin's key (``"cosine"``, ``"saekit:cosine"``) or an instance of its own
options class (``CosineConfig(end=0.1)``); in those made by :func:`path_field`, ``~`` is expanded.
:mod:`saekit.config.converter` reads, checks and writes all of it.
"""

from __future__ import annotations

from saekit.config.activations import ActivationsConfig, CacheConfig
from saekit.config.checkpoints import CheckpointsConfig
from saekit.config.dataset import DatasetConfig
from saekit.config.distributed import DistributedConfig
from saekit.config.evals import EvalsConfig
from saekit.config.fields import (
    CHOOSES_START,
    LATER,
    NEEDED_TO_LOAD,
    PLUGIN_KIND,
    SAME_AT_START,
    CompileMode,
    Dtype,
    PluginChoice,
    Token,
    check,
    is_free_in_run,
    path_field,
    plugin_field,
)
from saekit.config.model import ModelConfig
from saekit.config.optimizer import OptimizerConfig
from saekit.config.pretokenize import PretokenizeConfig
from saekit.config.reports import ReportsConfig
from saekit.config.run import TrainConfig
from saekit.config.sae import SAEConfig
from saekit.config.tokens import TokensConfig
from saekit.config.training import TrainingConfig
from saekit.config.values import shown
from saekit.site import Site

__all__ = [
    "CHOOSES_START",
    "LATER",
    "NEEDED_TO_LOAD",
    "PLUGIN_KIND",
    "SAME_AT_START",
    "ActivationsConfig",
    "CacheConfig",
    "CheckpointsConfig",
    "CompileMode",
    "DatasetConfig",
    "DistributedConfig",
    "Dtype",
    "EvalsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PluginChoice",
    "PretokenizeConfig",
    "ReportsConfig",
    "SAEConfig",
    "Site",
    "Token",
    "TokensConfig",
    "TrainConfig",
    "TrainingConfig",
    "check",
    "is_free_in_run",
    "path_field",
    "plugin_field",
    "shown",
]
