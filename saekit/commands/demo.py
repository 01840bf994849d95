"""``saekit demo``: an SAE on the embedded model and real text, offline, in about two minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console

from saekit.commands.jobs import train
from saekit.commands.outcome import show_pictures, show_result
from saekit.config.files import load_config
from saekit.errors import ConfigError
from saekit.kinds import EVALS
from saekit.plugins.manager import PluginManager, default_manager
from saekit.status import Status

if TYPE_CHECKING:
    from saekit.analysis.feature_texts import TopTexts
    from saekit.config import TrainConfig
    from saekit.runs.results import TrainResult

__all__ = ["DEMO_CONFIG", "demo"]

DEMO_CONFIG: Mapping[str, Any] = {
    "model": {"name": "saekit/tiny-python", "device": "cpu"},
    "dataset": {"path": "saekit/python-stdlib", "context_size": 128},
    "site": {"hook_name": "blocks.1.hook_resid_post"},
    "sae": {
        "name": "saekit:standard",
        "d_sae": 1024,
        "l1_coefficient": 5.0,
        "l1_warm_up_steps": 50,
        "b_dec_init_method": "geometric_median",
        "init_encoder_as_decoder_transpose": True,
    },
    "lr_schedule": {"name": "saekit:constant"},
    "training": {
        "training_tokens": 1_300_000,
        "train_batch_size_tokens": 2048,
        "lr": 1e-3,
        "lr_warm_up_steps": 20,
        "lr_decay_steps": 130,
        "dead_feature_window": 100,
        "feature_sampling_window": 100,
        "device": "cpu",
    },
    "evals": {"split": "heldout"},
}
_CONTEXTS = 384  # to look for features in, more than the evals need
FEATURES = "features.txt", "features.html"


def demo(folder: str, overrides: Sequence[str] = (), plugins: PluginManager | None = None) -> TrainResult:
    """Train, and show what came out: numbers, a picture of the curves, and five features with their text."""
    plugins = plugins or default_manager()
    console = Console()
    config = load_config({**DEMO_CONFIG, "checkpoints": {"folder": folder}}, overrides, plugins=plugins)
    if "saekit:reconstruction" not in {plugins.find(EVALS, choice).key for choice in config.evals.run}:
        raise ConfigError([("evals.run", "the demo shows the numbers of saekit:reconstruction, so it must be there")])
    result = train(config, plugins=plugins)
    show_result(result, console)
    _show_features(_features(result, config), result, console)
    with Status(verbose=config.training.verbose) as say:
        say("drawing the training curves")
        pictures = show_pictures(result)
    ...
    return result
