"""Devices that are not at hand: a GPU that must not be woken, and Apple's, which has no float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support import warm
from support.optimizers import adam_for

import saekit
from saekit import SAE
from saekit.abilities import GuardedOptimizer
from saekit.devices import free_memory, resolve_device, widest
from saekit.errors import ConfigError
from saekit.runs.randomness import random_state, seeded
from saekit.sae.build import build_module

WOKEN = (
    warm.ANEW
    + """import sys
import torch
import torch._dynamo  # which looks through torch's functions when it is imported

def woken(*args, **kwargs):
    raise AssertionError("the GPU was woken")

torch.cuda.is_available = lambda: True  # there is one, which nobody asked for
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = woken
for name in ("get_rng_state_all", "get_rng_state", "synchronize", "current_device", "mem_get_info"):
    setattr(torch.cuda, name, woken)

import saekit
from saekit.abilities import GuardedOptimizer
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

plugins = isolated_manager(
    fake_plugin("model_backends", build=lambda config, **services: FakeBackend()), builtins=True
)
documents = [{"text": f"text number {n} of some" * 9} for n in range(60)]
config = {
    "model": {"backend": "test:fake", "device": "cpu"}, "site": {"hook_name": "hook_embed"},
    "dataset": {"context_size": 16}, "sae": {"name": "batchtopk", "k": 2, "d_sae": 32},
    "activations": {"source": {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4},
                    "cache": {"folder": sys.argv[1] + "/cache"}},
    "training": {"training_tokens": 512, "train_batch_size_tokens": 128, "device": "cpu", "verbose": False},
    "evals": {"split": None, "held_out_every": 4, "n_contexts": 4},
    "checkpoints": {"folder": sys.argv[1], "name": "run", "n_checkpoints": 2},
}
given = {"plugins": plugins, "dataset": documents}
assert not saekit.plan(config, **given).problems
saekit.train(config, **given)
saekit.resume(sys.argv[1] + "/run", overrides=["training.training_tokens=768"],
              allow=["training.training_tokens"], **given)
saekit.cache_activations(config, **given)
assert saekit.SAE.load(sys.argv[1] + "/run/sae").threshold > 0
assert not torch.cuda.is_initialized()
print("asleep")
"""
)


def test_a_run_on_the_cpu_wakes_no_gpu(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WOKEN)
    found = warm.python(script, tmp_path)
    assert found.stdout.strip().endswith("asleep"), found.stderr


def test_a_gpu_that_is_woken_meanwhile_is_given_back_as_it_would_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looked at its random numbers before, for that would have woken it."""
    awake, seeds = [False], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: awake[0])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["the state"])
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1234)
    seeds.clear()
    with seeded(7):
        assert random_state()["cuda"] == []
        awake[0] = True
        assert random_state()["cuda"] == ["the state"]
    assert seeds[-1] == 1234
    seeds.clear()
    with seeded(7):  # nobody woke it
        awake[0] = False
        assert random_state()["cuda"] == []


def test_auto_is_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, mps = [False], [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps[0])
    assert resolve_device("auto", "training.device") == "cpu"
    mps[0] = True
    assert resolve_device("auto", "training.device") == "mps"
    assert resolve_device("auto", "training.device", "bfloat16") == "mps"
    assert resolve_device("auto", "training.device", "float64") == "cpu"
    cuda[0] = True
    assert resolve_device("auto", "training.device", "float64") == "cuda"
    with pytest.raises(ConfigError, match="training.device: 'mps' cannot be used"):
        resolve_device("mps", "training.device")


def test_float64_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnMPS:
        device = torch.device("mps")

    monkeypatch.setattr(torch, "empty", lambda *args, **options: OnMPS())
    assert resolve_device("mps", "training.device", "float32") == "mps"
    with pytest.raises(ConfigError, match="training.device: 'mps' has no float64, which was asked for"):
        resolve_device("mps", "training.device", "float64")
    assert widest(torch.device("mps")) == torch.float32
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64


def built(config: Any) -> SAE:
    plugins = saekit.default_manager()
    return build_module(plugins.find("sae_architectures", config), config, 8, plugins)


def test_running_sums_move_to_a_device_without_float64() -> None:
    def to_apple(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return tensor.clone()

    sae = built(BatchTopKConfig(k=2, d_sae=32))
    with torch.no_grad():
        sae.threshold_average.fill_(0.75)
    sae._apply(to_apple)
    assert sae.threshold_average.dtype == sae.threshold_updates.dtype == torch.float32
    assert sae.threshold_average.item() == 0.75
    features = torch.tensor([[0.0, 2.0]])
    sae.after_features(features)  # type: ignore[operator]
    assert sae.threshold_average.dtype == torch.float32
    assert sae.threshold_average.item() == pytest.approx(0.99 * 0.75 + 0.01 * 2)
    assert float(sae.threshold) > 0


def test_a_float64_parameter_on_such_a_device_is_an_error() -> None:
    def to_apple(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("no float64")
        return tensor.clone()

    with pytest.raises(TypeError, match="no float64"):
        built(StandardConfig(d_sae=32, dtype="float64"))._apply(to_apple)


@pytest.mark.parametrize(
    "config", [StandardConfig(d_sae=32), TopKConfig(k=2, d_sae=32), BatchTopKConfig(k=2, d_sae=32)]
)
def test_what_was_never_tried_on_a_device_is_not_used_there(config: Any) -> None:
    """The kernels and torch's fused Adam; "meta" stands for a device of another kind."""
    sae = built(config)
    sae.to("meta")
    assert sae.step_path() == "plain torch: the kernels are for cpu and cuda, not for meta"
    optimizer = adam_for(sae.named_parameters(), lambda step: 0.1)
    assert not isinstance(optimizer._inner, GuardedOptimizer)
    with torch.no_grad():
        assert sae(torch.zeros(3, 8, device="meta")).shape == (3, 8)
    assert {buffer.dtype for buffer in sae.buffers()} <= {torch.float64}


def test_memory_is_given_back_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: called.append("mps"))
    free_memory()
    assert not called
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    free_memory()
    assert called == ["cuda", "mps"]
