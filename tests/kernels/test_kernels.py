"""The fast kernels beside dense products and autograd: sparse products, screens, largest entries, inference, memory."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from conftest import BOTH_WAYS
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_plugins.activations.relu import Relu
from saekit_plugins.activations.tanh_relu import TanhRelu
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from torch import Tensor

import saekit
import saekit.kernels.encoder
import saekit.kernels.screen
from saekit.config import OptimizerConfig, SAEConfig
from saekit.kernels import Encoder, SparseFeatures, active_groups, batch_top, top_groups
from saekit.kernels.groups import top_entries
from saekit.kernels.screen import Screen, native_bfloat16
from saekit.kernels.workspace import gradient_for, recycle, scratch
from saekit.pretrained.load import build_module
from saekit.sae import SAE, StepInput
from saekit.testing import check_sparse_activation
from saekit.training.optimizer import Optimizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_features(n: int, d_sae: int, density: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.rand(n, d_sae, generator=seeded(seed), dtype=dtype) + 0.1
    return values * (torch.rand(n, d_sae, generator=seeded(seed + 1)) < density)


def sparse(dense: Tensor) -> SparseFeatures:
    rows, features = dense.nonzero(as_tuple=True)
    return SparseFeatures(rows, features, dense[rows, features], *dense.shape)


def built(config: SAEConfig, d_in: int = 12, seed: int = 0, bias: float = 0.0) -> SAE:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) / 2)
        sae.b_enc += bias
    return sae


# ---- sparse products


@given(
    n=st.integers(1, 9), d_sae=st.integers(1, 5000), d=st.integers(1, 5), density=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_sparse_products_are_the_dense_ones(n: int, d_sae: int, d: int, density: float, seed: int) -> None:
    dense = random_features(n, d_sae, density if d_sae < 100 else density / 50, seed)
    features = sparse(dense)
    decoder = torch.randn(d_sae, d, generator=seeded(seed), dtype=torch.float64)
    vectors = torch.randn(n, d, generator=seeded(seed + 5), dtype=torch.float64)
    assert torch.equal(features.dense(), dense)
    assert torch.allclose(features.decoded(decoder), dense @ decoder)
    products = features.inner_products(vectors, decoder)
    assert torch.allclose(products, (vectors @ decoder.T)[features.rows, features.features])
    out = torch.full((d_sae, d), torch.nan, dtype=torch.float64)
    features.add_outer_products(features.values, vectors, out, replace=True)
    features.add_outer_products(2 * features.values, vectors, out)
    assert torch.allclose(out, 3 * dense.T @ vectors)
    assert torch.allclose(features.sums(features.values), dense.sum(0))
    assert torch.allclose(features.row_sums(features.values), dense.sum(1))
    assert torch.equal(features.counts(), (dense > 0).sum(0))
    k = min(3, d_sae)
    values, numbers = features.top(k)
    expected = dense.topk(k, dim=1).values
    assert torch.equal(values, expected)
    assert torch.equal(numbers >= 0, expected > 0)
    assert torch.equal(dense.gather(1, numbers.clamp_min(0))[numbers >= 0], values[numbers >= 0])


def test_more_features_than_sixteen_bits_count() -> None:
    dense = random_features(3, (1 << 16) + 70, 0.001)
    vectors = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    out = torch.zeros(dense.shape[1], 4, dtype=torch.float64)
    sparse(dense).add_outer_products(sparse(dense).values, vectors, out)
    assert torch.allclose(out, dense.T @ vectors)
    assert out[1 << 16 :].any(), "features beyond"


def test_groups_are_joined_in_order() -> None:
    parts = [random_features(n, 30, 0.2, seed=n) for n in (4, 1, 7)]
    joined = SparseFeatures.joined([sparse(part) for part in parts])
    assert torch.equal(joined.dense(), torch.cat(parts))
    assert joined.shape == (12, 30)


# ---- the active features


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small batch has many chunks, and groups come in between."""
    for module in ("kernels", "largest", "gradients", "auxk", "penalty", "inference"):
        monkeypatch.setattr(f"saekit.sae.{module}.CHUNK", 16)
    monkeypatch.setattr("saekit.kernels.encoder._ENTRIES", 50)
    monkeypatch.setattr("saekit.kernels.encoder.PROBE", 8)
    monkeypatch.setattr("saekit.kernels.groups.PROBE", 8)


