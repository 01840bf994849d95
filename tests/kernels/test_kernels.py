"""The fast kernels beside dense products and autograd: active features, largest entries, memory."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from saekit_plugins.activations.relu import Relu
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import built, seeded
from torch import Tensor

from saekit.config import SAEConfig
from saekit.kernels import Encoder, SparseFeatures, active_groups, batch_top, top_groups
from saekit.kernels.groups import top_entries
from saekit.kernels.workspace import SHARED, Workspace, Workspaces
from saekit.values import StepInput

# ---- the active features


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small batch has many chunks, and groups come in between."""
    for module in ("encoder", "active", "groups", "gradients", "auxk", "penalty", "inference"):
        monkeypatch.setattr(f"saekit.kernels.{module}.CHUNK", 16)
    monkeypatch.setattr("saekit.kernels.encoder._ENTRIES", 50)
    monkeypatch.setattr("saekit.kernels.active.PROBE", 8)
    monkeypatch.setattr("saekit.kernels.groups.PROBE", 8)


KINDS = [
    StandardConfig(d_sae=40, dtype="float64", l1_coefficient=0.3, normalize_sae_decoder=False),
    StandardConfig(d_sae=40, dtype="float64", l1_coefficient=0.3, lp_norm=2.0, activation="tanh-relu",
                   scale_sparsity_penalty_by_decoder_norm=True, normalize_sae_decoder=False),
    TopKConfig(d_sae=40, dtype="float64", k=5, k_aux=3),
    TopKConfig(d_sae=200, dtype="float64", k=5, k_aux=4, rescale_acts_by_decoder_norm=False),
    BatchTopKConfig(d_sae=40, dtype="float64", k=4.3, k_aux=90),
    GatedConfig(d_sae=40, dtype="float64", l1_coefficient=0.3, aux_loss_trains_decoder=True),
    MatryoshkaConfig(d_sae=40, dtype="float64", k=4.3, k_aux=3, widths=(1, 7, 0.5)),
]  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [2.0, 0.0, -1.0, -3.0, "mixed"])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{type(config).__name__}{config.d_sae}")
def test_a_fast_step_of_many_chunks_is_the_step_of_autograd(config: SAEConfig, bias: float | str, device: str) -> None:
    """Dense chunks, sparse ones, and both in one batch."""
    x = torch.randn(101, 12, generator=seeded(3), dtype=torch.float64)
    if bias == "mixed":
        x[20:60] *= 0.01
    x = x.to(device)
    dead = torch.zeros(config.features(12), dtype=torch.bool, device=device)
    dead[:: 3 if config.d_sae == 40 else 2] = True
    found = {}
    for kernels in ("reference", "fast"):
        sae = built(config, bias=-1.5 if bias == "mixed" else float(bias), device=device)
        sae.kernels = kernels
        assert (sae.why_reference() is None) == (kernels == "fast")
        result = sae.training_step(x, StepInput(step=1, generator=seeded(device=device), dead=dead))
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
def test_the_largest_of_each_row(d_sae: int, k: int, dtype: torch.dtype, device: str) -> None:
    pre = torch.randn(50, d_sae, generator=seeded(), dtype=dtype) - 1
    pre[3] = -1
    pre[4] = 0
    pre = pre.to(device)
    found = top_entries(pre.clone(), k)
    values, features = pre.topk(k, dim=1)
    expected = torch.zeros_like(pre).scatter(1, features, values.relu())
    assert torch.equal(found.dense(), expected)
    if device == "cpu":  # another is not waited for
        assert bool((found.values > 0).all())


def test_ties_do_not_make_more_than_k(device: str) -> None:
    pre = torch.ones(20, 4096, device=device)
    pre[:, ::2] = 2.0
    found = top_entries(pre, 32)
    assert torch.equal(found.dense().count_nonzero(1), torch.full((20,), 32, device=device))
    assert bool((found.values == 2).all())


