"""What evals find that need no text, of SAEs that have no language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from saekit._version import __version__
from saekit.commands.material import Material
from saekit.commands.subjects import Subject
from saekit.config import ModelConfig
from saekit.evals.calling import called
from saekit.kinds import MODEL_BACKENDS
from saekit.measuring import Evaluation
from saekit.plugins.building import blamed
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval
from saekit.runs.checks import has_model
from saekit.site import Sites
from saekit.training.metrics import apart, numbers_of
from saekit.values import EvalRun

__all__ = ["have_no_model", "measured_without_model"]


def have_no_model(
    subjects: Mapping[str, Subject], evals: Mapping[str, Choice[Eval]], material: Material
) -> dict[str, Subject]:
    """Those of ``subjects`` of which the run had no language model, where ``evals`` need no text and none is given."""
    text = material.text
    if material.model is not None or material.backend is not None or text.contexts is not None:
        return {}
    if text.dataset is not None or any(choice.needs_text for choice in evals.values()):
        return {}
    return {name: one for name, one in subjects.items() if _has_none(one, material.plugins)}


def _has_none(subject: Subject, plugins: PluginManager) -> bool:
    if subject.sae.info.sites is None:
        return False
    if subject.config is not None:
        return not has_model(subject.config, plugins)
    return subject.fault is None and subject.backend is None and not subject.sae.info.metadata.get("model_name")


def measured_without_model(
    subjects: Mapping[str, Subject], evals: Mapping[str, Choice[Eval]], plugins: PluginManager
) -> dict[str, Evaluation]:
    """What ``evals`` find, as in a run without a model: contexts are None."""
    key = next(item.key for item in plugins.registry(MODEL_BACKENDS).items if item.entry.no_model)
    backend = plugins.build(MODEL_BACKENDS, key, model=ModelConfig(), loaded=None)
    found = {}
    for name, subject in subjects.items():
        sae, sites = subject.sae, subject.sae.info.sites
        assert isinstance(sites, Sites)
        run = EvalRun(
            name=name, backend=backend, sites=sites, device=str(sae.device), steps=0, seed=0,
            open_contexts=lambda: None,
        )  # fmt: skip
        numbers = {}
        for of, choice in evals.items():
            with blamed(choice.item, "__call__", at_work=True):
                told = called(choice.build(run=run), sae, backend=backend, sites=sites, contexts=None)
            numbers[of] = numbers_of(of, told)
        about: dict[str, Any] = {
            "sae": name,
            **subject.weights,
            "model": backend.name,
            "dataset": None,
            "sites": sites.name,
            "evals": {of: attrs.asdict(choice.options) for of, choice in evals.items()},
            "saekit": __version__,
        }
        found[name] = Evaluation(values=apart(numbers), about=about)
    return found
