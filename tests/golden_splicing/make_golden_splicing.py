"""Makes ``tests/golden_splicing/`` with sae-lens 3.0.0, in an environment that has it.

``sae_lens_3.safetensors`` holds what the calls of ``calls.py`` beside it gave, ``sae_lens_3.json`` the
names of what was attached, cached and hooked.  A folder may be given in place of this one.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import calls
from sae_lens import SAE, HookedSAETransformer
from sae_lens.sae import SAEConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent


def sae_of(name: str, hook: str, d_sae: int, error_term: bool) -> Any:
    config = SAEConfig(
        d_in=calls.D_IN, d_sae=d_sae, activation_fn_str="relu", apply_b_dec_to_input=True,
        finetuning_scaling_factor=False, context_size=8, model_name="custom", hook_name=hook, hook_layer=0,
        hook_head_index=None, prepend_bos=True, dataset_path="", normalize_activations=False, dtype="float32",
        device="cpu", sae_lens_training_version=None,
    )  # fmt: skip
    return calls.filled(SAE(config, use_error_term=error_term), name)


def main(folder: Path) -> None:
    assert version("sae-lens") == "3.0.0"
    logging.disable(logging.WARNING)
    tensors, others = calls.results(HookedSAETransformer, sae_of)
    save_file(tensors, folder / "sae_lens_3.safetensors")
    (folder / "sae_lens_3.json").write_text(json.dumps(others, indent=0) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
