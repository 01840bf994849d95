"""``training.matmul_precision``: how steps multiply, and nobody else."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import TranscoderConfig
from support.kernels import built, seeded
from support.tiny import run_config
from torch.utils._python_dispatch import TorchDispatchMode

import saekit
import saekit.kernels.products
import saekit.precision
from saekit.config import SAEConfig
from saekit.data import computed_by
from saekit.errors import ConfigError
from saekit.kernels.products import Operands, add_product_, product
from saekit.precision import changes_products, check_precision, current_precision, in_words, products
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.trainer import SAETrainer
from saekit.values import StepInput

DOCUMENTS = [{"text": f"text number {n} of some" * 9} for n in range(30)]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where each precision is another."""
    monkeypatch.setattr(saekit.precision, "changes_products", lambda precision, device: True)


def run_of(folder: Path, backend: Any, **training: Any) -> dict[str, Any]:
    return run_config(
        folder, model={"backend": "test:fake"}, site={"hook_name": "hook_embed"}, checkpoints={"name": "run"},
        dataset={"context_size": 16}, evals={"run": [], "split": None, "held_out_every": 0}, sae={"d_sae": 32},
        activations={"source": {"name": "live", "store_batch_size_prompts": 4, "n_batches_in_buffer": 4}},
        training={"training_tokens": 512, "train_batch_size_tokens": 128, "device": "cpu"} | training,
    ) | {"plugins": isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: backend), builtins=True
    )}  # fmt: skip


