"""Step kernels ``triton_topk`` and ``triton_batchtopk``: sparse products on NVIDIA's GPUs, written in Triton."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl


@attrs.frozen(kw_only=True)
class TritonTopKConfig:
    """No options."""


@attrs.frozen(kw_only=True)
class TritonBatchTopKConfig:
    """No options."""


@hookimpl
def saekit_register_step_kernels() -> Iterable[Entry]:
    for name, config, kind in (("topk", TritonTopKConfig, "TopK"), ("batchtopk", TritonBatchTopKConfig, "BatchTopK")):
        yield Entry(
            f"triton_{name}",
            config,
            f"{__name__}.kernels:Triton{kind}Kernel",
            requires=("triton",),
            serves=(f"saekit:{name}",),
            summary=f"steps of {name} on NVIDIA's GPUs, with its sparse products in Triton",
        )
