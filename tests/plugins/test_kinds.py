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
from collections.abc import Callable
from pathlib import Path
import saekit
import torch
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

def use(sae: saekit.SAE, x: torch.Tensor, folder: Path) -> None:
    reveal_type(sae(x))
    sae.hook_sae_acts_post.add_hook(lambda features, hook: None).remove()
    reveal_type(saekit.evaluate(sae, kl=True)["explained_variance"])
    reveal_type(saekit.evaluate([sae, folder], n_contexts=8)["name"].errors)
    print(saekit.evaluate("runs/first", save=False)["explained_variance"] + 1)
    reveal_type(saekit.train({"sae": {"name": "topk"}}).sae)
    print(saekit.resume("runs/first").metrics["evals/l0"])
    model = saekit.load_model("gpt2")
    model.model.generate(model.tokenizer("text"))
    reveal_type(model.hook_like("blocks.1.hook_resid_post"))
    with saekit.splice(model, sae) as spliced:
        reveal_type(spliced.run(x, want="loss").loss)
"""
REVEALED = [
    "saekit.protocols.LRSchedule",
    "saekit.protocols.ModelBackend",
    "saekit.plugins.choice.Choice[saekit.protocols.Eval]",
    "saekit.protocols.Eval",
    "Any",
    "saekit_plugins.architectures.topk.module.TopKSAE",
    "int",
    "torch.Tensor",
    "float",
    "typing.Mapping[str, float]",
    "saekit.pretrained.sae.SAE",
    "str | None",
    "torch.Tensor",
]
TORCH = {
    "__init__": "from typing import Any\nfrom . import nn as nn\n"
    "class Tensor:\n    def __getattr__(self, name: str) -> Any: ...\ndef __getattr__(name: str) -> Any: ...\n",
    "nn": "from typing import Any\nfrom collections.abc import Callable\n"
    "class Module:\n    __call__: Callable[..., Any]\n    def __getattr__(self, name: str) -> Any: ...\n"
    "def __getattr__(name: str) -> Any: ...\n",
}
"""What of torch's own types decides what users see; to read all of them would take most of the time."""
SETTINGS = """
[mypy]
strict = true
explicit_package_bases = true
follow_imports = silent
[mypy-numpy.*,datasets.*,transformers.*,huggingface_hub.*,rich.*,safetensors.*,pandas.*,jinja2.*,lazy_loader.*]
follow_imports = skip
[mypy-saekit.analysis.*,saekit.dashboards.*,saekit.data.*,saekit.distributed.*,saekit.exports.*,saekit.features.*]
follow_imports = skip
[mypy-saekit.kernels.*,saekit.reports.*,saekit.training.*,saekit.progress,saekit.status]
follow_imports = skip
"""


@pytest.mark.slow
def test_what_a_type_checker_sees_in_a_subprocess(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(f"{SETTINGS}[mypy-*]\n")
    (tmp_path / "stubs" / "torch").mkdir(parents=True)
    for name, source in TORCH.items():
        (tmp_path / "stubs" / "torch" / f"{name}.pyi").write_text(source)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache",
         tmp_path / "snippet.py"],
        capture_output=True, text=True, env={"MYPYPATH": f"{tmp_path / 'stubs'}:{ROOT}:{ROOT / 'plugins'}"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.findall(r'Revealed type is "(?:builtins\.)?(.*)"', found.stdout) == REVEALED, found.stdout
