"""Makes ``tests/golden_splicing/sae_lens_3_faults.json``: what known faults of sae-lens 3.0.0 give, in an environment
that has it.

The model is that of ``calls.py`` beside it.  By the faults' numbers: an error in words, a loss, logits, or
what was counted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import calls
import torch
from sae_lens import SAE, HookedSAETransformer
from sae_lens.evals import get_recons_loss, run_evals
from sae_lens.sae import SAEConfig
from sae_lens.training.training_sae import TrainingSAE, TrainingSAEConfig

HERE = Path(__file__).parent

STORE = SimpleNamespace(normalize_activations=False)


def base(hook: str, d_in: int, d_sae: int, head: int | None = None) -> dict[str, Any]:
    return {
        "d_in": d_in, "d_sae": d_sae, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "context_size": 8, "model_name": "custom", "hook_name": hook,
        "hook_layer": 1, "hook_head_index": head, "prepend_bos": True, "dataset_path": "",
        "normalize_activations": False, "dtype": "float32", "device": "cpu", "sae_lens_training_version": None,
    }  # fmt: skip


def trained(hook: str, d_in: int, name: str, head: int | None = None) -> Any:
    """As evals of a run have it."""
    more: dict[str, Any] = {
        "l1_coefficient": 1.0, "lp_norm": 1.0, "use_ghost_grads": False, "normalize_sae_decoder": True,
        "noise_scale": 0.0, "decoder_orthogonal_init": False, "mse_loss_normalization": None,
    }  # fmt: skip
    sae = TrainingSAE(TrainingSAEConfig(**base(hook, d_in, calls.D_SAE_OF_HEAD, head), **more))
    return calls.filled(sae, name).eval()


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it works")


def fault_5() -> dict[str, Any]:
    sae, model = trained(calls.Q, 4, "head", head=1), calls.model_of(HookedSAETransformer)
    return {"error": error_of(lambda: get_recons_loss(sae, model, calls.TOKENS, STORE))}


def fault_6() -> dict[str, Any]:
    sae, model = trained(calls.Q, 4, "head", head=1), calls.model_of(HookedSAETransformer)
    sae.decoder = sae.decode  # so that fault 5 does not come first
    return {"ce_loss_with_ablation": get_recons_loss(sae, model, calls.TOKENS, STORE)[3].item()}


def fault_7() -> dict[str, Any]:
    model = calls.model_of(HookedSAETransformer)
    whole, head = trained(calls.Z, 8, "heads"), trained(calls.Z, 4, "head", head=1)
    _, _, with_sae, _ = get_recons_loss(head, model, calls.TOKENS, STORE)
    return {
        "error": error_of(lambda: get_recons_loss(whole, model, calls.TOKENS, STORE)),
        "ce_loss_with_sae": with_sae.item(),
    }


def fault_8() -> dict[str, Any]:
    sae = calls.filled(SAE(SAEConfig(**base(calls.Q, 4, calls.D_SAE_OF_HEAD, 1))), "head")
    model = calls.model_of(HookedSAETransformer)
    return {"logits": model.run_with_saes(calls.TOKENS, saes=[sae]).tolist()}


def fault_9() -> dict[str, Any]:
    model = calls.model_of(HookedSAETransformer)
    forward, without, taken = model.forward, [], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        without.append("padding_side" not in kwargs)
        return forward(*args, **kwargs)

    def tokens(size: int | None) -> torch.Tensor:
        taken.append(size)
        return calls.TOKENS

    model.forward = watched
    store = SimpleNamespace(normalize_activations=False, get_batch_tokens=tokens)
    kwargs = {"padding_side": "right"}
    run_evals(trained(calls.RESID, 8, "x"), store, model, n_eval_batches=2, model_kwargs=kwargs)
    return {"forwards": len(without), "forwards_without_kwargs": sum(without), "batches_of_training_taken": len(taken)}


def fault_26() -> dict[str, Any]:
    def sae_of(name: str, d_sae: int) -> Any:
        return calls.filled(SAE(SAEConfig(**base(calls.RESID, 8, d_sae))), name)

    model, seen = calls.model_of(HookedSAETransformer), []
    kept, first, second = sae_of("m", 20), sae_of("a", 20), sae_of("other_a", 12)
    model.add_hook(calls.RESID, lambda x, hook: seen.append(hook.name), is_permanent=True)
    model.add_sae(kept)
    with model.saes(saes=[first, second]):
        pass
    logits = model(calls.TOKENS).tolist()
    model.reset_saes()
    model(calls.TOKENS)
    return {"logits_afterwards": logits, "permanent_hook_ran": len(seen)}


def main(folder: Path) -> None:
    assert version("sae-lens") == "3.0.0"
    logging.disable(logging.WARNING)
    faults = {"5": fault_5, "6": fault_6, "7": fault_7, "8": fault_8, "9": fault_9, "26": fault_26}
    with torch.no_grad():
        found = {number: fault() for number, fault in faults.items()}
    (folder / "sae_lens_3_faults.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
