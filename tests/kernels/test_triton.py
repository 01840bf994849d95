"""Steps and products in Triton are those of plain torch, interpreted on a CPU (``make test-triton``) or on a GPU."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import adam, built, seeded

import saekit
import saekit.devices
from saekit.config import SAEConfig
from saekit.kernels import SparseFeatures
from saekit.values import StepInput

triton = pytest.importorskip("triton", reason="Triton is not installed (make test-triton)")
from saekit_plugins.kernels.triton import kernels, products  # noqa: E402
from saekit_plugins.kernels.triton.products import INTERPRETED, TritonFeatures  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="there is no GPU, and Triton is not interpreted (make test-triton)",
)
CONFIGS = [
    TopKConfig(d_sae=96, k=4),
    TopKConfig(d_sae=96, k=4, rescale_acts_by_decoder_norm=False),
    BatchTopKConfig(d_sae=96, k=2.5),
]


def sparse(seed: int, n: int, d_sae: int, per_row: int, dtype: torch.dtype = torch.float64) -> SparseFeatures:
    """Features of which some rows, and some features, have no entry."""
    mask = torch.rand(n, d_sae, generator=seeded(seed)) < per_row / d_sae
    mask[n // 2] = False
    mask[:, d_sae // 2] = False
    rows, features = mask.nonzero(as_tuple=True)
    values = torch.randn(len(rows), generator=seeded(seed + 1), dtype=dtype)
    return SparseFeatures(*(one.to(DEVICE) for one in (rows, features, values)), n, d_sae)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**20), n=st.integers(1, 7), d_sae=st.integers(1, 12), width=st.sampled_from([1, 3, 8, 513]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_products_are_those_of_torch(seed: int, n: int, d_sae: int, width: int, dtype: torch.dtype) -> None:
    plain = sparse(seed, n, d_sae, 3, dtype)
    fast = TritonFeatures.of(plain)
    weights = torch.randn(d_sae, width, generator=seeded(seed + 2), dtype=dtype).to(DEVICE)
    vectors = torch.randn(n, width, generator=seeded(seed + 3), dtype=dtype).to(DEVICE)
    dense = plain.dense()
    torch.testing.assert_close(fast.decoded(weights), dense @ weights)
    torch.testing.assert_close(fast.inner_products(vectors, weights), (vectors @ weights.T)[plain.rows, plain.features])
    out = torch.randn(d_sae, width, generator=seeded(seed + 4), dtype=dtype).to(DEVICE)
    added, replaced = out.clone(), out.clone()
    fast.add_outer_products(plain.values, vectors, added)
    fast.add_outer_products(plain.values, vectors, replaced, replace=True)
    torch.testing.assert_close(added, out + dense.T @ vectors)
    torch.testing.assert_close(replaced, dense.T @ vectors)
    assert isinstance(fast.scaled(torch.ones(d_sae, device=DEVICE, dtype=dtype)), TritonFeatures)


def trained(config: SAEConfig, *, served: bool) -> tuple[Any, list[float]]:
    sae: Any = built(config, d_in=24).double().to(DEVICE)
    sae.kernels = "fast"
    if not served:
        sae.served_by = saekit.kernels.kernel.Served()
    optimizer, losses = adam(sae), []
    x = torch.randn(40, 24, generator=seeded(1), dtype=torch.float64).to(DEVICE)
    for step in range(4):
        dead = torch.zeros(sae.d_sae, dtype=torch.bool, device=DEVICE)
        found = sae.training_step(x, StepInput(step=step, generator=seeded(), dead=dead))
        losses.append(float(found.loss))
        sae.before_update()
        optimizer.step(step)
        sae.after_update()
    return sae, losses


@pytest.mark.parametrize("config", CONFIGS, ids=["topk", "topk plain", "batchtopk"])
def test_steps_are_those_of_torch(config: SAEConfig) -> None:
    served, losses = trained(config, served=True)
    plain, expected = trained(config, served=False)
    assert served.step_path().startswith("Triton kernels")
    assert plain.step_path().startswith("fast kernels")
    assert losses == pytest.approx(expected, rel=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(served.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    x = torch.randn(9, 24, generator=seeded(2), dtype=torch.float64).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(served(x), plain(x))
        torch.testing.assert_close(served.encode(x), plain.encode(x))


def test_copies_and_pickles_keep_the_kernels() -> None:
    sae = built(TopKConfig(d_sae=96, k=4), d_in=24).to(DEVICE)
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert other.step_path() == sae.step_path()
        assert other.step_path().startswith("Triton kernels")


@pytest.mark.skipif(not INTERPRETED, reason="the CPU takes itself for a device, which a GPU need not")
def test_dead_features_learn_by_the_same_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(self: SparseFeatures, *args: object, **more: object) -> None:
        raise AssertionError("a product without Triton")

    monkeypatch.setattr(saekit.devices, "AT_HAND", frozenset())
    sae: Any = built(attrs.evolve(CONFIGS[0], k_aux=6), d_in=24)
    for name in ("decoded", "inner_products", "add_outer_products"):
        monkeypatch.setattr(SparseFeatures, name, plain)
    dead = torch.arange(96) < 90
    found = sae.training_step(
        torch.randn(40, 24, generator=seeded(1)), StepInput(step=0, generator=seeded(), dead=dead)
    )
    assert found.losses["auxiliary_reconstruction_loss"] > 0


class Launches:
    """In the place of a program: which GPU was current when it was launched."""

    def __init__(self) -> None:
        self.now: list[torch.device] = []
        self.found: list[list[torch.device]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **more: self.found.append([*self.now])

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.now.append(device)
        yield
        self.now.pop()


def test_programs_are_launched_where_the_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself takes the current GPU, and writes to memory of another one, or fails."""
    launches = Launches()
    monkeypatch.setattr(products, "_launched_on", launches.on)
    for name in ("_decode", "_multiply", "_add_outer"):
        monkeypatch.setattr(products, name, launches)
    features, weights = TritonFeatures.of(sparse(0, 4, 8, 3)), torch.ones(8, 2, device=DEVICE, dtype=torch.float64)
    features.decoded(weights)
    features.inner_products(weights[:4], weights)
    features.add_outer_products(features.values, weights[:4], weights)
    assert launches.found == [[weights.device]] * 3


