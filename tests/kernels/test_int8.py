"""Bounds by products of 8-bit integers are never too small, and what is found by them is what float32 finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import HARD, screened, seeded
from torch import Tensor

import saekit.kernels.int8
import saekit.kernels.private_torch as private
import saekit.kernels.screen
from saekit.kernels import Encoder, SparseFeatures
from saekit.kernels.int8 import Int8Bounds
from saekit.kernels.private_torch import int8_products, public_int8_products, why_no_int8_products
from saekit.kernels.screen import Int8Screen

# ---- the bound


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("d_in", "d_sae"), [(64, 400), (700, 256), (100, 301)])
def test_the_bound_holds(kind: str, d_in: int, d_sae: int) -> None:
    encoder, rows = screened(d_in, d_sae, kind)
    scale = torch.rand(d_sae, generator=seeded(3)) + 0.1
    for scaled, above in ((None, 0.0), (scale, 0.7), (scale, torch.linspace(-1, 1, d_sae))):
        bounds = Int8Bounds(encoder, scaled).of(rows, above)
        assert bounds is not None
        exact = (rows.double() @ encoder.W_enc.double() + encoder.b_enc.double() - above) * (
            1 if scaled is None else scale
        )
        assert (exact <= bounds.double()).all()


def test_the_bound_is_near() -> None:
    """What Cauchy and Schwarz say of rounding to 255 numbers is half of the spread of pre-activations.

    Large columns, which rows have in common or not, change nothing of it.
    """
    wide = []
    for kind in ("plain", "outliers", "loud"):
        encoder, rows = screened(512, 1024, "plain" if kind == "loud" else kind)
        if kind == "loud":
            rows[:, ::100] *= 200
            encoder.W_enc[::100] /= 200
        exact = rows.double() @ encoder.W_enc.double() + encoder.b_enc.double()
        bounds = Int8Bounds(encoder).of(rows, 0.0)
        assert bounds is not None
        wide.append(float((bounds - exact).mean() / (exact - exact.mean(0)).std()))
    assert max(wide) < 0.5
    assert max(wide) < 1.3 * min(wide)


@pytest.mark.parametrize("lost_by", ["rows", "features"])
def test_the_bound_holds_where_nothing_less_would(lost_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that lose nothing themselves lie along what others lose: Cauchy and Schwarz are equal."""
    monkeypatch.setattr(saekit.kernels.int8, "_divisor", lambda rows, weights: torch.ones(rows.shape[1]))
    for d in (90, 700):
        some = torch.randn(64, d, generator=seeded(d))
        step = some.abs().amax(1, keepdim=True) / 127
        lost = some - (some / step).round() * step
        along = (lost / lost.abs().amax(1, keepdim=True) * 127).round() / 127
        rows, weights = (some, along) if lost_by == "rows" else (along, some)
        bounds = Int8Bounds(Encoder(weights.T, torch.zeros(64))).of(torch.cat([rows, -rows]), 0.0)
        assert bounds is not None
        exact = (rows.double() * weights.double()).sum(1)
        bound = bounds.diag().double()
        assert (exact <= bound).all()
        margin = lost.norm(dim=1) * along.norm(dim=1)
        assert (bound - exact < 0.1 * margin).all()


def test_what_float32_sums_up_to_is_counted() -> None:
    """Integers of which rounding to steps loses nothing, and so large in common that sums in float32 lose much."""
    center, generator = torch.randint(-9999, 9999, (300,), generator=seeded()).float(), seeded(1)
    numbers, weights = (torch.randint(-127, 128, (64, 300), generator=generator).float() for _ in range(2))
    numbers[:, 0] = weights[:, 0] = 127
    rows, encoder = center + torch.cat([numbers, -numbers]), Encoder(weights.T, torch.zeros(64))
    bounds = Int8Bounds(encoder).of(rows, 0.0)
    assert bounds is not None
    for pre in (computed(encoder, rows), rows @ weights.T, rows.double() @ weights.double().T):
        assert (pre <= bounds).all()


