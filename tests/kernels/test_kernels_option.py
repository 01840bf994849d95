"""``training.kernels = "fast"`` where there is no fast way is an error before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny import run_config

import saekit
from saekit.errors import ConfigError
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.trainer import SAETrainer

DOCUMENTS = [{"text": f"text number {n} of some" * 9} for n in range(30)]


def manager() -> Any:
    return isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: FakeBackend()), builtins=True
    )


def config(folder: Path, sae: dict[str, Any], **training: Any) -> dict[str, Any]:
    return run_config(
        folder, model={"backend": "test:fake"}, site={"hook_name": "hook_embed"}, checkpoints={"name": "run"},
        dataset={"context_size": 16}, evals={"run": [], "split": None, "held_out_every": 0},
        training={
            "training_tokens": 512, "train_batch_size_tokens": 128, "device": "cpu", "kernels": "fast"
        } | training,
    ) | {"sae": {"d_sae": 32} | sae}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch, when it is about to compile
@pytest.mark.parametrize(
    ("sae", "training", "reason"),
    [
        ({"use_ghost_grads": True}, {}, "use_ghost_grads has no fast path"),
        ({"lp_norm": float("inf")}, {}, "an infinite lp_norm has no fast path"),
        ({}, {"autocast": True}, "autocast rounds its products"),
        ({}, {"compile": True}, "it is compiled"),
        ({"name": "topk", "k": 30}, {}, "k = 30 is so large a part of the features that sparse products cost more"),
    ],
)  # fmt: skip
def test_no_fast_way(
    sae: dict[str, Any], training: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAETrainer, "train_on", lambda *args: pytest.fail("a step was made"))
    run = config(tmp_path, sae, **training)
    with pytest.raises(ConfigError) as caught:
        saekit.train(run, plugins=manager(), dataset=DOCUMENTS)
    assert "training.kernels" in str(caught.value)
    assert f"is 'fast', but there is no fast way to train this SAE: {reason}. Choose 'auto'" in str(caught.value)
    assert not (tmp_path / "run").exists()
    problems = saekit.plan(run, plugins=manager(), dataset=DOCUMENTS).problems
    assert [reason in problem for problem in problems] == [True]


@pytest.mark.parametrize("sae", [{}, {"dtype": "float64"}, {"dtype": "bfloat16"}, {"name": "topk", "k": 2}], ids=str)
def test_where_there_is_one(sae: dict[str, Any], tmp_path: Path) -> None:
    run = config(tmp_path, sae)
    assert saekit.plan(run, plugins=manager(), dataset=DOCUMENTS).facts["SAE step"].startswith("fast kernels")
    assert saekit.train(run, plugins=manager(), dataset=DOCUMENTS).metrics["details/n_training_tokens"] == 512