def test_the_current_gpu_is_that_of_the_numbers_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(chosen.append(device)))
    with products._launched_on(torch.device("cuda:1")), products._launched_on(torch.device("cpu")):
        assert chosen == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_products_on_the_second_gpu() -> None:
    plain = sparse(0, 5, 12, 3)
    fast = TritonFeatures(*(one.to("cuda:1") for one in (plain.rows, plain.features, plain.values)), 5, 12)
    weights = torch.randn(12, 8, generator=seeded(2), dtype=torch.float64)
    assert torch.cuda.current_device() == 0
    found = fast.decoded(weights.to("cuda:1"))
    torch.cuda.synchronize(1)
    torch.testing.assert_close(found.cpu(), plain.dense().cpu() @ weights)


def test_an_older_triton_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torch 2.6 and 2.7 has no ``triton.knobs``."""
    monkeypatch.delattr(triton, "knobs", raising=False)
    assert kernels.TritonTopKKernel().devices == ({"cuda", "cpu"} if INTERPRETED else {"cuda"})


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from saekit_plugins.kernels.triton import products

types = dict.fromkeys(("features", "starts", "order", "rows"), "*i64")
types |= dict.fromkeys(("values", "weights", "vectors", "out"), "*fp32")
types |= dict.fromkeys(("entries", "n", "d_sae", "width"), "i32")
for program in (products._decode, products._multiply, products._add_outer):
    fixed = {"block": 512, "wide": tl.float32, "replace": True}
    fixed = {name: value for name, value in fixed.items() if name in program.arg_names}
    signature = {name: types.get(name, "constexpr") for name in program.arg_names}
    source = ASTSource(program, signature, {(program.arg_names.index(name),): value for name, value in fixed.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.skipif(not INTERPRETED, reason="they are compiled where they run")
def test_programs_compile_without_a_gpu(tmp_path: Path) -> None:
    """What the interpreter takes, the compiler may refuse."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
