"""Which kernel is taken, and what torch does not promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardKernel
from support.kernels import built, seeded
from torch import Tensor

import saekit.kernels.private_torch as private
from saekit import StepInput
from saekit.kernels import StepKernel, Use
from saekit.kernels.private_torch import entry_products, is_followed, public_entry_products


class Refusing(StepKernel[Any]):
    name = "a kernel for large batches"

    def refuses(self, sae: Any, use: Use) -> str | None:
        return f"it is for {use.device.type}s with more cores" if use.training else None


class Named(StandardKernel):
    name = "the sparse kernels"


def listed(*kernels: StepKernel[Any]) -> Any:
    sae = built(StandardConfig(d_sae=32))
    sae.__class__ = type("Listed", (type(sae),), {"step_kernels": kernels})
    return sae


def test_the_first_that_does_not_refuse_is_taken_and_all_reasons_are_told() -> None:
    sae = listed(Refusing(), Named())
    found = "the sparse kernels, no first look in bfloat16: not for fewer than 1024 features"
    assert sae.step_path() == f"{found} (not a kernel for large batches: it is for cpus with more cores)"
    assert sae.why_reference() is None
    sae.kernels = "reference"
    assert sae.step_path() == (
        "plain torch: a kernel for large batches: it is for cpus with more cores; "
        'the sparse kernels: kernels is "reference"'
    )
    assert listed(Named(), Refusing()).step_path() == found
    assert listed().step_path() == "plain torch: the architecture has no fast path"


def test_a_kernel_is_asked_for_what_is_wanted() -> None:
    asked: list[Use] = []

    class Asking(Named):
        def refuses(self, sae: Any, use: Use) -> str | None:
            asked.append(use)
            return super().refuses(sae, use)

    sae = listed(Asking())
    sae.kernels = "fast"
    sae.b_dec.requires_grad_(False)
    x = torch.randn(5, 12, generator=seeded())
    sae.training_step(x, StepInput(step=0, generator=seeded()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sae.encode(x)
    step, inference = asked
    cpu = torch.device("cpu")
    assert step == Use(
        training=True, device=cpu, dtype=torch.float32, asked="fast", learning=frozenset({"W_enc", "b_enc", "W_dec"})
    )
    assert inference == Use(training=False, device=cpu, dtype=torch.float32, asked="fast", autocast=True)


# ---- private functions of torch, and the public ways in their place


@pytest.fixture
def fresh() -> Any:
    """What was found out about torch is found out anew."""
    yield private._has_entry_products.cache_clear(), private._functorch_check.cache_clear()
    private._has_entry_products.cache_clear()
    private._functorch_check.cache_clear()


def entries(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    vectors, weights = torch.randn(7, d, generator=seeded()).to(dtype), torch.randn(9, d, generator=seeded(1)).to(dtype)
    rows = torch.randint(7, (n,), generator=seeded(2)).sort().values
    features = torch.randint(9, (n,), generator=seeded(3))
    return vectors, weights, features, torch.searchsorted(rows, torch.arange(7)), rows


@pytest.mark.parametrize("n", [0, 1, 40])
def test_both_ways_to_the_products_of_entries_agree(n: int, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_AT_ONCE", 32)
    vectors, weights, features, starts, rows = entries(n, 12, torch.float64)
    expected = (vectors[rows] * weights[features]).sum(1)
    torch.testing.assert_close(public_entry_products(vectors, weights, features, rows), expected)
    torch.testing.assert_close(entry_products(vectors, weights, features, starts, rows), expected)


@pytest.mark.parametrize("change", ["gone", "another signature", "another result"])
def test_a_private_function_that_changed_is_left_alone(
    change: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = entries(20, 12, torch.float32)
    expected = entry_products(*given)
    private._has_entry_products.cache_clear()

    def other(*arguments: Any) -> Tensor:
        if change == "another result":
            return torch.zeros(len(arguments[2]), dtype=arguments[0].dtype)
        raise TypeError("no such arguments") if change == "another signature" else RuntimeError("no such function")

    monkeypatch.setattr(private, "_private_entry_products", other)
    torch.testing.assert_close(entry_products(*given), expected)


def test_a_whole_step_by_the_public_way(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = built(StandardConfig(d_sae=400), bias=-4.0), torch.randn(300, 12, generator=seeded())
    found = []
    for there in (True, False):
        monkeypatch.setattr(private, "_has_entry_products", lambda *kind, there=there: there)
        sae.training_step(x, StepInput(step=0, generator=seeded()))
        found.append([value.grad.clone() for value in sae.parameters()])
        sae.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("known", [True, False])
def test_what_torch_follows_is_seen(known: bool, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(private, "_functorch_check", lambda: None)
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_followed(x))
        return x.sum()

    x = torch.ones(3)
    assert not is_followed(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    assert seen == [True, True]
