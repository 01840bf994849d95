"""sae-lens 3.0.0's training step, in a process of its own, since no other version fits beside it.

Reads the weights and the batch from a folder, says ``ready``, and then makes a step for every line and says ``done``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sae_lens import __version__
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.training_sae import TrainingSAE, TrainingSAEConfig
from safetensors.torch import load_file


def trainer(d_in: int, d_sae: int, batch: int) -> SAETrainer:
    config = LanguageModelSAERunnerConfig(
        hook_name="blocks.0.hook_resid_post", hook_layer=0, d_in=d_in, expansion_factor=d_sae // d_in,
        l1_coefficient=1e-3, lr=1e-7, adam_beta1=0.9, train_batch_size_tokens=batch, training_tokens=10**9,
        log_to_wandb=False, device="cpu", dtype="float32", verbose=False, n_checkpoints=0, checkpoint_path="/tmp",
    )  # fmt: skip
    sae = TrainingSAE(TrainingSAEConfig.from_dict(config.get_training_sae_cfg_dict()))
    return SAETrainer(model=None, sae=sae, activation_store=None, save_checkpoint_fn=None, cfg=config)


def main() -> None:
    given = load_file(Path(sys.argv[1]) / "given.safetensors")
    torch.set_num_threads(int(sys.argv[2]))
    x = given.pop("x")
    d_in, d_sae = given["W_enc"].shape
    made = trainer(d_in, d_sae, len(x))
    with torch.no_grad():
        for name, value in given.items():
            getattr(made.sae, name).copy_(value)
    print(f"ready {__version__}", flush=True)
    for _ in sys.stdin:
        made._train_step(sae=made.sae, sae_in=x)
        print("done", flush=True)


if __name__ == "__main__":
    main()