@pytest.mark.parametrize("wanted", [1, 700, 5001, 10**6])
@pytest.mark.parametrize("first_rows", [1.0, 0.01, 30.0], ids=["alike", "quiet first", "loud first"])
def test_the_largest_of_a_batch(wanted: int, first_rows: float, device: str) -> None:
    """Whatever the first rows say of the others."""
    sae = built(StandardConfig(d_sae=64, dtype="float64"), device=device)
    rows = torch.randn(1200, 12, generator=seeded(1), dtype=torch.float64)
    rows[:256] *= first_rows
    rows = rows.to(device)
    scale = (torch.rand(64, generator=seeded(2), dtype=torch.float64) + 0.5).to(device)
    encoder = Encoder(sae.W_enc.detach(), sae.b_enc.detach())
    pre = rows @ encoder.W_enc + encoder.b_enc
    compared = (pre * scale).relu().flatten()
    values, places = compared.topk(min(wanted, compared.numel()))
    expected = (torch.zeros_like(compared).scatter(0, places, values).reshape(pre.shape) > 0) * pre
    found = batch_top(encoder, rows, wanted, scale=scale)
    assert torch.allclose(found.dense(), expected)
    # A device that is not a CPU is not waited for: where fewer are above zero, some entries are zero.
    there = len(found) if device == "cpu" else int((found.values > 0).sum())
    assert there == min(wanted, int((compared > 0).sum()))


def test_ties_at_the_threshold_of_a_batch_do_not_make_more_than_wanted(device: str) -> None:
    encoder = Encoder(torch.zeros(3, 50, device=device), torch.ones(50, device=device))
    found = batch_top(encoder, torch.zeros(40, 3, device=device), 77)
    assert len(found) == 77
    assert found.rows[-1] == 1, "the first ones"


def test_memory_is_used_again_and_who_works_at_once_has_their_own() -> None:
    cpu, pool = torch.device("cpu"), Workspaces()

    def place(workspace: Workspace, name: str = "test") -> int:
        return workspace.scratch(name, (10, 10), torch.float32, cpu).data_ptr()

    with pool.lent() as first:
        where = place(first)
        assert first.scratch("test", (5, 7), torch.float64, cpu).data_ptr() == where
        assert place(first, "other") != where
        there: list[int] = []

        def work() -> None:
            with pool.lent() as mine:
                there.append(place(mine))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert there != [where]
    with pool.lent() as one, pool.lent() as two:
        assert {place(one), place(two)} == {where, *there}, "what was given back"


def test_copies_and_pickles_work_in_shared_memory() -> None:
    sae = built(StandardConfig(d_sae=20))
    sae.memory = Workspaces()
    assert copy.deepcopy(sae).memory is sae.memory
    assert pickle.loads(pickle.dumps(sae)).memory is SHARED


def test_gradients_are_used_again_and_never_twice_at_once() -> None:
    like = torch.empty(1 << 11, 1 << 10)
    memory = Workspace()
    one, two = memory.gradient_for(like), memory.gradient_for(like)
    assert one.data_ptr() != two.data_ptr()
    memory.recycle([one, two.T, None, torch.empty(3)])
    again, more, third = (memory.gradient_for(like) for _ in range(3))
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


# ---- batches and weights with nothing in them


def test_so_few_rows_that_none_is_wanted(device: str) -> None:
    sae = built(BatchTopKConfig(d_sae=60, k=0.7), device=device)
    result = sae.training_step(torch.randn(1, 12, device=device), StepInput(step=0, generator=seeded(device=device)))
    assert not result.fired.any()
    with pytest.raises(ValueError, match="there are no rows to train on"):
        sae.training_step(torch.zeros(0, 12, device=device), StepInput(step=0, generator=seeded(device=device)))


def test_a_decoder_row_of_zeros_has_no_gradient_of_its_norm(device: str) -> None:
    options = {"scale_sparsity_penalty_by_decoder_norm": True, "normalize_sae_decoder": False, "l1_coefficient": 50.0}
    sae = built(StandardConfig(d_sae=60, **options), device=device)
    sae.W_dec.data[7] = 0
    sae.training_step(torch.randn(50, 12, device=device), StepInput(step=0, generator=seeded(device=device)))
    assert sae.W_dec.grad.isfinite().all()
