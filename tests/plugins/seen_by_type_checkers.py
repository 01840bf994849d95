"""What a type checker makes of what plugins build and users call.

Nothing here runs: mypy reads it with the rest, by ``modules`` in ``pyproject.toml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import torch
from saekit_plugins.architectures.topk.module import TopKSAE
from saekit_plugins.evals.reconstruction.module import ReconstructionEval
from saekit_plugins.schedules.cosine import Cosine
from saekit_plugins.trackers.jsonl import JsonlTracker

import saekit
from saekit.config import TrainConfig
from saekit.kinds import EVALS, LR_SCHEDULES, MODEL_BACKENDS, SAE_ARCHITECTURES
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, LRSchedule, ModelBackend, Tracker


def keep(schedule: Cosine, tracker: JsonlTracker, measure: ReconstructionEval) -> tuple[LRSchedule, Tracker, Eval]:
    return schedule, tracker, measure


def look(manager: PluginManager, config: TrainConfig, key: str) -> None:
    assert_type(manager.build(LR_SCHEDULES, config.lr_schedule, lr=1.0, steps=3), LRSchedule)
    assert_type(manager.build(MODEL_BACKENDS, "x"), ModelBackend)
    assert_type(manager.bound(EVALS, "x"), Choice[Eval])
    assert_type(manager.bound(EVALS, "x").build(), Eval)
    assert_type(manager.build(key, "x"), Any)
    sae = manager.build(SAE_ARCHITECTURES, config.sae)
    if isinstance(sae, TopKSAE):
        assert_type(sae, TopKSAE)
        assert_type(sae.config.k, int)


def use(sae: saekit.SAE, x: torch.Tensor, folder: Path) -> None:
    assert_type(sae(x), torch.Tensor)
    sae.hook_sae_acts_post.add_hook(lambda features, hook: None).remove()
    assert_type(saekit.evaluate(sae, kl=True)["explained_variance"], float)
    assert_type(saekit.evaluate([sae, folder], n_contexts=8)["name"].errors, Mapping[str, float])
    print(saekit.evaluate("runs/first", save=False)["explained_variance"] + 1)
    assert_type(saekit.train({"sae": {"name": "topk"}}).sae, saekit.SAE)
    print(saekit.resume("runs/first").metrics["evals/l0"])
    model = saekit.load_model("gpt2")
    model.model.generate(model.tokenizer("text"))
    assert_type(model.hook_like("blocks.1.hook_resid_post"), str | None)
    with saekit.splice(model, sae) as spliced:
        assert_type(spliced.run(x, want="loss").loss, torch.Tensor)
