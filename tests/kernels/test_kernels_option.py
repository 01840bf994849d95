"""``training.kernels = "fast"`` where there is no fast way is an error before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import built, count_screens, looking_in_int8
from support.tiny import run_config

import saekit
import saekit.kernels.screen
import saekit.precision
from saekit.config import TrainingConfig
from saekit.errors import ConfigError
from saekit.planning.step_costs import step_bytes
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


def test_a_first_look_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has none it is an error that says so; where it has, what is learned is the same."""
    sae = {"d_sae": 1024, "name": "topk", "k": 4}
    run = config(tmp_path / "int8", sae, kernels="int8", train_batch_size_tokens=384, training_tokens=768)
    monkeypatch.setattr(saekit.kernels.screen, "why_no_int8_products", lambda: "this CPU has no AVX-512 VNNI")
    with pytest.raises(
        ConfigError, match="is 'int8', but .* no first look in int8: this CPU has no AVX-512 VNNI. Choose"
    ):
        saekit.train(run, plugins=manager(), dataset=DOCUMENTS)
    assert any("no AVX-512 VNNI" in one for one in saekit.plan(run, plugins=manager(), dataset=DOCUMENTS).problems)
    looking_in_int8(monkeypatch)
    path = "fast kernels, a first look in int8"
    assert saekit.plan(run, plugins=manager(), dataset=DOCUMENTS).facts["SAE step"] == path
    calls = count_screens(monkeypatch)
    found = saekit.train(run, plugins=manager(), dataset=DOCUMENTS)
    assert calls == [384, 384]
    plain = config(tmp_path / "fast", sae, train_batch_size_tokens=384, training_tokens=768)
    expected = saekit.train(plain, plugins=manager(), dataset=DOCUMENTS)
    assert found.metrics["losses/mse_loss"] == pytest.approx(expected.metrics["losses/mse_loss"], rel=1e-5)


def test_no_first_look_in_int8_where_products_are_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that has both: a step in bfloat16 is not looked at first, and int8 is refused, not left out."""
    looking_in_int8(monkeypatch)
    for module in (saekit.precision, saekit.kernels.screen):
        monkeypatch.setattr(module, "changes_products", lambda precision, device: True)
    sae = {"d_sae": 1024, "name": "topk", "k": 4}
    run = config(tmp_path, sae, kernels="int8", matmul_precision="medium")
    with pytest.raises(ConfigError, match=r"is 'int8', but .*: products are in bfloat16 anyway\. Choose"):
        saekit.train(run, plugins=manager(), dataset=DOCUMENTS)
    assert any("in bfloat16 anyway" in one for one in saekit.plan(run, plugins=manager(), dataset=DOCUMENTS).problems)


def test_what_such_steps_would_need_is_that_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    looking_in_int8(monkeypatch)
    monkeypatch.setattr(saekit.kernels.screen, "changes_products", lambda precision, device: True)
    sae = built(TopKConfig(d_sae=1024, k=4))
    sae.kernels = "int8"
    needs = {
        precision: step_bytes(sae, TrainingConfig(kernels="int8", matmul_precision=precision), "cpu")
        for precision in ("highest", "medium")
    }
    sae.kernels = "reference"
    plain = step_bytes(sae, TrainingConfig(kernels="reference"), "cpu")
    assert needs["highest"] < plain
    assert needs["medium"] == plain
