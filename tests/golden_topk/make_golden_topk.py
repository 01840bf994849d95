"""Makes ``tests/golden_topk/`` with sae-lens 6.54.12, in an environment that has it.

The steps are its own trainer's, in float64.

Each file holds the SAE before and after, what was logged at each step, and what the peer saves and then computes from
what it saved.  The batches are rows of ``golden/plain.safetensors``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
STEPS, BATCH = 24, 64
COMMON: dict[str, Any] = {"d_in": 32, "d_sae": 128, "dtype": "float64", "device": "cpu"}
TRAINING: dict[str, Any] = {"lr": 2e-3, "adam_beta1": 0.9, "dead_feature_window": 1000}
CASES: dict[str, dict[str, Any]] = {
    "topk_plain": {"k": 6},
    "topk_norms_not_counted": {"k": 6, "rescale_acts_by_decoder_norm": False},
    "topk_few_dead": {"k": 16, "dead_feature_window": 2, "lr": 2e-2},
    "topk_many_dead": {"k": 2, "dead_feature_window": 1, "aux_loss_coefficient": 0.5, "adam_beta1": 0.0},
    "topk_no_b_dec_to_input": {"k": 5, "dead_feature_window": 1, "apply_b_dec_to_input": False},
    "topk_activations_scaled": {"k": 6, "normalize_activations": "expected_average_only_in"},
    "batchtopk_plain": {"k": 6},
    "batchtopk_fraction": {"k": 3.37, "topk_threshold_lr": 0.2},
    "batchtopk_norms_not_counted": {"k": 6, "rescale_acts_by_decoder_norm": False},
    "batchtopk_many_dead": {"k": 2, "dead_feature_window": 1, "lr": 1e-2},
    "batchtopk_activations_scaled": {
        "k": 6,
        "dead_feature_window": 3,
        "normalize_activations": "expected_average_only_in",
    },
}


def make(name: str, changed: dict[str, Any], batches: torch.Tensor) -> None:
    training = {key: changed.get(key, value) for key, value in TRAINING.items()}
    options = {key: value for key, value in changed.items() if key not in TRAINING}
    kinds: Any = (TopKTrainingSAEConfig, TopKTrainingSAE)
    if name.startswith("batch"):
        kinds = (BatchTopKTrainingSAEConfig, BatchTopKTrainingSAE)
    torch.manual_seed(len(name))
    sae = kinds[1](kinds[0](**COMMON, **options))
    with torch.no_grad():
        sae.W_enc += 0.02 * torch.randn_like(sae.W_enc)  # so that it is not the decoder's transpose
        sae.W_dec *= 1 + torch.rand(len(sae.W_dec), 1, dtype=torch.float64)
        sae.b_enc += 0.05 * torch.randn_like(sae.b_enc)
        sae.b_dec += 0.05 * torch.randn_like(sae.b_dec)
    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr_end=training["lr"] / 10, **training
    )
    trainer = SAETrainer(config, sae, iter(batches))
    if options.get("normalize_activations"):
        trainer.activation_scaler.scaling_factor = 1.7
    tensors = {f"init.{key}": value.detach().clone() for key, value in sae.named_parameters()}
    traces: dict[str, list[float]] = {}
    for batch in batches:
        dead = int(trainer.dead_neurons.sum())
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        step = {key: float(value) for key, value in output.losses.items()}
        step |= {
            "loss": float(output.loss),
            "l0": float((output.feature_acts > 0).sum()) / BATCH,
            "dead_features": dead,
        }
        if hasattr(sae, "topk_threshold"):
            step["topk_threshold"] = float(sae.topk_threshold)
        for key, value in step.items():
            traces.setdefault(key, []).append(value)
    tensors |= {f"trace.{key}": torch.tensor(values, dtype=torch.float64) for key, values in traces.items()}
    tensors |= {f"final.{key}": value.detach().clone() for key, value in sae.named_parameters()}
    if options.get("normalize_activations"):
        sae.fold_activation_norm_scaling_factor(1.7)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        tensors |= {f"saved.{key}": value for key, value in load_file(f"{folder}/sae_weights.safetensors").items()}
        peer = sae_lens.SAE.load_from_disk(folder)
        tensors["features"] = peer.encode(batches[0]).detach()
        tensors["output"] = peer(batches[0]).detach()
    metadata = {"made_with": f"sae-lens {sae_lens.__version__}", "config": json.dumps({**training, **options})}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors", metadata)
    dead = [int(value) for value in traces["dead_features"]]
    print(f"{name}: loss {traces['loss'][0]:.4f} to {traces['loss'][-1]:.4f}, dead {min(dead)} to {max(dead)}")


def main() -> None:
    rows = load_file(HERE.with_name("golden") / "plain.safetensors")["batches"].flatten(0, 1).double()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH]
    batches = rows[order].reshape(STEPS, BATCH, -1)
    save_file({"batches": batches.float().contiguous()}, HERE / "batches.safetensors")
    for name, changed in CASES.items():
        make(name, changed, batches)


if __name__ == "__main__":
    main()
