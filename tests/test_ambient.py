"""What a notebook has set in torch before it calls saekit changes no byte, and is as it was afterwards."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.evals.downstream import DownstreamConfig
from saekit_plugins.evals.downstream.module import DownstreamEval
from saekit_plugins.sources.live import LiveConfig
from support.tiny import hooked_transformer, run_config

import saekit
from saekit.ambient import ambient
from saekit.config.files import load_config
from saekit.evals import variance_metrics
from saekit.sae.build import build_module
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.values import StepInput

SITE = "blocks.0.hook_resid_post"
DOCUMENTS = [{"text": f"line {n} of a text that is {n % 7} long\n" * 5} for n in range(40)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients off": lambda: torch.set_grad_enabled(False),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: default_device("meta"),
    "cpu by default": lambda: default_device("cpu"),
    "in a device's context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


OTHERS = ("no_grad", "bfloat16 by default", "cpu by default")  # each like another one
TRAINED = [state for state in STATES if state not in OTHERS]


def manager() -> Any:
    return isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: FakeBackend()), builtins=True
    )


def some_run(folder: Path, name: str = "run", **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "model": {"backend": "test:fake"}, "site": {"hook_name": SITE}, "dataset": {"context_size": 16},
        "sae": {"d_sae": 24}, "checkpoints": {"name": name},
        "training": {
            "training_tokens": 768, "train_batch_size_tokens": 128, "device": "cpu", "dead_feature_window": 2
        },
        "activations": {"source": LiveConfig(store_batch_size_prompts=8, n_batches_in_buffer=4)},
        "evals": {"split": None, "held_out_every": 4, "n_contexts": 4},
    }  # fmt: skip
    for section, options in sections.items():
        base[section] = base.get(section, {}) | options
    return run_config(folder, **base)


KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "ghost": {"sae": {"use_ghost_grads": True, "l1_coefficient": 3.0, "d_sae": 200}, "training": {"lr": 0.5}},
    "float64": {"sae": {"dtype": "float64", "noise_scale": 0.1, "b_dec_init_method": "geometric_median"}},
    "reference": {"training": {"kernels": "reference"}},
    "autocast": {"training": {"autocast": True}},
    "bfloat16": {"sae": {"dtype": "bfloat16"}},
    "fast": {
        "sae": {"b_dec_init_method": "mean"}, "activations": {"normalize_activations": "expected_average_only_in"}
    },
    "topk": {"sae": {"name": "topk", "k": 3}},
    "batchtopk": {"sae": {"name": "batchtopk", "k": 3}, "training": {"kernels": "reference"}},
}  # fmt: skip


def sweep(folder: Path) -> list[dict[str, Any]]:
    configs = []
    for sections in KINDS.values():
        kind = {"name": "standard"} | sections.get("sae", {})
        if kind["name"] == "standard":
            kind = {"l1_coefficient": 1.0} | kind
        config = some_run(folder, "sweep", **{**sections, "sae": {"d_sae": 24} | kind})
        if kind["name"] != "standard":
            config["sae"].pop("l1_coefficient")
        configs.append(config)
    return configs


def files(folder: Path) -> dict[str, Any]:
    """The checksums of everything that a run leaves, but for what names its place; metrics without the time."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "cfg.json"
    }
    for path in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = [line | {"seconds": 0} for line in lines]
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plain")
    found = files(saekit.train(sweep(folder), plugins=manager(), dataset=DOCUMENTS).folder)
    ghosts = next(lines for name, lines in found.items() if name.startswith("0_") and name.endswith(".jsonl"))
    assert any(line.get("losses/ghost_grad_loss") for line in ghosts), "no feature is dead"
    return found


@pytest.mark.parametrize("state", TRAINED)
def test_training_gives_the_same_bytes(state: str, plain: dict[str, Any], tmp_path: Path) -> None:
    with STATES[state]():
        result = saekit.train(sweep(tmp_path), plugins=manager(), dataset=DOCUMENTS)
    assert not result.diverged
    assert files(result.folder) == plain