KINDS = [
    StandardConfig(d_sae=40, dtype="float64", l1_coefficient=0.3, normalize_sae_decoder=False),
    StandardConfig(d_sae=40, dtype="float64", l1_coefficient=0.3, lp_norm=2.0, activation="tanh-relu",
                   scale_sparsity_penalty_by_decoder_norm=True, normalize_sae_decoder=False),
    TopKConfig(d_sae=40, dtype="float64", k=5, k_aux=3),
    TopKConfig(d_sae=200, dtype="float64", k=5, k_aux=4, rescale_acts_by_decoder_norm=False),
    BatchTopKConfig(d_sae=40, dtype="float64", k=4.3, k_aux=90),
]  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [2.0, 0.0, -1.0, -3.0, "mixed"])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{type(config).__name__}{config.d_sae}")
def test_a_fast_step_of_many_chunks_is_the_step_of_autograd(config: SAEConfig, bias: float | str) -> None:
    """Dense chunks, sparse ones, and both in one batch."""
    x = torch.randn(101, 12, generator=seeded(3), dtype=torch.float64)
    if bias == "mixed":
        x[20:60] *= 0.01
    dead = torch.zeros(config.features(12), dtype=torch.bool)
    dead[:: 3 if config.d_sae == 40 else 2] = True
    found = {}
    for kernels in ("reference", "fast"):
        sae = built(config, bias=-1.5 if bias == "mixed" else float(bias))
        sae.kernels = kernels
        assert (sae.why_reference() is None) == (kernels == "fast")
        result = sae.training_step(x, StepInput(step=1, generator=seeded(), dead=dead))
        found[kernels] = (
            result,
            {name: value.grad for name, value in sae.named_parameters()},
            dict(sae.named_buffers()),
        )
    (expected, gradients, buffers), (result, fast, fast_buffers) = found["reference"], found["fast"]
    assert torch.equal(result.fired, expected.fired)
    assert torch.allclose(result.output, expected.output)
    assert result.losses.keys() == expected.losses.keys()
    for name, value in expected.losses.items():
        assert result.losses[name].item() == pytest.approx(value.item(), rel=1e-12), name
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for name, gradient in gradients.items():
        assert torch.allclose(fast[name], gradient, rtol=1e-10, atol=1e-12), name
    for name, buffer in buffers.items():
        assert torch.allclose(fast_buffers[name], buffer), name


