"""Kinds of plugin, and what a type checker makes of what they build.  Nothing here imports torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import saekit
from saekit.errors import UnknownKeyError
from saekit.kinds import KINDS, LR_SCHEDULES, MODEL_BACKENDS, kind_of
from saekit.testing import fake_plugin, isolated_manager

ROOT = Path(saekit.__file__).parent.parent


def test_hook_label_and_promises_follow_from_a_kind() -> None:
    assert LR_SCHEDULES.hook == "saekit_register_lr_schedules"
    assert (LR_SCHEDULES.one, LR_SCHEDULES.labels) == ("an LR schedule", "LR schedules")
    assert (LR_SCHEDULES.methods, LR_SCHEDULES.values) == (("__call__",), ("end",))
    assert {"hook_names", "tokenize"} <= set(MODEL_BACKENDS.methods)
    assert {"name", "special_tokens"} <= set(MODEL_BACKENDS.values)
    assert {kind.one for kind in KINDS.values()} == {
        "a model backend", "an activation function", "a pretrained loader", "an LR schedule", "an SAE architecture",
        "an activation source", "a tracker", "an eval", "an optimizer", "an input transform", "a release list",
        "a step kernel",
    }  # fmt: skip
    for kind in KINDS.values():
        assert kind.methods or kind.values, "it promises something"
        assert not [name for name in kind.methods if name.startswith("_") and not name.endswith("__")]


def test_a_kind_or_its_name() -> None:
    manager = isolated_manager(fake_plugin(LR_SCHEDULES))
    assert manager.get(LR_SCHEDULES, "fake") is manager.get("lr_schedules", "fake")
    assert kind_of("lr_schedules") is kind_of(LR_SCHEDULES) is LR_SCHEDULES
    with pytest.raises(UnknownKeyError, match="there is no kind of plugin 'schedules'; the kinds are model_backends, "):
        kind_of("schedules")


SNIPPET = """
from saekit.config import TrainConfig
from saekit.kinds import EVALS, LR_SCHEDULES, MODEL_BACKENDS, SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, LRSchedule, Tracker
from saekit_plugins.architectures.topk.module import TopKSAE
from saekit_plugins.evals.reconstruction.module import ReconstructionEval
from saekit_plugins.schedules.cosine import Cosine
from saekit_plugins.trackers.jsonl import JsonlTracker

def keep(schedule: Cosine, tracker: JsonlTracker, measure: ReconstructionEval) -> tuple[LRSchedule, Tracker, Eval]:
    return schedule, tracker, measure

def look(manager: PluginManager, config: TrainConfig, key: str) -> None:
    reveal_type(manager.build(LR_SCHEDULES, config.lr_schedule, lr=1.0, steps=3))
    reveal_type(manager.build(MODEL_BACKENDS, "x"))
    reveal_type(manager.bound(EVALS, "x"))
    reveal_type(manager.bound(EVALS, "x").build())
    reveal_type(manager.build(key, "x"))
    sae = manager.build(SAE_ARCHITECTURES, config.sae)
    if isinstance(sae, TopKSAE):
        reveal_type(sae)
        reveal_type(sae.config.k)
"""
REVEALED = [
    "saekit.protocols.LRSchedule",
    "saekit.protocols.ModelBackend",
    "saekit.plugins.choice.Choice[saekit.protocols.Eval]",
    "saekit.protocols.Eval",
    "Any",
    "saekit_plugins.architectures.topk.module.TopKSAE",
    "int",
]
SETTINGS = """
[mypy]
strict = true
explicit_package_bases = true
follow_imports = silent
[mypy-torch.*,numpy.*,datasets.*,transformers.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_what_a_type_checker_sees_in_a_subprocess(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(f"{SETTINGS}[mypy-*]\n")
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache",
         tmp_path / "snippet.py"],
        capture_output=True, text=True, env={"MYPYPATH": f"{ROOT}:{ROOT / 'plugins'}"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.findall(r'Revealed type is "(?:builtins\.)?(.*)"', found.stdout) == REVEALED, found.stdout