def everything_else(folder: Path) -> tuple[Any, ...]:
    """What a run that is resumed leaves, a plan says, and loading and measuring give."""
    options = {
        "sae": {"d_sae": 24, "use_ghost_grads": True},
        "activations": {"cache": {"folder": str(folder / "c")}},
    }
    config = some_run(folder, **options)
    short = {**config, "training": config["training"] | {"training_tokens": 256}}
    plan = saekit.plan(config, plugins=manager(), dataset=DOCUMENTS)
    saekit.train(short, plugins=manager(), dataset=DOCUMENTS)
    longer = ["training.training_tokens=768"]
    saekit.resume(
        folder / "run", overrides=longer, allow=["training.training_tokens"], plugins=manager(), dataset=DOCUMENTS
    )
    saekit.cache_activations(config, plugins=manager(), dataset=DOCUMENTS)
    sae = saekit.SAE.load(folder / "run" / "sae")
    assert all(value.requires_grad and not value.is_inference() for value in sae.parameters())
    backend, contexts = FakeBackend(), torch.arange(64, device="cpu").reshape(4, 16)
    where = {"backend": backend, "sites": saekit.Sites.one(saekit.Site(hook_name=SITE)), "contexts": contexts}
    with torch.device("cpu"), default_dtype(torch.float32):  # what the caller passes is the caller's
        backend.run(contexts, read=[SITE])
        rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    measured = DownstreamEval(DownstreamConfig())(sae, **where) | variance_metrics(sae, [rows])
    return files(folder), plan.problems, plan.warnings, plan.facts["SAE step"], measured


@pytest.fixture(scope="module")
def of_everything_else(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    found = everything_else(tmp_path_factory.mktemp("else"))
    assert not found[1]
    return found


@pytest.mark.parametrize("state", TRAINED)
def test_everything_else_gives_the_same_numbers(
    state: str, of_everything_else: tuple[Any, ...], tmp_path: Path
) -> None:
    """Resuming, planning, caching, loading and measuring."""
    with STATES[state]():
        found = everything_else(tmp_path)
    assert found == of_everything_else


def test_a_real_model_under_inference_mode(tmp_path: Path) -> None:
    """Ghost gradients, and a model that was made under it."""
    results = []
    for surroundings in (nullcontext, torch.inference_mode):
        with surroundings():
            model = hooked_transformer()
            config = run_config(tmp_path, sae={"use_ghost_grads": True}, training={"device": "cpu"})
            results.append(files(saekit.train(config, model=model).folder / "sae"))
    assert results[0] == results[1]


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_source_with_and_without_a_thread(prefetch: bool, tmp_path: Path) -> None:
    """A thread has none of the caller's modes, so both ways must be without them."""
    source = {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 4, "prefetch": prefetch}
    results = []
    for surroundings in (nullcontext, STATES["autocast"], STATES["meta by default"]):
        config = some_run(tmp_path, "none", activations={"source": source})
        config["checkpoints"].pop("name")
        with surroundings():
            result = saekit.train(config, plugins=manager(), dataset=DOCUMENTS)
        results.append(files(result.folder / "sae"))
    assert results[0] == results[1] == results[2]


def torch_now() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_afterwards_all_is_as_it_was(state: str) -> None:
    with STATES[state]():
        before = torch_now()
        with ambient():
            assert torch_now() == (True, False, torch.float32, torch.device("cpu"), False)
            inside: list[Any] = []
            thread = threading.Thread(target=lambda: inside.append(torch_now()))
            thread.start()
            thread.join()
            assert inside == [(True, False, torch.float32, torch.device("cpu"), False)]
        assert torch_now() == before
        with pytest.raises(KeyError), ambient():
            raise KeyError
        assert torch_now() == before
        with pytest.raises(saekit.ConfigError):
            saekit.train({"sae": {"d_sae": -1}})
        assert torch_now() == before


def test_choices_of_speed_and_for_debugging_stay_the_callers() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autograd.set_detect_anomaly(True), ambient():
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.is_anomaly_enabled()
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_is_slowed_down_where_nothing_is_set() -> None:
    """A default device, even the one there is, is a mode that every call of torch goes through."""
    with ambient():
        assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("state", ["gradients off", "no_grad"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_step_of_an_sae_alone(state: str, kernels: str) -> None:
    """Whoever trains without :func:`saekit.train` need not know of it either."""
    config = load_config({"sae": {"name": "topk", "k": 3, "d_sae": 24}}).sae
    gradients = []
    for surroundings in (nullcontext, STATES[state]):
        torch.manual_seed(0)
        plugins = saekit.default_manager()
        options = plugins.options("sae_architectures", config)
        sae = build_module(plugins.find("sae_architectures", config), options, 8, plugins)
        sae.kernels = kernels
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in sae.parameters():
                value.normal_(generator=generator)
        with surroundings():
            x = torch.randn(40, 8, generator=generator)
            sae.training_step(x, StepInput(step=0, generator=generator, dead=torch.arange(24) < 10))
        gradients.append([value.grad for value in sae.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