def test_both_dense_and_sparse_groups_occur() -> None:
    """What the test above relies on."""
    rows = torch.randn(3000, 12, generator=seeded(3), dtype=torch.float64)
    rows[1024:2048] *= 0.01
    sae = built(StandardConfig(d_sae=400, dtype="float64"), bias=-1.5)
    encoder = Encoder(sae.W_enc.detach(), sae.b_enc.detach())
    kinds = [(start, type(group)) for start, group in active_groups(encoder, rows, Relu())]
    assert kinds == [(0, Tensor), (1024, SparseFeatures), (2048, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d_sae", "k"), [(40, 1), (40, 40), (64, 32), (300, 3), (4096, 32), (2049, 17)])
def test_the_largest_of_each_row(d_sae: int, k: int, dtype: torch.dtype) -> None:
    pre = torch.randn(50, d_sae, generator=seeded(), dtype=dtype) - 1
    pre[3] = -1
    pre[4] = 0
    found = top_entries(pre.clone(), k)
    values, features = pre.topk(k, dim=1)
    expected = torch.zeros_like(pre).scatter(1, features, values.relu())
    assert torch.equal(found.dense(), expected)
    assert bool((found.values > 0).all())


def test_ties_do_not_make_more_than_k() -> None:
    pre = torch.ones(20, 4096)
    pre[:, ::2] = 2.0
    found = top_entries(pre, 32)
    assert torch.equal(found.dense().count_nonzero(1), torch.full((20,), 32))
    assert bool((found.values == 2).all())


@pytest.mark.parametrize("wanted", [1, 700, 5001, 10**6])
@pytest.mark.parametrize("first_rows", [1.0, 0.01, 30.0], ids=["alike", "quiet first", "loud first"])
def test_the_largest_of_a_batch(wanted: int, first_rows: float) -> None:
    """Whatever the first rows say of the others."""
    sae = built(StandardConfig(d_sae=64, dtype="float64"))
    rows = torch.randn(1200, 12, generator=seeded(1), dtype=torch.float64)
    rows[:256] *= first_rows
    scale = torch.rand(64, generator=seeded(2), dtype=torch.float64) + 0.5
    encoder = Encoder(sae.W_enc.detach(), sae.b_enc.detach())
    pre = rows @ encoder.W_enc + encoder.b_enc
    compared = (pre * scale).relu().flatten()
    values, places = compared.topk(min(wanted, compared.numel()))
    expected = (torch.zeros_like(compared).scatter(0, places, values).reshape(pre.shape) > 0) * pre
    found = batch_top(encoder, rows, wanted, scale=scale)
    assert torch.allclose(found.dense(), expected)
    assert len(found) == min(wanted, int((compared > 0).sum()))


def test_ties_at_the_threshold_of_a_batch_do_not_make_more_than_wanted() -> None:
    encoder = Encoder(torch.zeros(3, 50), torch.ones(50))
    found = batch_top(encoder, torch.zeros(40, 3), 77)
    assert len(found) == 77
    assert found.rows[-1] == 1, "the first ones"


# ---- the screen


def screened(d_in: int, d_sae: int, kind: str, seed: int = 0) -> tuple[Encoder, Tensor]:
    """Encoders and rows that are hard on a screen: large and small norms, large coordinates and biases."""
    weights = torch.randn(d_sae, d_in, generator=seeded(seed)) / d_in**0.5
    rows = torch.randn(512, d_in, generator=seeded(seed + 1))
    bias = torch.full((d_sae,), -2.0) + 0.1 * torch.randn(d_sae, generator=seeded(seed + 2))
    if kind == "norms":
        weights *= torch.logspace(-2, 1, d_sae)[:, None]
        rows *= torch.logspace(-3, 3, 512)[:, None]
    elif kind == "outliers":
        rows[:, 0] += 300
        weights[:, 0] *= 0.01
        bias -= 3
    elif kind == "bias":
        bias = -1000 - 2 * torch.rand(d_sae, generator=seeded(seed))
        rows[:, 1] = 1000
        weights[:, 1] = 1
    elif kind == "exact":  # nothing is lost, and the bound is what summing costs
        weights, rows = weights.bfloat16().float(), rows.bfloat16().float()
    return Encoder(weights.T, bias), rows


HARD = ["plain", "norms", "outliers", "bias", "exact"]


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("d_in", "d_sae"), [(64, 1024), (512, 2048), (100, 3001)])
def test_the_bound_holds(kind: str, d_in: int, d_sae: int) -> None:
    encoder, rows = screened(d_in, d_sae, kind)
    for scale, above in itertools.product((None, torch.rand(d_sae, generator=seeded(3)) + 0.1), (0.0, 0.7)):
        bounds, _ = Screen(encoder, scale)._bounds(rows, above)
        exact = rows.double() @ encoder.W_enc.double() + encoder.b_enc.double() - above
        exact = exact if scale is None else exact * scale
        below = exact - bounds.double() - 2.0**-8 * exact.abs()  # what is left is the rounding of the bound itself
        assert below.max() <= 0


@pytest.mark.parametrize("kind", HARD)
def test_a_screen_finds_every_active_feature(kind: str) -> None:
    encoder, rows = screened(256, 2048, kind)
    product = rows @ encoder.W_enc + encoder.b_enc
    exact = rows.double() @ encoder.W_enc.double() + encoder.b_enc.double()
    sure = exact > 1e-5 * product.abs().max()  # nearer to zero, two orders of summing differ
    found = Screen(encoder).active(rows, 0.0)
    if kind in ("norms", "bias"):  # most features are active, or may be, and it says so
        assert found is None
        return
    assert found is not None
    dense = found.dense()
    assert bool((dense[sure] > 0).all())
    assert not bool(((dense > 0) & (exact < -1e-5 * product.abs().max())).any())
    assert torch.allclose(dense[sure], product[sure], rtol=1e-3, atol=1e-5 * float(product.abs().max()))


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("k", [1, 16, 32])
def test_a_screen_finds_the_largest(kind: str, k: int) -> None:
    encoder, rows = screened(256, 2048, kind)
    scale = torch.rand(2048, generator=seeded(9)) + 0.5
    found = Screen(encoder, scale).top(rows, k)
    if found is None:
        assert kind in ("norms", "bias"), "too many come into question"
        return
    exact = (rows.double() @ encoder.W_enc.double() + encoder.b_enc.double()) * scale
    least = exact.topk(k, dim=1).values[:, -1:].clamp_min(0)
    dense, error = found.dense(), 1e-5 * exact.abs().max()
    assert bool((dense[exact > least + error] > 0).all()), "the k largest are there"
    assert not bool(((dense > 0) & (exact < least - error)).any()), "and no others"
    assert int((dense > 0).sum(1).max()) <= k


needs_bfloat16 = pytest.mark.skipif(not native_bfloat16(), reason="this CPU has no bfloat16 products")


@needs_bfloat16
@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk"])
def test_screened_steps_are_the_unscreened_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2048 rows they select the same features, and gradients agree to float32's last digits."""
    config = {
        "standard": StandardConfig(d_sae=2048, l1_coefficient=0.1),
        "topk": TopKConfig(d_sae=2048, k=16),
        "batchtopk": BatchTopKConfig(d_sae=2048, k=16),
    }[name]
    x = torch.randn(2048, 256, generator=seeded(1))
    found = []
    for why in (None, "as the test wants"):
        monkeypatch.setattr(saekit.kernels.screen, "why_no_screen", lambda *args, why=why: why)
        calls = count_screens(monkeypatch)
        sae = built(config, d_in=256, bias=-20.0 if name == "standard" else 0.0)
        result = sae.training_step(x, StepInput(step=0, generator=seeded()))
        assert bool(calls) == (why is None)
        found.append((result, {name: value.grad for name, value in sae.named_parameters()}))
    (screened, gradients), (plain, expected) = found
    # Between a number just above zero and one just below, the order of summing decides.
    assert (screened.fired - plain.fired).abs().sum() <= 3
    assert 5 < plain.fired.sum() / 2048 < 40
    assert torch.allclose(screened.output, plain.output, rtol=1e-4, atol=1e-4)
    for key, gradient in expected.items():
        assert torch.allclose(gradients[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), key


def count_screens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = Screen._exact

    def counted(self: Screen, rows: Tensor, *args: Any) -> Any:
        calls.append(len(rows))
        return original(self, rows, *args)

    monkeypatch.setattr(Screen, "_exact", counted)
    return calls


@needs_bfloat16
def test_where_many_are_active_nothing_is_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_screens(monkeypatch)
    sae = built(StandardConfig(d_sae=2048), d_in=64)
    sae.training_step(torch.randn(600, 64, generator=seeded()), StepInput(step=0, generator=seeded()))
    assert not calls


def test_every_file_that_trains_both_ways_is_there() -> None:
    assert set(BOTH_WAYS) <= {path.stem for path in Path(__file__).parents[1].glob("*/test_*.py")}


def test_why_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    why = saekit.kernels.why_no_screen
    cpu = torch.device("cpu")
    assert why(cpu, torch.float64, 4096) == "not for float64"
    assert why(torch.device("cuda"), torch.float32, 4096) == "not on cuda"
    assert why(cpu, torch.float32, 100) == "not for fewer than 1024 features"
    monkeypatch.setattr(saekit.kernels.screen, "native_bfloat16", lambda: False)
    assert why(cpu, torch.float32, 4096) == "this CPU has no bfloat16 products"
    assert built(StandardConfig(d_sae=2048)).step_path() == (
        "fast kernels, not screened: this CPU has no bfloat16 products"
    )
    monkeypatch.setattr(saekit.kernels.screen, "native_bfloat16", lambda: True)
    assert why(cpu, torch.float32, 4096) is None
    assert built(StandardConfig(d_sae=2048)).step_path() == "fast kernels, screened in bfloat16"


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (StandardConfig(), {"kernels": "reference"}, 'plain torch: kernels is "reference"'),
        (StandardConfig(dtype="float64"), {}, "plain torch: the weights are float64"),
        (StandardConfig(dtype="float64"), {"kernels": "fast"}, "fast kernels, not screened: not for float64"),
        (StandardConfig(dtype="bfloat16"), {"kernels": "fast"}, "plain torch: the weights are bfloat16"),
        (StandardConfig(use_ghost_grads=True), {}, "plain torch: use_ghost_grads has no fast path"),
        (StandardConfig(noise_scale=0.1), {}, "fast kernels, not screened: there is noise"),
        (StandardConfig(), {"activation": torch.nn.functional.softplus},
         "plain torch: the activation function declares no sparse support"),
    ],
)  # fmt: skip
def test_the_way_of_a_step_in_words(config: SAEConfig, change: dict[str, Any], expected: str) -> None:
    sae = built(attrs.evolve(config, d_sae=32))
    for name, value in change.items():
        setattr(sae, name, value)
    assert sae.step_path() == expected