def test_rows_after_the_first_have_their_center() -> None:
    """Bounds of later rows, that are nothing like the first, hold, too."""
    encoder, rows = screened(64, 1024, "plain")
    bounds = Int8Bounds(encoder)
    for part in (rows, rows * 1e4 + 1e5, rows[:1], torch.zeros(3, 64), rows.mean(0).expand(5, -1)):
        found = bounds.of(part, 0.0)
        assert found is not None
        assert (part.double() @ encoder.W_enc.double() + encoder.b_enc.double() <= found.double()).all()


@pytest.mark.parametrize("number", [1e-45, 1e-38, 1e-22, 3e19, 3e38, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["rows", "features"])
def test_there_is_no_bound_of_numbers_whose_products_are_none(number: float, where: str) -> None:
    """What is too small is zero, or has lost digits, as a square or step, and what is too large is infinite."""
    row, weights = torch.randn(1, 20, generator=seeded()), torch.randn(64, 20, generator=seeded(1))
    (row if where == "rows" else weights)[-1] = torch.tensor([number] + [0.0] * 19)
    rows, encoder = torch.cat([row, -row]), Encoder(weights.T, torch.zeros(64))  # whose center is zero
    assert Int8Bounds(encoder).of(rows, 0.0) is None


SPECIAL = [0.0, 1.0, 300.0, 1e5, 1e19, 3e38, 1e-5, 1e-15, 1e-20, 1e-38, 1e-45]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@st.composite
def hard_matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows, weights ``[d_sae, d_in]``, bias and scale, of all sizes and with any numbers in them."""
    d_in, n, d_sae = draw(st.integers(1, 40)), draw(st.integers(1, 12)), 64
    generator = seeded(draw(st.integers(0, 1 << 30)))
    sizes = st.sampled_from([0.0, 0.5, 3.0, 15.0])
    made = []
    for shape in ((n, d_in), (d_sae, d_in)):
        matrix = torch.randn(shape, generator=generator)
        for dim in (0, 1):
            powers = torch.randn([size if at == dim else 1 for at, size in enumerate(shape)], generator=generator)
            matrix *= 10 ** (powers * draw(sizes)).clamp(-30, 30)
        if draw(st.booleans()):
            matrix += draw(st.sampled_from([1.0, 1000.0]))
        rare = draw(st.integers(0, 5)) == 0
        for value in draw(st.lists(st.sampled_from(SPECIAL + NOT_FINITE * rare), max_size=4)):
            row, column = (int(torch.randint(size, (1,), generator=generator)) for size in shape)
            where: Any = draw(st.sampled_from([(row, column), row, (slice(None), column)]))
            matrix[where] = value
        made.append(matrix)
    bias = torch.randn(d_sae, generator=generator) * draw(st.sampled_from([0.0, 1e-30, 1.0, 1e6]))
    scale = torch.rand(d_sae, generator=generator) + 0.1 if draw(st.booleans()) else None
    return made[0], made[1], bias, scale


def computed(encoder: Encoder, rows: Tensor) -> Tensor:
    """Every pre-activation as a screen computes those that it lets through."""
    places = torch.ones(len(rows), encoder.d_sae).nonzero()
    entries = SparseFeatures(places[:, 0], places[:, 1], torch.empty(0), len(rows), encoder.d_sae)
    products = entries.inner_products(rows, encoder.W_enc.T.contiguous())
    return products.view(entries.shape) + encoder.b_enc


@settings(max_examples=100)
@given(hard_matrices(), st.sampled_from([0.0, 0.7, "each"]), st.sampled_from([1, 4]))
def test_whatever_the_numbers(
    matrices: tuple[Tensor, Tensor, Tensor, Tensor | None], above: float | str, k: int
) -> None:
    rows, weights, bias, scale = matrices
    encoder, threshold = Encoder(weights.T, bias), torch.linspace(-1, 2, 64) if above == "each" else float(above)
    bounds = Int8Bounds(encoder, scale).of(rows, threshold)
    finite = bool(rows.isfinite().all() and weights.isfinite().all())
    if bounds is None:
        largest = torch.cat([rows.abs().amax(1), weights.abs().amax(1)]), torch.cat([rows.flatten(), weights.flatten()])
        tame = bool(((largest[0] == 0) | (largest[0] > 1e-4)).all()) and float(largest[1].abs().max()) < 1e6
        assert not finite or not tame, "it says so where there is no need"
        return
    assert finite
    factor = torch.ones(64) if scale is None else scale
    exact = (rows.double() @ weights.double().T + bias.double() - threshold) * factor
    assert (exact <= bounds.double()).all()
    found = computed(encoder, rows)
    for pre in (found, rows @ weights.T + bias, (rows.flip(1) @ weights.flip(1).T).add_(bias)):  # in other orders
        assert (bounds[pre > threshold] > 0).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saekit.kernels.screen, "screen_below", lambda weights: 1.0)
        active = Int8Screen(encoder, scale).active(rows, threshold)
        top = Int8Screen(encoder, scale).top(rows, k)
    assert active is not None
    assert torch.equal(active.dense(), found.where(found > threshold, 0))
    scaled = (found * factor).relu()
    if top is not None:
        values = scaled.topk(k, dim=1).values
        assert torch.equal(top.dense().topk(k, dim=1).values, values)
        assert torch.equal(top.dense()[top.dense() > 0], scaled[top.dense() > 0])
    else:
        assert not scaled.isfinite().all()


# ---- the product


@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (17, 3, 5), (40, 600, 33), (8, 1300, 8)])
def test_products_of_the_largest_numbers_are_exact(n: int, d: int, m: int) -> None:
    for low, high in ((0, 256), (255, 256)):
        rows = torch.randint(low, high, (n, d), generator=seeded()).to(torch.uint8)
        weights = torch.randint(-127, 128, (m, d), generator=seeded(1)).to(torch.int8)
        weights[: m // 3], weights[m // 2 :] = 127, -127
        expected = (rows.double() @ weights.double().T).int()
        for product in (int8_products, public_int8_products, private._private_int8_products):
            out = torch.full((n, m), -1, dtype=torch.int32)
            assert torch.equal(product(rows, weights, out), expected)
            assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("", "", None),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", None),
        ("ONEDNN_MAX_CPU_ISA", "avx2", "ONEDNN_MAX_CPU_ISA holds oneDNN to AVX2, which has no VNNI"),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", "ONEDNN_MAX_CPU_ISA holds oneDNN to AVX512_CORE, which has no VNNI"),
        ("ATEN_CPU_CAPABILITY", "avx2", "ATEN_CPU_CAPABILITY holds torch to avx2, which has no VNNI"),
        ("ATEN_CPU_CAPABILITY", "avx512", None),
    ],
)
def test_libraries_that_are_held_to_less(
    variable: str, value: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda there=there: there)
        expected = reason if there else "this CPU has no AVX-512 VNNI"
        assert why_no_int8_products.__wrapped__() == expected


@pytest.mark.parametrize("change", ["gone", "only int8", "it overflows"])
def test_a_product_that_is_not_exact_is_left_alone(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN's is where it is held to AVX2: pairs are added in 16 bits."""

    def other(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        if change == "it overflows":
            pairs = rows.int().view(len(rows), 1, -1, 2) * weights.int().view(1, len(weights), -1, 2)
            return out.copy_(pairs.sum(3).clamp_(-(1 << 15), (1 << 15) - 1).sum(2))
        raise RuntimeError("expected int8") if change == "only int8" else AttributeError("no such function")

    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    private._int8_products_are_exact.cache_clear()
    monkeypatch.setattr(private, "_private_int8_products", other)
    assert why_no_int8_products.__wrapped__() == f"torch {torch.__version__} has no exact products of uint8 and int8"
    private._int8_products_are_exact.cache_clear()
