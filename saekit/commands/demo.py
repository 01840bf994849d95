"""``saekit demo``: an SAE on the embedded model and real text, offline, in about two minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console

from saekit.commands.dashboards import dashboard as write_dashboard
from saekit.commands.features import collect_features
from saekit.commands.jobs import train
from saekit.config.files import load_config
from saekit.defaults import DEFAULT_ARCHITECTURE, DEFAULT_EVALS, DEFAULT_SCHEDULE
from saekit.errors import ConfigError
from saekit.files.storage import write_text
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
_WHAT = (
    "This trains a sparse autoencoder on a small language model of Python source code and shows what it found. The "
    "model comes with saekit, the text with Python: nothing is downloaded."
)
_CONTEXTS = 384  # to look for features in, more than the evals need
_TOLD, _SHOWN = 5, 24  # features in the terminal, and in the dashboard
_CONTEXTS_SHOWN = 64  # to collect what these do, in two seconds


def demo(folder: str, overrides: Sequence[str] = (), plugins: PluginManager | None = None) -> TrainResult:
    """Train, and show what came out: numbers, pictures, five features with their text, and a dashboard of more."""
    plugins = plugins or default_manager()
    console = Console()
    config = load_config({**DEMO_CONFIG, "checkpoints": {"folder": folder}}, overrides, plugins=plugins)
    if missing := set(DEFAULT_EVALS) - {plugins.find(EVALS, choice).key for choice in config.evals.run}:
        lacking = " and ".join(sorted(missing))
        raise ConfigError([("evals.run", f"the demo shows what {lacking} finds: do not leave it out")])
    console.print(_WHAT, highlight=False, soft_wrap=True)
    result = train(config, plugins=plugins)
    from saekit.commands.outcome import show_files, show_table  # when something has been said

    show_table(result, console)
    best = _features(result, config)
    found = attrs.evolve(best, features=best.features[:_TOLD])
    from saekit.analysis.feature_texts import as_page, as_text

    for feature in found:
        console.print()
        console.print(as_text(feature), soft_wrap=True, end="")
    text, page = result.folder / "features.txt", result.folder / "features.html"  # `saekit show` finds them there
    write_text(text, f"{found!r}\n")
    write_text(page, as_page(found.features, f"Features of {result.folder.name}"))
    files: list[tuple[str, str | Path]] = [("features", text), ("features", page)]
    if best:
        dashboard = _dashboard(result, [one.feature for one in best], config.training.verbose)
        files += [("dashboard", dashboard), ("open it in a browser", dashboard.absolute().as_uri())]
    show_files(result, console, files)
    return result


def _features(result: TrainResult, config: TrainConfig) -> TopTexts:
    """Striking features on more text than the evals need, the most striking first."""
    with Status(verbose=config.training.verbose) as say:
        say("looking for features that are easy to read")
        from saekit.analysis.top_texts import find_top_texts

        wide = attrs.evolve(result.corpus, evals=attrs.evolve(config.evals, n_contexts=_CONTEXTS))
        contexts = wide.held_out(result.backend, config.training.seed)
        sae, backend, sites = result.sae, result.backend, config.sites
        return find_top_texts(sae, backend=backend, sites=sites, contexts=contexts, k=_SHOWN, diverse=True)


def _dashboard(result: TrainResult, features: Sequence[int], verbose: bool) -> Path:
    """A page of ``features``, in this order, in the run's folder.  What is collected of these alone does not stay."""
    with Status(verbose=verbose) as say, TemporaryDirectory(ignore_cleanup_errors=True) as place:
        say("writing a dashboard of them")
        options: dict[str, Any] = {"n_contexts": _CONTEXTS_SHOWN, "folder": Path(place) / "features", "verbose": False}
        store = collect_features(result, features=features, **options)
        title = f"Features of {result.folder.name}"
        return write_dashboard(store, features=features, out=result.folder / "dashboard.html", title=title)
