"""Screens in bfloat16 and in int8: what they let through, and what is said where there is none."""

from __future__ import annotations

import gc
import itertools
import weakref

import attrs
import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import HARD, SCREENS, built, count_screens, looking_in_int8, needs_bfloat16, screened, seeded

import saekit
import saekit.kernels.encoder
import saekit.kernels.screen
from saekit.kernels import Encoder
from saekit.kernels.private_torch import has_bfloat16_products
from saekit.kernels.screen import Bfloat16Screen
from saekit.values import StepInput


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("d_in", "d_sae"), [(64, 1024), (512, 2048), (100, 3001)])
def test_the_bound_holds(kind: str, d_in: int, d_sae: int) -> None:
    encoder, rows = screened(d_in, d_sae, kind)
    for scale, above in itertools.product((None, torch.rand(d_sae, generator=seeded(3)) + 0.1), (0.0, 0.7)):
        bounds, _ = Bfloat16Screen(encoder, scale)._bounds(rows, above)
        exact = rows.double() @ encoder.W_enc.double() + encoder.b_enc.double() - above
        exact = exact if scale is None else exact * scale
        below = exact - bounds.double() - 2.0**-8 * exact.abs()  # what is left is the rounding of the bound itself
        assert below.max() <= 0


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("kind", HARD)
def test_a_screen_finds_every_active_feature(kind: str, screen: str) -> None:
    encoder, rows = screened(256, 2048, kind)
    product = rows @ encoder.W_enc + encoder.b_enc
    exact = rows.double() @ encoder.W_enc.double() + encoder.b_enc.double()
    sure = exact > 1e-5 * product.abs().max()  # nearer to zero, two orders of summing differ
    found = SCREENS[screen](encoder).active(rows, 0.0)
    if kind in ("norms", "bias"):  # most features are active, or may be, and it says so
        assert found is None
        return
    assert found is not None
    dense = found.dense()
    assert bool((dense[sure] > 0).all())
    assert not bool(((dense > 0) & (exact < -1e-5 * product.abs().max())).any())
    assert torch.allclose(dense[sure], product[sure], rtol=1e-3, atol=1e-5 * float(product.abs().max()))


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("k", [1, 16, 32])
def test_a_screen_finds_the_largest(kind: str, k: int, screen: str) -> None:
    encoder, rows = screened(256, 2048, kind)
    scale = torch.rand(2048, generator=seeded(9)) + 0.5
    found = SCREENS[screen](encoder, scale).top(rows, k)
    if found is None:
        assert kind in ("norms", "bias"), "too many come into question"
        return
    exact = (rows.double() @ encoder.W_enc.double() + encoder.b_enc.double()) * scale
    least = exact.topk(k, dim=1).values[:, -1:].clamp_min(0)
    dense, error = found.dense(), 1e-5 * exact.abs().max()
    assert bool((dense[exact > least + error] > 0).all()), "the k largest are there"
    assert not bool(((dense > 0) & (exact < least - error)).any()), "and no others"
    assert int((dense > 0).sum(1).max()) <= k


BOTH = [pytest.param("bfloat16", marks=needs_bfloat16), "int8"]


