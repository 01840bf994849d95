"""Every architecture that trains, with the options whose steps differ, as cases of :mod:`support.processes`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import attrs
from support.golden import FILES, options_of, read
from support.processes import Case

__all__ = ["CASES", "CHOSEN", "FAST", "MESHES", "SIZE", "label"]


def _standard() -> dict[str, Case]:
    def of(training: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **sae: Any) -> Case:
        options = {"name": "standard", "l1_coefficient": 0.05, **sae}
        return Case(options, training or {}, {"name": "adam", **(optimizer or {})})

    fine = {"finetuning_tokens": 240, "training_tokens": 480}
    return {
        "standard": of(),
        "standard_dense_batch": of(mse_loss_normalization="dense_batch"),
        "standard_lp_half": of(lp_norm=0.5),
        "standard_lp_two_by_norms": of(
            lp_norm=2.0, normalize_sae_decoder=False, scale_sparsity_penalty_by_decoder_norm=True
        ),
        "standard_tanh_relu": of(activation="tanh-relu"),
        "standard_no_b_dec": of(apply_b_dec_to_input=False),
        "standard_ghosts": of(use_ghost_grads=True, l1_coefficient=2.0, mse_loss_normalization="dense_batch"),
        "standard_noise": of(noise_scale=0.3),
        "standard_warm_up_strong_clip": of(
            {"lr_warm_up_steps": 10, "lr_decay_steps": 5}, {"clip_grad_norm": 0.1}, l1_warm_up_steps=8
        ),
        "standard_finetuned_scale": of({**fine, "finetuning_method": "scale"}),
        "standard_finetuned_decoder": of({**fine, "finetuning_method": "decoder"}, apply_b_dec_to_input=False),
        "standard_signum": Case({"name": "standard"}, optimizer={"name": "signum", "weight_decay": 0.1}),
        "standard_uneven": Case({"name": "standard", "mse_loss_normalization": "dense_batch"}, uneven=True),
    }


def _largest() -> dict[str, Case]:
    found = {}
    for name in ("topk", "batchtopk", "matryoshka", "abstopk", "groupmax"):
        k = 4 if name in ("topk", "groupmax", "abstopk") else 3.5
        own = {"widths": [3, 10, 20]} if name == "matryoshka" else {}
        found[name] = Case({"name": name, "k": k, "k_aux": 3, **own})
        mixed = {"aux_loss_normalization": "none", "mse_loss_normalization": "variance"}
        mixed |= {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}
        found[f"{name}_in_units"] = Case({"name": name, "k": k, "aux_loss_coefficient": 0.5, **mixed, **own})
        if name != "groupmax":
            moving = {"k_start": 8, "k_warm_up_steps": 12, "aux_loss_normalization": "share"}
            found[f"{name}_uneven"] = Case({"name": name, "k": k, **moving, **own}, uneven=True)
    found["topk_decoder_alone"] = Case({"name": "topk", "k": 4, "aux_loss_trains_encoder": False, "k_aux": 30})
    found["matryoshka_whole"] = Case(
        {"name": "matryoshka", "k": 3, "widths": [0.25], "aux_loss_levels": "whole", "level_loss": "mean"}
    )
    return found


def _others() -> dict[str, Case]:
    jump = {"name": "jumprelu", "initial_threshold": 0.1, "bandwidth": 0.8}
    several: dict[str, Any] = {"widths": (4, 6)}
    return {
        "jumprelu": Case({**jump, "pre_act_loss_coefficient": 0.1, "l0_warm_up_steps": 4}),
        "jumprelu_target_l0": Case({**jump, "sparsity_loss": "target_l0", "target_l0": 5.0}, uneven=True),
        "jumprelu_tanh": Case({**jump, "sparsity_loss": "tanh", "ste_to_input": False, "k_aux": 2}),
        "gated": Case({"name": "gated", "l1_coefficient": 0.2}),
        "gated_as_sae_lens": Case(
            {
                "name": "gated", "normalize_sae_decoder": False, "scale_sparsity_penalty_by_decoder_norm": True,
                "aux_loss_trains_decoder": True,
            }, uneven=True,
        ),
        "crosscoder": Case({"name": "crosscoder", "l1_coefficient": 0.3}, **several),
        "crosscoder_l2": Case({"name": "crosscoder", "decoder_norm": "l2", "apply_b_dec_to_input": True}, **several),
        "batchtopk_crosscoder": Case({"name": "batchtopk_crosscoder", "k": 3.0}, **several),
        "transcoder_skip": Case({"name": "transcoder", "skip_connection": True}, reads=1, **several),
        "topk_transcoder_in_units": Case(
            {"name": "topk_transcoder", "k": 4, "skip_connection": True, "mse_loss_normalization": "variance"},
            reads=1, **several,
        ),
        "jumprelu_transcoder": Case({**jump, "name": "jumprelu_transcoder"}, reads=1, **several),
        "groupmax_transcoder": Case({"name": "groupmax_transcoder", "k": 4}, reads=1, **several),
    }  # fmt: skip


def _golden() -> dict[str, Case]:
    """The options of every file of ``tests/golden``, and its batches."""
    found = {}
    for name, path in FILES.items():
        file = read(path)
        options, (steps, rows, _) = options_of(file), file.tensors["batches"].shape
        found[f"golden_{name}"] = Case(
            {"name": "standard", **options.sae}, {**options.training, "verbose": False},
            {"name": "adam", **options.optimizer}, options.lr_schedule,
            golden=name, widths=(options.d_in,), rows=rows, d_sae=options.sae["d_sae"], steps=steps,
        )  # fmt: skip
    return found


CASES: dict[str, Case] = {**_standard(), **_largest(), **_others(), **_golden()}
"""By plain torch, in float64."""


def _fast() -> dict[str, Case]:
    """Those that have fast kernels, by these, where they take every step."""
    chosen = {
        name: case
        for name, case in CASES.items()
        if not case.sae.get("use_ghost_grads")
        and case.sae["name"] not in ("groupmax", "groupmax_transcoder", "abstopk")
    }
    return {f"{name}_fast": attrs.evolve(case, fast=True) for name, case in chosen.items()}


def _large() -> dict[str, Case]:
    """Of several chunks of rows, as runs are: sparse products, and a first look in bfloat16 where there is one."""
    size: dict[str, Any] = {"rows": 1400, "d_sae": 2048, "steps": 3, "widths": (16,), "fast": True}
    size["training"] = {"finetuning_tokens": 0}
    found = {
        "large_topk": Case({"name": "topk", "k": 8}, **size),
        "large_batchtopk": Case({"name": "batchtopk", "k": 8.0}, uneven=True, **size),
        "large_standard": Case({"name": "standard", "l1_coefficient": 1.0}, **size),
        "large_jumprelu": Case({"name": "jumprelu", "initial_threshold": 2.0, "bandwidth": 0.5}, **size),
        "large_target_l0": Case(
            {"name": "jumprelu", "initial_threshold": 3.0, "sparsity_loss": "target_l0", "target_l0": 9.0},
            lopsided=True,
            **size,
        ),
        "large_lp_two": Case({"name": "standard", "lp_norm": 2.0}, lopsided=True, **size),
        "large_gated": Case({"name": "gated", "aux_loss_trains_decoder": True}, lopsided=True, **size),
    }
    # Whose rows are less to send than gradients, in float32, where all of these lie by features.
    wide: dict[str, Any] = {"rows": 64, "d_sae": 4096, "steps": 20, "widths": (48,), "fast": True}
    wide["training"] = {"dead_feature_window": 10**6}
    found |= {
        "wide_topk": Case({"name": "topk", "k": 8}, **wide),
        "wide_batchtopk": Case({"name": "batchtopk", "k": 8.0}, **wide),
        "wide_jumprelu": Case({"name": "jumprelu", "initial_threshold": 2.5, "bandwidth": 0.5}, **wide),
    }
    return found | {f"{name}_float32": attrs.evolve(case, dtype="float32") for name, case in found.items()}


FAST: dict[str, Case] = {**_fast(), **_large()}
"""By the fast kernels where there are any for features that are split, in float64; some in float32."""

OF_EVERY_CHANGE = (
    "standard_ghosts", "standard_noise", "standard_finetuned_scale", "standard_lp_half", "topk_uneven", "batchtopk",
    "groupmax_in_units", "matryoshka_uneven_fast", "jumprelu_target_l0", "gated_as_sae_lens", "batchtopk_crosscoder",
    "topk_transcoder_in_units_fast", "jumprelu_fast", "large_batchtopk", "large_topk_float32", "large_target_l0",
    "wide_topk_float32", "large_lp_two", "large_gated", "golden_mixed_finetune_unrotated_decoder_ghost",
)  # fmt: skip
"""The cases that two processes of every change are compared on."""

EVERY = os.environ.get("SAEKIT_PROCESSES")
"""``2`` or ``4``: so many processes, and every case; else two, and those of every change."""
SIZE = int(EVERY or 2)
MESHES = [(2, 1), (1, 2)] if SIZE == 2 else [(2, 2), (4, 1), (1, 4)]
"""Processes along data, and along features."""


def _chosen(name: str, case: Case) -> Iterator[tuple[str, Case]]:
    if EVERY:
        yield name, case
    elif name in OF_EVERY_CHANGE:  # in fewer steps, where nothing depends on their number
        fixed = case.golden is not None or "training_tokens" in case.training
        yield name, case if fixed else attrs.evolve(case, steps=min(case.steps, 8))


CHOSEN = dict(one for name, case in {**CASES, **FAST}.items() for one in _chosen(name, case))
"""Those that are compared."""


def label(name: str, data: int, features: int) -> str:
    """Of a case on a mesh."""
    return f"{name} {data}x{features}"
