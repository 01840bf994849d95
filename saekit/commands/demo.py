"""``saekit demo``: an SAE on the embedded model and real text, offline, in under two minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit.commands.jobs import train
from saekit.config.files import load_config
from saekit.defaults import DEFAULT_ARCHITECTURE, DEFAULT_EVAL, DEFAULT_SCHEDULE
from saekit.errors import ConfigError
from saekit.kinds import EVALS
from saekit.plugins.manager import PluginManager, default_manager

if TYPE_CHECKING:
    from saekit.analysis.examples import FeatureExamples
    from saekit.runs.run import TrainResult

__all__ = ["DEMO_CONFIG", "demo"]

DEMO_CONFIG: Mapping[str, Any] = {
    "model": {"name": "saekit/tiny-python", "device": "cpu"},
    "dataset": {"path": "saekit/python-stdlib", "context_size": 128},
    "site": {"hook_name": "blocks.1.hook_resid_post"},
    "sae": {
        "name": DEFAULT_ARCHITECTURE,
        "d_sae": 1024,
        "l1_coefficient": 5.0,
        "l1_warm_up_steps": 50,
        "b_dec_init_method": "geometric_median",
        "init_encoder_as_decoder_transpose": True,
    },
    "lr_schedule": {"name": DEFAULT_SCHEDULE},
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


def demo(folder: str, overrides: Sequence[str] = (), plugins: PluginManager | None = None) -> TrainResult:
    """Train, and show what came out: numbers, a picture of the curves, and five features with their text."""
    plugins = plugins or default_manager()
    console = Console()
    config = load_config({**DEMO_CONFIG, "checkpoints": {"folder": folder}}, overrides, plugins=plugins)
    if DEFAULT_EVAL not in {plugins.find(EVALS, choice).key for choice in config.evals.run}:
        raise ConfigError([("evals.run", f"the demo shows the numbers of {DEFAULT_EVAL}, so it must be there")])
    console.print(
        f"Training an SAE on [bold]{config.site.hook_name}[/] of [bold]{config.model.name}[/] "
        f"({config.training.training_tokens:,} tokens of {config.dataset.path}) ..."
    )
    result = train(config, plugins=plugins)
    console.print(_numbers(result))
    found = _features(result, config)
    for feature in found:
        console.print(_shown(feature), soft_wrap=True)
    pictures = " and ".join(map(str, result.pictures)) or "not drawn"
    console.print(
        f"\nTraining curves: {pictures}\nThe SAE:         {result.folder / 'sae'}", highlight=False, soft_wrap=True
    )
    return result


def _numbers(result: TrainResult) -> Table:
    metrics = result.metrics
    table = Table(title="On held-out text", title_justify="left", show_header=False)
    for name, text in (
        ("explained variance", f"{metrics['evals/explained_variance']:.3f}"),
        ("L0 (features firing per token)", f"{metrics['evals/l0']:.1f} of {result.sae.d_sae}"),
        ("CE recovered", f"{metrics['evals/ce_recovered']:.3f}"),
        (
            "CE clean / with the SAE / ablated",
            f"{metrics['evals/ce_loss_without_sae']:.3f} / {metrics['evals/ce_loss_with_sae']:.3f} / "
            f"{metrics['evals/ce_loss_with_ablation']:.3f}",
        ),
        ("dead features, in training", f"{metrics['sparsity/dead_features']:.0f}"),
    ):
        table.add_row(name, text)
    return table


def _features(result: TrainResult, config: Any, n_contexts: int = 384) -> list[FeatureExamples]:
    """Five striking features on more text than the evals need."""
    from saekit.analysis.examples import feature_peaks, striking_features, top_examples

    wide = attrs.evolve(result.corpus, evals=attrs.evolve(config.evals, n_contexts=n_contexts))
    contexts = wide.held_out(result.backend, config.training.seed)
    peaks = feature_peaks(result.sae, backend=result.backend, sites=config.site, contexts=contexts)
    features = striking_features(peaks, contexts, 5)
    return [top_examples(feature, peaks, contexts, result.backend) for feature in features]


def _shown(found: FeatureExamples) -> Text:
    text = Text(f"\nFeature {found.feature}, firing on {found.frequency:.2%} of tokens\n", style="bold")
    for example in found.examples:
        text.append(f"  {example.activation:6.1f}  ", style="dim")
        text.append(_one_line(example.before)[-40:].rjust(40), style="not bold")
        text.append(f"«{_one_line(example.token)}»", style="bold black on yellow")
        text.append(_one_line(example.after)[:36] + "\n", style="not bold")
    return text


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥")
