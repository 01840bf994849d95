"""The crosscoder that a stranger wrote: its mathematics, runs on two sites, and as an installed distribution."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.installed import ROOT, built_wheel, fresh_environment, run
from support.kernels import seeded
from support.ports import EARLY, EMBED, tables
from support.sweeps import DOCUMENTS, fake
from support.training import fakes, hashes
from torch import Tensor

import saekit
from saekit import SAE
from saekit.sae.build import build_module
from saekit.values import Ports, StepInput

EXAMPLE = ROOT / "examples" / "saekit-crosscoder"
MODULES = ["saekit_crosscoder/__init__.py", "saekit_crosscoder/module.py"]
PORTS = Ports({"early": 5, "late": 7})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module("saekit_crosscoder")


def test_it_is_short() -> None:
    assert sum(len((EXAMPLE / module).read_text().splitlines()) for module in MODULES) <= 120


def test_it_uses_the_public_interface_only() -> None:
    for module in MODULES:
        for node in ast.walk(ast.parse((EXAMPLE / module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                public = importlib.import_module(node.module)
                assert node.module.count(".") <= 1
                assert {name.name for name in node.names} <= set(public.__all__), node.module


def built(plugin: Any, **options: Any) -> SAE:
    plugins = fakes(plugin)
    config = plugin.CrosscoderConfig(**{"d_sae": 30, "dtype": "float64", "l1_coefficient": 0.3, **options})
    sae = build_module(plugins.find("sae_architectures", config), config, PORTS, plugins)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(1)) / 2)
    return sae


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": True, "activation": "saekit:tanh-relu",
                                          "l1_warm_up_steps": 8}], ids=str)  # fmt: skip
def test_the_fast_step_is_that_of_autograd(plugin: Any, options: dict[str, Any]) -> None:
    sae, x = built(plugin, **options), torch.randn(50, 12, dtype=torch.float64, generator=seeded(2))
    found: dict[str, dict[str, Tensor]] = {}
    results = []
    for way in ("fast", "reference"):
        sae.kernels = way
        assert (sae.why_reference() is None) == (way == "fast")
        results.append(sae.training_step(x, StepInput(step=4, generator=seeded())))
        found[way] = {name: value.grad for name, value in sae.named_parameters() if value.grad is not None}
        for value in sae.parameters():
            value.grad = None
    assert found["fast"].keys() == found["reference"].keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, value in found["reference"].items():
        assert torch.allclose(found["fast"][name], value, rtol=1e-9, atol=1e-12), name
    one, other = results
    assert one.loss.item() == pytest.approx(other.loss.item())
    assert one.metrics.keys() == other.metrics.keys() == {f"crosscoder/share_of_{name}" for name in PORTS.inputs}
    assert sum(one.metrics.values()).item() == pytest.approx(1)
    f, W = sae.encode(x), sae.W_dec
    expected = (f * (W[:, :5].norm(dim=1) + W[:, 5:].norm(dim=1))).sum(1).mean()
    assert one.losses["l1_loss"].item() == pytest.approx(expected.item())
    assert one.losses["mse_loss"].item() == pytest.approx((sae(x) - x).pow(2).sum(1).mean().item())


def test_its_own_test_passes(plugin: Any) -> None:
    importlib.import_module("test_saekit_crosscoder").test_it_keeps_what_an_architecture_promises()


def config(folder: Path, tokens: int) -> dict[str, Any]:
    training = {"training_tokens": tokens, "log_frequency": 1}
    base = fake(folder, sae={"name": "my_crosscoder", "d_sae": 24}, training=training,
                checkpoints={"name": "crossed"})  # fmt: skip
    del base["site"]
    return base | {"inputs": tables((EMBED, EARLY))}


def test_a_run_on_two_sites_that_is_resumed(plugin: Any, tmp_path: Path) -> None:
    plugins = fakes(plugin)
    whole = saekit.train(config(tmp_path / "whole", 1600), plugins=plugins, dataset=DOCUMENTS)
    saekit.train(config(tmp_path / "parts", 800), plugins=plugins, dataset=DOCUMENTS)
    parts = saekit.resume(
        tmp_path / "parts/crossed", overrides=["training.training_tokens=1600"], allow=["training.training_tokens"],
        plugins=plugins, dataset=DOCUMENTS,
    )  # fmt: skip
    assert hashes(parts.folder) == hashes(whole.folder)
    assert {name for name in whole.metrics if name.startswith("crosscoder/")} == {
        f"crosscoder/share_of_{site.name}" for site in (EMBED, EARLY)
    }
    loaded, x = SAE.load(whole.folder / "sae", plugins=plugins), torch.randn(9, 16, generator=seeded())
    assert loaded.info.sites == saekit.Sites((EMBED, EARLY))
    assert torch.equal(loaded(x), whole.sae(x))


TRAIN = """
import json, sys
import saekit

hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
result = saekit.train({
    "inputs": [{"hook_name": name} for name in hooks],
    "dataset": {"context_size": 32},
    "activations": {"normalize_activations": "expected_average_only_in",
                    "source": {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4}},
    "sae": {"name": "my_crosscoder", "d_sae": 256, "l1_coefficient": 0.3},
    "training": {"training_tokens": 40_000, "train_batch_size_tokens": 512, "lr": 3e-3, "verbose": False},
    "evals": {"n_contexts": 4},
    "reports": {"pictures": False},
    "checkpoints": {"folder": sys.argv[1]},
})
sae = saekit.SAE.load(result.folder / "sae")
print(json.dumps({"saekit": saekit.__file__, "class": type(sae).__name__, "ports": dict(sae.ports.inputs),
                  "metrics": {name: value for name, value in result.metrics.items() if isinstance(value, float)}}))
"""


@pytest.mark.slow
def test_the_example_in_a_fresh_environment(tmp_path: Path) -> None:
    python, fresh, environment = fresh_environment(tmp_path, built_wheel(tmp_path / "dist"), EXAMPLE)
    found = json.loads(run(python, "-c", TRAIN, tmp_path / "runs", cwd=tmp_path, env=environment).splitlines()[-1])
    assert Path(found["saekit"]).is_relative_to(fresh), "the built wheel, not the checkout"
    assert all((fresh / name / "py.typed").is_file() for name in ("saekit", "saekit_plugins")), "for type checkers"
    assert found["class"] == "Crosscoder"
    assert found["ports"] == {f"blocks.{n}.hook_resid_post": 128 for n in (0, 1)}
    assert found["metrics"]["evals/explained_variance"] > 0.5
    for n in (0, 1):
        assert 0.2 < found["metrics"][f"crosscoder/share_of_blocks.{n}.hook_resid_post"] < 0.8
