"""A training step as the model of its costs has it: see :mod:`saekit.distributed.costs`."""

from __future__ import annotations

from typing import Any

import torch

from saekit.config import TrainingConfig
from saekit.devices import at_hand
from saekit.distributed.costs import Job, Mesh
from saekit.distributed.sizes import LARGE
from saekit.kernels.kernel import SparseKernel, StepKernel, Use, choose, kernels_of
from saekit.kernels.screen import why_no_screen
from saekit.precision import products
from saekit.sae.module import SAEModule
from saekit.training.shown import lies_by_features
from saekit.values import StepInput

__all__ = ["job_of", "step_bytes"]


def job_of(
    sae: SAEModule,
    training: TrainingConfig,
    device: str,
    kept: int | None = None,
    *,
    mesh: Mesh | None = None,
    gathers_rows: bool = False,
    elementwise: bool = True,
) -> Job:
    """What costs depend on of a whole ``sae``, of which the optimizer keeps so many bytes, on a ``device``.

    That need not be there.  The kernel is that of the processes of ``mesh``.
    """
    mesh = mesh or Mesh()
    parts = [
        (entry, value)
        for entry in sae.table
        if entry.split == "d_sae" and (value := getattr(sae, entry.name)) is not None
    ]
    numbers, split = sae.table.count(), sum(value.numel() for _, value in parts)
    undivided = sum(
        value.numel()
        for entry, value in parts
        if value.numel() // mesh.features >= LARGE and not lies_by_features(value, entry)
    )
    options: Any = sae.config
    itemsize = max(sae.dtype.itemsize, torch.float32.itemsize)  # bfloat16 trains in float32
    k = int(getattr(options, "k", 0) or 0) if sae.competes_over else 0
    place, rows = torch.device(device), training.train_batch_size_tokens
    with products(training.matmul_precision):
        kernel = _fast_kernel(sae, training, place, mesh)
        screened = _screened(sae, kernel, place, sae.d_sae // mesh.features) if k else None
    return Job(
        split,
        numbers - split,
        *(sae.d_in, sae.d_out, sae.d_sae, rows),
        k=k,
        competes=sae.competes_over,
        moments=(kept or 0) / (numbers * itemsize),
        screened=screened,
        fast=kernel is not None,
        beside=0 if kernel is None else mesh.data * kernel.beside(sae, rows // mesh.data),
        on_gpu=not at_hand(place),
        rounded=training.matmul_precision == "medium" and place.type == "cuda",
        itemsize=itemsize,
        undivided=undivided,
        gathers_rows=gathers_rows,
        vectors=sum(value.dim() == 1 for _, value in parts),
        k_aux=int(getattr(sae, "k_aux", 0)) if getattr(sae, "aux_coefficient", 0) else 0,
        centers=options.apply_b_dec_to_input,
        elementwise=elementwise,
        leaves_weights=kernel is not None and bool(vars(type(kernel)).get("leaves_weights", False)),
    )


def step_bytes(sae: SAEModule, training: TrainingConfig, device: str) -> int:
    """About what a step of one process takes beside parameters, gradients and the optimizer's moments."""
    return int(job_of(sae, training, device).step_bytes(Mesh()))


def _fast_kernel(
    sae: SAEModule, training: TrainingConfig, device: torch.device, mesh: Mesh
) -> StepKernel[SAEModule] | None:
    """The kernel of the architecture that steps go by; None: by autograd."""
    spread = {name for name, size in (("data", mesh.data), ("features", mesh.features)) if size > 1}
    use = Use(
        training=True,
        device=device,
        dtype=sae.dtype,
        asked=training.kernels,
        autocast=training.autocast,
        compiled=training.compile,
        learning=frozenset(name for name, value in sae.named_parameters() if value.requires_grad),
        spread=frozenset(spread),
    )
    kernel, _ = choose(kernels_of(sae, use.device), sae, use, sae._guarded)
    kind = "cpu" if device.type == "cpu" else "meta"  # rows that are on no CPU, for what asks where they are
    dead = torch.zeros(sae.d_sae, dtype=torch.bool, device=kind)
    step = StepInput(step=0, generator=torch.Generator(), dead=dead)
    if kernel is None or kernel.leaves(sae, torch.zeros(1, sae.d_in, device=kind), step):
        return None
    return kernel


def _screened(sae: SAEModule, kernel: object, device: torch.device, own: int) -> str | None:
    """What the encoder's products are looked at in first, of so many features of one process."""
    if not isinstance(kernel, SparseKernel):
        return None
    int8 = sae.kernels == "int8"
    turned = lies_by_features(sae.W_enc, sae.table["W_enc"])
    if not turned or why_no_screen(device, sae.dtype, own, int8) is not None:
        return None
    return "int8" if int8 else "bfloat16"
