"""Which kernel is taken."""

from __future__ import annotations

from typing import Any

import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardKernel
from support.kernels import built, seeded

from saekit import StepInput
from saekit.kernels import StepKernel, Use


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