@pytest.mark.parametrize("screen", BOTH)
@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk"])
def test_screened_steps_are_the_unscreened_ones(name: str, screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2048 rows they select the same features, and gradients agree to float32's last digits."""
    config = {
        "standard": StandardConfig(d_sae=2048, l1_coefficient=0.1),
        "topk": TopKConfig(d_sae=2048, k=16),
        "batchtopk": BatchTopKConfig(d_sae=2048, k=16),
    }[name]
    x = torch.randn(2048, 256, generator=seeded(1))
    found = []
    looking_in_int8(monkeypatch)
    for why in (None, "as the test wants"):
        monkeypatch.setattr(saekit.kernels.screen, "why_no_screen", lambda *args, why=why: why)
        calls = count_screens(monkeypatch)
        sae = built(config, d_in=256, bias=-20.0 if name == "standard" else 0.0)
        sae.kernels = "int8" if screen == "int8" else "auto"
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


@pytest.mark.parametrize("screen", BOTH)
def test_where_many_are_active_nothing_is_screened(screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_screens(monkeypatch)
    looking_in_int8(monkeypatch)
    sae = built(StandardConfig(d_sae=2048), d_in=64)
    sae.kernels = "int8" if screen == "int8" else "auto"
    sae.training_step(torch.randn(600, 64, generator=seeded()), StepInput(step=0, generator=seeded()))
    assert not calls


def test_why_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    why = saekit.kernels.why_no_screen
    cpu = torch.device("cpu")
    assert why(cpu, torch.float64, 4096) == "not for float64"
    assert why(torch.device("cuda"), torch.float32, 4096) == "not on cuda"
    assert why(cpu, torch.float32, 100) == "not for fewer than 1024 features"
    monkeypatch.setattr(saekit.kernels.screen, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(saekit.kernels.screen, "why_no_int8_products", lambda: "this CPU has no AVX-512 VNNI")
    assert why(cpu, torch.float32, 4096) == "this CPU has no bfloat16 products"
    assert built(StandardConfig(d_sae=2048)).step_path() == (
        "fast kernels, no first look in bfloat16: this CPU has no bfloat16 products"
    )
    sae = built(StandardConfig(d_sae=2048))
    sae.kernels = "int8"
    assert sae.step_path() == "plain torch: no first look in int8: this CPU has no AVX-512 VNNI"
    looking_in_int8(monkeypatch)
    assert sae.step_path() == "fast kernels, a first look in int8"
    sae.kernels = "auto"
    assert sae.step_path() == (
        "fast kernels, no first look in bfloat16: this CPU has no bfloat16 products; "
        "training.kernels=int8 takes one in int8"
    )
    monkeypatch.setattr(saekit.kernels.screen, "has_bfloat16_products", lambda: True)
    assert why(cpu, torch.float32, 4096) is None
    assert built(StandardConfig(d_sae=2048)).step_path() == "fast kernels, a first look in bfloat16"


@needs_bfloat16
@pytest.mark.parametrize(("held", "has"), [("AVX2", False), ("avx512_core_vnni", False), ("AVX512_CORE_BF16", True)])
def test_a_library_that_is_held_to_less_makes_no_bfloat16_products(
    held: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN would make them another way, many times as slow as float32."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert has_bfloat16_products.__wrapped__() is has


def test_nothing_is_screened_where_all_libraries_are_held_to_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPU has: as figures of lesser machines are measured on larger ones."""
    screen = saekit.kernels.screen
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: True)
    for name in ("has_bfloat16_products", "why_no_int8_products"):
        monkeypatch.setattr(screen, name, getattr(screen, name).__wrapped__)
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    cpu = torch.device("cpu")
    assert screen.why_no_screen(cpu, torch.float32, 4096) is None
    for name, value in (
        ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert screen.why_no_screen(cpu, torch.float32, 4096) == "this CPU has no bfloat16 products"
    assert "which has no VNNI" in str(screen.why_no_screen(cpu, torch.float32, 4096, int8=True))
    encoder, _ = screened(64, 2048, "plain")
    assert screen.screen_for(encoder) is None
    assert screen.screen_for(attrs.evolve(encoder, int8=True)) is None
    assert built(StandardConfig(d_sae=2048)).step_path().startswith("fast kernels, no first look in bfloat16")


@pytest.mark.parametrize("screen", SCREENS)
def test_two_screens_at_once(screen: str) -> None:
    (one, rows), (two, _) = screened(64, 2048, "plain", seed=1), screened(64, 2048, "plain", seed=7)
    first, second = SCREENS[screen](one), SCREENS[screen](two)
    alone = first.active(rows, 0.0)
    second.active(rows, 0.0)
    again = first.active(rows, 0.0)
    assert alone is not None
    assert again is not None
    assert torch.equal(alone.dense(), again.dense())


@pytest.mark.parametrize("screen", SCREENS)
def test_a_bias_that_rounds_far_does_not_hide_the_largest(screen: str) -> None:
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
    found = SCREENS[screen](encoder).top(rows, 1)
    assert found is not None
    assert found.features.unique().tolist() == [1]


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("rescale", [True, False])
def test_a_screened_threshold(rescale: bool, screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside training, of a BatchTopK SAE: one number, or one for each feature."""
    sae = built(BatchTopKConfig(d_sae=2048, k=8, rescale_acts_by_decoder_norm=rescale), d_in=64)
    x = torch.randn(700, 64, generator=seeded(1))
    sae.training_step(x, StepInput(step=0, generator=seeded()))
    sae.kernels = "int8" if screen == "int8" else "auto"
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


def test_medium_is_said_to_be_bfloat16_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saekit.kernels.screen, "has_bfloat16_products", lambda: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for changes, why in ((True, "products are in bfloat16 anyway"), (False, None)):
            monkeypatch.setattr(saekit.kernels.screen, "changes_products", lambda *args, changes=changes: changes)
            assert saekit.kernels.why_no_screen(torch.device("cpu"), torch.float32, 4096) == why
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("screen", SCREENS)
def test_an_encoder_that_was_screened_is_not_kept(screen: str) -> None:
    encoder, rows = screened(64, 1024, "plain")
    weights, workspace = weakref.ref(encoder.W_enc), encoder.workspace
    made = SCREENS[screen](encoder)
    assert made.active(rows, 0.0) is not None
    del encoder, made
    gc.collect()
    assert weights() is None
    del workspace