# ---- inference


@pytest.fixture(params=["standard", "tanh", "topk", "batchtopk", "batchtopk without norms"])
def some_sae(request: pytest.FixtureRequest) -> SAE:
    config: SAEConfig = {
        "standard": StandardConfig(d_sae=600, normalize_sae_decoder=False),
        "tanh": StandardConfig(d_sae=600, activation="tanh-relu"),
        "topk": TopKConfig(d_sae=600, k=7),
        "batchtopk": BatchTopKConfig(d_sae=600, k=7),
        "batchtopk without norms": BatchTopKConfig(d_sae=600, k=7, rescale_acts_by_decoder_norm=False),
    }[request.param]
    sae = built(config, bias=-4.0)
    if hasattr(sae, "threshold_average"):
        sae.threshold_average.fill_(0.8)
        sae.threshold_updates.fill_(torch.inf)
    return sae


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (1500, 12), (3, 2, 6), (0, 12)], ids=str)
@pytest.mark.parametrize("factor", [False, True])
def test_inference_is_that_of_plain_torch(some_sae: SAE, shape: tuple[int, ...], factor: bool) -> None:
    sae = some_sae
    x = torch.randn(*shape, generator=seeded(4)) * 3
    if factor:
        sae.add_scaling_factor()
        sae.scaling_factor.data.copy_(torch.rand(600, generator=seeded(8)) + 0.5)
    sae.kernels = "reference"
    expected = (sae.encode(x), sae(x))
    sae.kernels = "auto"
    with torch.no_grad():
        features, output = sae.encode(x), sae(x)
        decoded = sae.decode(features, like=x)
        entries = sae.encode_sparse(x)
    assert features.shape == expected[0].shape
    assert torch.allclose(features, expected[0], atol=1e-5)
    assert torch.equal(entries.dense().reshape(features.shape), features)
    for found in (output, decoded):
        assert found.shape == x.shape
        assert torch.allclose(found, expected[1], atol=1e-4)
    if len(x):
        values, numbers = sae.encode_topk(x, 4)
        top = expected[0].topk(4, dim=-1).values
        assert values.shape == numbers.shape == (*expected[0].shape[:-1], 4)
        assert torch.allclose(values, top, atol=1e-5)
        assert torch.equal(numbers == -1, values == 0)
        assert torch.allclose(features.gather(-1, numbers.clamp_min(0))[numbers >= 0], values[numbers >= 0])


