"""Mistakes are found before a run folder is made, and signals end a run well: however it trains."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import attrs
import pytest
from support import warm
from support.tiny import run_config

import saekit
from saekit.errors import (
    ConfigError,
    DataError,
    MissingPackageError,
    ModelError,
)
from saekit.testing import fake_plugin, isolated_manager


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"site": {"hook_name": "blocks.1.hook_resid_pots"}}, ModelError, "Did you mean 'blocks.1.hook_resid_post'"),
        ({"sae": {"d_in": 64}}, ConfigError, "sae.d_in: is 64, but .* of 'saekit/tiny-python' has width 128"),
        ({"dataset": {"context_size": 129}}, ConfigError, "takes at most 128 tokens"),
        ({"site": {"hook_head_index": 1}}, ConfigError, "has no heads"),
        ({"site": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 4}}, ConfigError, "has 4 heads"),
        ({"site": {"hook_name": "blocks.0.attn.hook_pattern"}}, ConfigError, r"\[2, 4, 7, 7\] for \[2, 7\] tokens"),
        ({"training": {"train_batch_size_tokens": 2000}}, ConfigError, "the buffer holds 1,024 activations"),
        ({"site": {"hook_name": "blocks.1.attn.hook_result"}}, ModelError, "does not run as the model is configured"),
        (
            {"model": {"backend": {"name": "HookedTransformer", "forward_kwargs": {"foo": 1}}}},
            ModelError,
            r"does not take \['foo'\] \(model.backend.forward_kwargs\)",
        ),
        (
            {"training": {"train_batch_size_tokens": 800}},
            ConfigError,
            "too few for batches of 800 and room",
        ),
        ({"evals": {"split": "train"}}, ConfigError, "is 'train', which is trained on"),
        ({"evals": {"split": "all"}}, ConfigError, "'all' holds its other splits"),
        ({"evals": {"split": None, "held_out_every": 0}}, ConfigError, "no text is left to measure on"),
        ({"evals": {"run": ["reconstruction"] * 2}}, ConfigError, "evals.run: names a plugin twice"),
        ({"training": {"device": "cuda:7"}}, ConfigError, "training.device: 'cuda:7' cannot be used"),
        ({"model": {"device": "cuda:7"}}, ConfigError, "model.device: 'cuda:7' cannot be used"),
        ({"model": {"name": "./nowhere"}}, ModelError, "there is no model folder './nowhere'"),
        ({"model": {"name": "gpt2-smal"}}, ModelError, "Did you mean 'gpt2-small'"),
        ({"evals": {"split": "test"}}, DataError, "has no split 'test'"),
        (
            {"lr_schedule": {"name": "cosine", "end": 0}, "training": {"lr_decay_steps": 2}},
            ConfigError,
            "nothing to decay from",
        ),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:50],
)
def test_mistakes_are_found_before_a_run_folder_is_made(
    tmp_path: Path, sections: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        saekit.train(run_config(tmp_path, **sections))
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_needs_a_package_says_so(tmp_path: Path) -> None:
    @attrs.frozen(kw_only=True)
    class NeedyConfig(saekit.SAEConfig):
        pass

    needy = fake_plugin("sae_architectures", "needy", config=NeedyConfig, requires=("no_such_package",), extra="x")
    plugins = isolated_manager(needy, builtins=True)
    with pytest.raises(MissingPackageError, match=r"pip install 'test\[x\]'"):
        saekit.train(run_config(tmp_path) | {"sae": "needy"}, plugins=plugins)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        (
            ["demo", "--folder", "runs", "training.log_frequency=1", "activations.source.n_batches_in_buffer=8"],
            signal.SIGINT,
            130,
        ),
        (["train", "run.toml", "training.training_tokens=10_000_000"], signal.SIGTERM, 143),
    ],
    ids=["Ctrl-C in the demo", "SIGTERM in a run"],
)
def test_a_signal_saves_the_sae_and_says_so(tmp_path: Path, command: list[str], number: int, code: int) -> None:
    (tmp_path / "run.toml").write_text(saekit.dump_config(saekit.load_config(run_config(Path("runs")))))
    process = warm.Popen("-m", "saekit.cli", *command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        written = list(tmp_path.glob("runs/*/metrics.jsonl"))
        if written and written[0].read_text().count("\n") >= 3:
            break
        time.sleep(0.2)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "interrupted after" in err
    (checkpoint,) = tmp_path.glob("runs/*/checkpoints/step-*")
    assert str(checkpoint.relative_to(tmp_path)) in err
    assert saekit.SAE.load(checkpoint).log_sparsity is not None
