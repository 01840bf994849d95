"""Where a run of sae-lens begins: from a saved SAE, and with penalties that rise."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from saekit_plugins.loaders.sae_lens.run_work import Work

__all__ = ["from_saved", "warm_up"]

_START = (
    "decoder_orthogonal_init", "decoder_heuristic_init", "init_encoder_as_decoder_transpose", "b_dec_init_method",
)  # fmt: skip
_KEYS = (*_START, "sae.decoder_init_norm", "decoder_heuristic_init_norm")


def from_saved(work: Work) -> None:
    """A saved SAE is the start, so there is none to choose."""
    work.without(*(f"sae.{name}" for name in _START))
    for key in _KEYS:
        if key in work.given:
            for told in (work.renamed, work.changed, work.lost):
                told.pop(key, None)
            work.dropped[key] = "chooses a start, and training starts from a saved SAE (from_pretrained_path)"
    if work.version >= 6:
        work.lost["from_pretrained_path"] = (
            "the SAE's options, its coefficients, too, are those that the folder states there, and here those of this "
            "file: see that they are the same"
        )


def warm_up(work: Work) -> list[str]:
    """One that is longer than the run ends below its aim there; here a run reaches its aim, which is that.

    Returns the keys whose values are others for it.
    """
    lowered: list[str] = []
    options = dict(work.options)
    tokens, batch = options.get("training.training_tokens"), options.get("training.train_batch_size_tokens")
    if not (_is_number(tokens) and _is_number(batch) and tokens > 0 and batch > 0):  # which is told when it is loaded
        return lowered
    steps = math.ceil(tokens / batch)
    for name in ("l1", "l0"):
        whole, rising = options.get(f"sae.{name}_coefficient"), options.get(f"sae.{name}_warm_up_steps")
        if not (_is_number(whole) and _is_number(rising) and rising > steps):
            continue
        work.without(f"sae.{name}_coefficient", f"sae.{name}_warm_up_steps")
        reached = whole * steps / rising
        work.options += [(f"sae.{name}_coefficient", reached), (f"sae.{name}_warm_up_steps", steps)]
        for part, value in (("coefficient", reached), ("warm_up_steps", steps)):
            key = next(
                key for key in work.given if key.rpartition(".")[2] in (f"l1_{part}", f"l0_{part}") and key in work.said
            )
            lowered.append(key)
            work.changed[key] = (
                f"{work.given[key]} is sae.{name}_{part} = {value:g}: the warm-up is longer than the run of {steps:,} "
                "steps, and this is as far as it gets"
            )
    return lowered


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