def test_gradients_go_where_they_are_asked_for(some_sae: SAE) -> None:
    x = torch.randn(9, 12, generator=seeded(4)).requires_grad_()
    some_sae(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert some_sae.W_dec.grad is not None
    assert some_sae.encode_sparse(x).values.grad_fn is None


@pytest.mark.parametrize("point", ["input", "acts_pre", "acts_post", "recons", "error", "output"])
def test_hooks_see_dense_tensors_and_change_what_follows(some_sae: SAE, point: str) -> None:
    sae, x = some_sae, torch.randn(6, 12, generator=seeded(4)) * 3
    seen: list[Tensor] = []

    def halve(tensor: Tensor, hook: Any) -> Tensor:
        assert type(tensor) is Tensor
        seen.append(tensor.clone())
        return tensor / 2

    results = {}
    for kernels in ("reference", "auto"):
        seen.clear()
        sae.kernels, sae.use_error_term = kernels, point == "error"
        handle = sae._modules[f"hook_sae_{point}"].add_hook(halve)
        with torch.no_grad():
            results[kernels] = (sae(x), sae.encode_sparse(x).dense(), [tensor.clone() for tensor in seen])
        handle.remove()
    (output, features, looked), (expected, plain, expected_looks) = results["auto"], results["reference"]
    assert torch.allclose(output, expected, atol=1e-4)
    assert torch.allclose(features, plain, atol=1e-5)
    assert len(looked) == len(expected_looks) >= 1
    for one, other in zip(looked, expected_looks, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_k_out_of_range() -> None:
    sae = built(StandardConfig(d_sae=20))
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k must be 1 to 20, the number of features; found {k}"):
            sae.encode_topk(torch.zeros(2, 12), k)


def test_no_gradient_no_autocast_no_other_type(some_sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for bfloat16 gets it: those products are not the kernels' business."""
    monkeypatch.setattr(type(some_sae), "feature_groups", None)
    x = torch.randn(6, 12, generator=seeded())
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            some_sae(x)
        with pytest.raises(TypeError):
            some_sae(x)
        some_sae.bfloat16()
        assert some_sae(x).dtype == torch.float32, "that of the input"


# ---- what activations declare


class Wrong(Relu):
    """Relu, but for what a case changes."""


def changed(**methods: Any) -> Wrong:
    return type("Changed", (Wrong,), methods)()


@pytest.mark.parametrize("activation", [Relu(), TanhRelu()], ids=lambda activation: type(activation).__name__)
def test_the_built_in_activations_are_what_they_declare(activation: Any) -> None:
    check_sparse_activation(activation)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (torch.relu, "declares no sparse support"),
        (changed(__call__=lambda self, pre: torch.nn.functional.gelu(pre)), "negative somewhere"),
        (changed(__call__=lambda self, pre: torch.nn.functional.softplus(pre)), "not zero wherever pre <= 0"),
        (changed(__call__=lambda self, pre: pre.relu() / (1 + pre.relu().sum())), "every number by itself"),
        (changed(__call__=lambda self, pre: pre.relu().square()), "pre_gradient is not what autograd finds"),
        (changed(__call__=lambda self, pre: pre.data.relu_() + pre * 0), "changes its argument"),
        (changed(__call__=lambda self, pre: pre.relu()[:1]), "turns the shape"),
        (changed(pre_gradient=lambda self, gradient, features: gradient), "pre_gradient is not what autograd finds"),
        (changed(in_place=lambda self, pre: pre.relu()), "does not write over its argument"),
        (changed(in_place=lambda self, pre: pre.clamp_(0, 1)), "not what calling it returns"),
    ],
)
def test_a_false_declaration_is_found(activation: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sparse_activation(activation)


def test_an_activation_without_a_declaration_trains_by_autograd() -> None:
    sae = built(StandardConfig(d_sae=30))
    sae.activation = torch.nn.functional.softplus
    x = torch.randn(10, 12, generator=seeded())
    assert sae.why_reference() == "the activation function declares no sparse support"
    result = sae.training_step(x, StepInput(step=0, generator=seeded()))
    assert result.fired.tolist() == [10] * 30
    assert sae.W_enc.grad is not None
    with torch.no_grad():
        assert torch.allclose(sae.encode(x), torch.nn.functional.softplus(sae.pre_activations(x)))


# ---- memory


def test_memory_is_used_again_and_threads_have_their_own() -> None:
    cpu = torch.device("cpu")
    first = scratch("test", (10, 10), torch.float32, cpu)
    assert scratch("test", (5, 7), torch.float64, cpu).data_ptr() == first.data_ptr()
    assert scratch("other", (5, 7), torch.float64, cpu).data_ptr() != first.data_ptr()
    there: list[int] = []
    thread = threading.Thread(target=lambda: there.append(scratch("test", (10, 10), torch.float32, cpu).data_ptr()))
    thread.start()
    thread.join()
    assert there != [first.data_ptr()]


def test_gradients_are_used_again_and_never_twice_at_once() -> None:
    like = torch.empty(1 << 11, 1 << 10)
    one, two = gradient_for(like), gradient_for(like)
    assert one.data_ptr() != two.data_ptr()
    recycle([one, two.T, None, torch.empty(3)])
    again, more, third = gradient_for(like), gradient_for(like), gradient_for(like)
    assert {again.data_ptr(), more.data_ptr()} == {one.data_ptr(), two.data_ptr()}
    assert third.data_ptr() not in (one.data_ptr(), two.data_ptr())
    assert again.shape == like.shape
    assert again.is_contiguous()


def test_two_saes_do_not_share_a_gradient() -> None:
    x = torch.randn(300, 1100, generator=seeded())
    one, two = (built(StandardConfig(d_sae=1024), d_in=1100, seed=seed, bias=-20.0) for seed in (0, 1))
    one.training_step(x, StepInput(step=0, generator=seeded()))
    kept = one.W_enc.grad.clone()
    two.training_step(x, StepInput(step=0, generator=seeded()))
    assert torch.equal(one.W_enc.grad, kept)


def test_groups_of_largest_and_active_cover_every_row() -> None:
    sae = built(StandardConfig(d_sae=64))
    encoder, rows = Encoder(sae.W_enc.detach(), sae.b_enc.detach()), torch.randn(2500, 12, generator=seeded())
    for groups in (top_groups(encoder, rows, 3), active_groups(encoder, rows, Relu())):
        end = 0
        for start, group in groups:
            assert start == end
            end += group.shape[0]
        assert end == 2500


# ---- numbers that are none


@pytest.mark.parametrize("where", ["a row", "a weight", "a bias"])
@pytest.mark.parametrize("screen", [True, False])
def test_what_is_no_number_stays_so(some_sae: SAE, where: str, screen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not pass for a feature that is not active: a broken model would look well, and training go on."""
    monkeypatch.setattr(saekit.kernels.screen, "why_no_screen", lambda *args: None if screen else "as the test wants")
    x = torch.randn(700, 12, generator=seeded(4))
    with torch.no_grad():
        if where == "a row":
            x[300] = torch.nan
        elif where == "a weight":
            some_sae.W_enc[3, 5] = torch.nan
        else:
            some_sae.b_enc[5] = torch.nan
        features, output = some_sae.encode(x), some_sae(x)
    some_sae.kernels = "reference"
    with torch.no_grad():
        assert torch.equal(features.isnan().any(1), some_sae.encode(x).isnan().any(1))
        assert torch.equal(output.isnan(), some_sae(x).isnan())
    some_sae.kernels = "auto"
    result = some_sae.training_step(x, StepInput(step=0, generator=seeded()))
    assert result.loss.isnan()


# ---- memory of parameters that is not as the SAE made it


def adam(sae: SAE) -> Optimizer:
    return Optimizer(sae.named_parameters(), OptimizerConfig(beta1=0.9), lambda step: 1e-3)


def contiguous(sae: SAE) -> None:
    sae.load_state_dict({name: value.contiguous() for name, value in sae.state_dict().items()}, assign=True)


def moved(sae: SAE) -> None:
    sae.double().float()


def new_memory(sae: SAE) -> None:
    sae.W_enc.data = sae.W_enc.data.contiguous()


@pytest.mark.parametrize("change", [contiguous, moved, new_memory, lambda sae: None], ids=lambda f: f.__name__)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_order_of_memory_does_not_change_what_is_learnt(change: Any, late: bool, kernels: Any) -> None:
    if late and change is contiguous:
        pytest.skip("that makes other parameters, which no optimizer knows")
    x = torch.randn(200, 12, generator=seeded(1))
    weights = []
    for made in (lambda sae: None, change):
        sae = built(StandardConfig(d_sae=30, l1_coefficient=0.1), bias=-1.0)
        sae.kernels = kernels
        if not late:
            made(sae)
        optimizer = adam(sae)
        for step in range(6):
            if late and step == 3:
                made(sae)
            sae.training_step(x, StepInput(step=step, generator=seeded()))
            optimizer.step(step)
        weights.append({name: value.detach().clone() for name, value in sae.named_parameters()})
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-5), name


def test_a_gradient_in_another_order_of_memory() -> None:
    weights = []
    for turn in (False, True):
        sae = built(StandardConfig(d_sae=30), bias=-1.0)
        optimizer = adam(sae)
        sae.training_step(torch.randn(200, 12, generator=seeded(1)), StepInput(step=0, generator=seeded()))
        if turn:
            sae.W_enc.grad = sae.W_enc.grad.contiguous()
        optimizer.step(0)
        weights.append(sae.W_enc.detach().clone())
    assert torch.equal(weights[0], weights[1])


# ---- who answers for a fast path


def test_a_class_that_changes_the_mathematics_loses_the_fast_path() -> None:
    base = type(built(TopKConfig(d_sae=60, k=3)))
    for name in ("losses", "features_of", "pre_activations", "reconstruction", "training_features"):
        changed = type("Changed", (base,), {name: lambda self, *args, name=name: getattr(base, name)(self, *args)})
        sae = built(TopKConfig(d_sae=60, k=3))
        sae.__class__ = changed
        assert sae.why_reference() == f"Changed overrides {name}, and not why_no_fast_path"
        assert sae.step_path().startswith("plain torch: ")
        vouched = type("Vouched", (changed,), {"why_no_fast_path": base.why_no_fast_path})
        sae.__class__ = vouched
        assert sae.why_reference() is None


def test_a_parameter_that_the_kernels_do_not_know_learns_by_autograd() -> None:
    sae = built(StandardConfig(d_sae=60))
    sae.gate = torch.nn.Parameter(torch.zeros(60))
    assert sae.step_path() == "plain torch: the kernels have no gradient for gate"
    sae.gate.requires_grad_(False)
    assert sae.why_reference() is None


def test_many_of_the_features_are_no_case_for_sparse_products() -> None:
    assert built(TopKConfig(d_sae=100, k=15)).why_reference() is None
    assert "k = 20 is so large a part" in str(built(TopKConfig(d_sae=100, k=20)).why_reference())


def test_a_gradient_through_the_input_hook() -> None:
    sae, steer = built(StandardConfig(d_sae=60)).requires_grad_(False), torch.zeros(12, requires_grad=True)
    sae.hook_sae_input.add_hook(lambda x, hook: x + steer)
    sae(torch.randn(4, 12)).sum().backward()
    assert steer.grad is not None
    assert steer.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, when it first transforms a function
def test_transformed_functions() -> None:
    sae = built(StandardConfig(d_sae=60)).requires_grad_(False)
    x = torch.randn(4, 12)
    assert torch.allclose(torch.vmap(sae)(x), sae(x), atol=1e-5)
    assert torch.allclose(torch.func.jvp(sae, (x,), (x,))[0], sae(x), atol=1e-5)


@pytest.mark.parametrize("hooked", [False, True])
def test_one_vector(hooked: bool) -> None:
    sae, x = built(StandardConfig(d_sae=60)), torch.randn(12, generator=seeded())
    if hooked:
        sae.hook_sae_acts_post.add_hook(lambda features, hook: None)
    assert sae.encode_sparse(x).shape == (1, 60)
    values, numbers = sae.encode_topk(x, 3)
    assert values.shape == numbers.shape == (3,)


def test_so_few_rows_that_none_is_wanted() -> None:
    sae = built(BatchTopKConfig(d_sae=60, k=0.7))
    result = sae.training_step(torch.randn(1, 12), StepInput(step=0, generator=seeded()))
    assert not result.fired.any()
    with pytest.raises(ValueError, match="there are no rows to train on"):
        sae.training_step(torch.zeros(0, 12), StepInput(step=0, generator=seeded()))


def test_a_decoder_row_of_zeros_has_no_gradient_of_its_norm() -> None:
    options = {"scale_sparsity_penalty_by_decoder_norm": True, "normalize_sae_decoder": False, "l1_coefficient": 50.0}
    sae = built(StandardConfig(d_sae=60, **options))
    sae.W_dec.data[7] = 0
    sae.training_step(torch.randn(50, 12), StepInput(step=0, generator=seeded()))
    assert sae.W_dec.grad.isfinite().all()


def test_an_infinite_norm_goes_by_autograd() -> None:
    assert built(StandardConfig(d_sae=60, lp_norm=float("inf"))).why_reference() is not None


def test_two_screens_at_once() -> None:
    (one, rows), (two, _) = screened(64, 2048, "plain", seed=1), screened(64, 2048, "plain", seed=7)
    first, second = Screen(one), Screen(two)
    alone = first.active(rows, 0.0)
    second.active(rows, 0.0)
    again = first.active(rows, 0.0)
    assert alone is not None
    assert again is not None
    assert torch.equal(alone.dense(), again.dense())


def test_a_bias_that_rounds_far_does_not_hide_the_largest() -> None:
    """Bounds are raised by different amounts, which the lower bounds must know of: the second feature is the largest.

    Weights and rows lose nothing in bfloat16, and the bias of the first feature loses almost 4.
    """
    weights, bias = torch.zeros(1024, 8), torch.full((1024,), -5000.0)
    weights[:2, 0], weights[0, 1], weights[1, 1] = 1024.0, 3.984375, 0.0625
    bias[0], bias[1] = 0.0931 - 1027.984375, 0.0967 - 1024.0625
    rows = torch.zeros(512, 8)
    rows[:, :2] = 1
    encoder = Encoder(weights.T, bias)
    pre = rows @ encoder.W_enc + bias
    assert pre[0, 1] > pre[0, 0] > 0
    found = Screen(encoder).top(rows, 1)
    assert found is not None
    assert found.features.unique().tolist() == [1]


@pytest.mark.parametrize("rescale", [True, False])
def test_a_screened_threshold(rescale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside training, of a BatchTopK SAE: one number, or one for each feature."""
    sae = built(BatchTopKConfig(d_sae=2048, k=8, rescale_acts_by_decoder_norm=rescale), d_in=64)
    x = torch.randn(700, 64, generator=seeded(1))
    sae.training_step(x, StepInput(step=0, generator=seeded()))
    found = []
    for why in (None, "as the test wants"):
        monkeypatch.setattr(saekit.kernels.screen, "why_no_screen", lambda *args, why=why: why)
        calls = count_screens(monkeypatch)
        with torch.no_grad():
            found.append(sae.encode(x))
        assert bool(calls) == (why is None)
    sae.kernels = "reference"
    for one, other in ((found[0], found[1]), (found[0], sae.encode(x).detach())):
        both = (one > 0) & (other > 0)
        # The threshold is a feature of this very batch: the order of summing, which no two CPUs share, decides on it.
        assert ((one > 0) != (other > 0)).sum() <= 3
        assert torch.allclose(one[both], other[both], atol=1e-4)


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ON_GPU = [
    StandardConfig(d_sae=2048, l1_coefficient=0.1),
    StandardConfig(d_sae=2048, activation="tanh-relu", scale_sparsity_penalty_by_decoder_norm=True,
                   normalize_sae_decoder=False),
    TopKConfig(d_sae=2048, k=16),
    BatchTopKConfig(d_sae=2048, k=16),
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("config", ON_GPU, ids=lambda config: type(config).__name__)
def test_a_step_on_a_gpu_waits_for_nothing_and_is_that_of_the_cpu(config: SAEConfig) -> None:
    x = torch.randn(2048, 256, generator=seeded(1))
    weights = {}
    for device in ("cpu", "cuda"):
        sae = built(config, d_in=256, bias=-10.0).to(device)
        optimizer, rows = adam(sae), x.to(device)
        generator = torch.Generator(device)
        for step in range(4):
            waiting = device == "cuda" and step > 1  # the first steps make memory and handles
            torch.cuda.set_sync_debug_mode("error" if waiting else "default")
            try:
                sae.training_step(rows, StepInput(step=step, generator=generator))
                sae.before_update()
                optimizer.step(step)
                sae.after_update()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        weights[device] = {name: value.detach().cpu() for name, value in sae.named_parameters()}
    for name, value in weights["cpu"].items():
        assert (weights["cuda"][name] - value).norm() < 1e-2 * (value.norm() + 1), name


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_clipping_inside_adam_is_that_of_torch(clip: float, size: float) -> None:
    """Adam's first step does not depend on the size of a gradient, but its moments do."""
    own, other = (built(StandardConfig(d_sae=30)) for _ in range(2))
    optimizer = Optimizer(own.named_parameters(), OptimizerConfig(beta1=0.9, clip_grad_norm=clip), lambda step: 1e-3)
    plain = torch.optim.Adam(other.parameters(), lr=1e-3, betas=(0.9, 0.999))
    for step in range(3):
        for sae in (own, other):
            for number, parameter in enumerate(sae.parameters()):
                parameter.grad = torch.empty_like(parameter).copy_(
                    torch.randn(parameter.shape, generator=seeded(10 * step + number)) * size * (step + 1)
                )
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in other.parameters()])
        assert optimizer.step(step).item() == pytest.approx(norm.item(), rel=1e-5)
        if clip:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        plain.step()
    for name, parameter in other.named_parameters():
        assert torch.allclose(dict(own.named_parameters())[name], parameter, atol=1e-6), name
        moments = plain.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            found = optimizer.state_dict()[name][moment]
            assert torch.allclose(found, moments[moment], rtol=1e-4, atol=1e-12), (name, moment)