class Seen(FakeBackend):
    """Keeps what the process's precision was in each forward, and which thread made it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.threads: set[str] = set()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.add(torch.get_float32_matmul_precision())
        self.threads.add(threading.current_thread().name)
        found = super().run(*args, **kwargs)
        self.seen.add(torch.get_float32_matmul_precision())
        return found


@pytest.mark.usefixtures("anything")
def test_steps_have_it_and_the_model_has_the_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    made = SAETrainer._gradients

    def gradients(self: SAETrainer, *args: Any) -> Any:
        steps.append(torch.get_float32_matmul_precision())
        time.sleep(0.05)  # in which a forward that does not wait for its turn would begin
        return made(self, *args)

    monkeypatch.setattr(SAETrainer, "_gradients", gradients)
    backend = Seen()
    run = run_of(tmp_path, backend, matmul_precision="high")
    plugins = run.pop("plugins")
    assert saekit.plan(run, plugins=plugins, dataset=DOCUMENTS).facts["SAE step"].endswith("; float32 products in TF32")
    steps.clear()
    saekit.train(run, plugins=plugins, dataset=DOCUMENTS)
    assert steps == ["high"] * 4
    assert backend.seen == {"highest"}
    assert "saekit-prefetch" in backend.threads
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ConfigError, match=r"training\.matmul_precision"):
        saekit.resume(
            tmp_path / "run", overrides=["training.matmul_precision=medium"], plugins=plugins, dataset=DOCUMENTS
        )


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"autocast": True}}, "products are in bfloat16 here (training.autocast, or sae.dtype)"),
        ({"sae": {"dtype": "bfloat16"}}, "products are in bfloat16 here (training.autocast, or sae.dtype)"),
        ({"sae": {"dtype": "float64"}}, "products are in float64 here (sae.dtype)"),
    ],
)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_where_there_are_no_products_of_float32(
    sections: dict[str, Any], reason: str, precision: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path, FakeBackend(), matmul_precision=precision)
    plugins = run.pop("plugins")
    for section, options in sections.items():
        run[section] = run[section] | options
    with pytest.raises(ConfigError) as caught:
        saekit.train(run, plugins=plugins, dataset=DOCUMENTS)
    assert f"training.matmul_precision: is '{precision}', and {reason}. Leave it out" in str(caught.value)


def test_where_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saekit.precision, "changes_products", lambda precision, device: False)
    for precision, short in (("high", "TF32"), ("medium", "bfloat16")):
        with pytest.raises(ConfigError) as caught:
            check_precision(precision, CPU, None)
        assert f"float32 products come out the same with it on this CPU, which has none in {short}" in str(caught.value)
    check_precision("highest", CPU, None)
    check_precision(None, CPU, "products are in float64 here")


def test_what_changes_is_found_by_multiplying(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(64, 64, generator=seeded()), torch.randn(64, 64, generator=seeded(1))
    exact = a @ b
    for precision in ("high", "medium"):
        with products(precision):
            differs = not torch.equal(a @ b, exact)
        assert changes_products(precision, "cpu") == differs


def test_a_setting_that_changes_products_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without one: the operands are rounded where "medium" is set."""
    made = torch.Tensor.__matmul__

    def rounded(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        medium = torch.get_float32_matmul_precision() == "medium"
        return made(self.bfloat16().float(), other.bfloat16().float()) if medium else made(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    changes_products.cache_clear()
    try:
        assert changes_products("medium", "cpu")
        assert current_precision() == "highest"
    finally:
        changes_products.cache_clear()


def test_words() -> None:
    assert in_words(None, CPU, fast=True) is None
    assert in_words("highest", GPU, fast=False) == "float32 products in full"
    assert [in_words(one, GPU, fast=True) for one in ("high", "medium")] == [
        "float32 products in TF32", "float32 products in bfloat16"
    ]  # fmt: skip
    assert in_words("medium", GPU, fast=False) == "float32 products in TF32"
    assert in_words("medium", CPU, fast=False) == "float32 products in bfloat16"


def test_afterwards_it_is_as_it_was() -> None:
    torch.set_float32_matmul_precision("medium")
    with products("high"):
        assert current_precision() == "high"
        with products(None), products("highest"):
            assert current_precision() == "highest"
        assert current_precision() == "high"
    assert current_precision() == "medium"
    with contextlib.suppress(KeyError), products("highest"):
        raise KeyError
    assert current_precision() == "medium"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one way to set it")
def test_settings_of_the_newer_kind_come_back() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # beside "highest", which torch calls a mix, and refuses to tell
        assert current_precision() == "high"
        assert computed_by("cpu")["matmul precision"] == "high"
        with products("highest"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one way to set it")
def test_what_follows_torch_s_setting_of_all_follows_it_afterwards() -> None:
    matmul, before = torch.backends.cuda.matmul, torch.backends.fp32_precision
    try:
        matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with products("highest"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_two_threads_leave_it_as_it_was() -> None:
    """The one that begins second would find what the first has set, and leave that."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    found: list[str] = []

    def first() -> None:
        with products("high"):
            first_in.set()
            second_in.wait(0.2)  # which does not come
        first_out.set()

    def second() -> None:
        first_in.wait()
        with products("medium"):
            second_in.set()
            first_out.wait()
            found.append(current_precision())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["medium"]
    assert current_precision() == "highest"


@pytest.fixture
def rounded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU, whose products in bfloat16 the kernels make."""
    monkeypatch.setattr(saekit.kernels.products, "_ROUNDED_HERE", frozenset({"cpu"}))
    torch.set_float32_matmul_precision("medium")


@pytest.mark.usefixtures("rounded_here")
def test_operands_are_rounded_and_sums_are_not() -> None:
    a, b = torch.randn(40, 300, generator=seeded()), torch.randn(300, 50, generator=seeded(1))
    expected = (a.bfloat16().double() @ b.bfloat16().double()).float()
    standing = Operands()
    for _ in range(2):
        torch.testing.assert_close(product(a, b, standing=standing), expected, rtol=1e-5, atol=1e-5)
    assert standing.rounded(b) is standing.rounded(b)
    out, total = torch.empty(40, 50), torch.ones(40, 50)
    assert product(a, b, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(add_product_(total, a, b), 1 + expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(product(a.double(), b.double()), a.double() @ b.double())


@pytest.mark.usefixtures("rounded_here")
@pytest.mark.parametrize("config", [StandardConfig(d_sae=64), TopKConfig(d_sae=64, k=4)], ids=["dense", "sparse"])
def test_a_step_is_near_that_in_full(config: SAEConfig) -> None:
    x = torch.randn(50, 32, generator=seeded(3))
    found = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        sae = built(config, d_in=32)
        sae.training_step(x, StepInput(step=0, generator=seeded()))
        found.append({name: value.grad for name, value in sae.named_parameters()})
    for name in ("W_enc", "W_dec") if isinstance(config, StandardConfig) else ("b_enc",):
        exact, rounded = found[0][name], found[1][name]
        off = float((exact - rounded).norm() / exact.norm())
        assert 1e-5 < off < 0.1, f"{name}: {off}"


@pytest.mark.usefixtures("rounded_here")
@pytest.mark.parametrize(
    ("config", "others"),
    [
        (GatedConfig(d_sae=64), 0),
        (JumpReLUConfig(d_sae=64, pre_act_loss_coefficient=0.1), 0),
        (TranscoderConfig(d_sae=64, skip_connection=True), 2),  # the skip connection's own, which is plain torch's
    ],
    ids=["gated", "jumprelu", "transcoder"],
)  # fmt: skip
@pytest.mark.parametrize("at_hand", [True, False])
def test_steps_multiply_by_these_products_alone(
    config: Any, others: int, at_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is multiplied elsewhere would be TF32 on CUDA."""
    for module in ("gated", "jumprelu"):
        found = importlib.import_module(f"saekit_plugins.architectures.{module}.module")
        if hasattr(found, "at_hand"):
            monkeypatch.setattr(found, "at_hand", lambda device: at_hand)
    sae = built(config, d_in=32)
    given = StepInput(
        step=9, generator=seeded(), dead=torch.arange(64) % 5 == 0, target=torch.randn(50, 32, generator=seeded(4))
    )
    with Products() as seen:
        sae.training_step(torch.randn(50, 32, generator=seeded(3)), given)
    assert len(seen.raw) == others


class Products(TorchDispatchMode):
    """Keeps the matrix products of numbers that are not rounded to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            for matrix in [each for each in args if isinstance(each, torch.Tensor)][-2:]:
                if not torch.equal(matrix, matrix.bfloat16().to(matrix.dtype)):
                    self.raw.append(str(func))
        return func(*args, **(kwargs or {}))
