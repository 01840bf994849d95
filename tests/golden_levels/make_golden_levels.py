"""Makes ``tests/golden_levels/`` with sae-lens 6.54.12 and dictionary_learning 0.1.0, in an environment that has both.

In float64.  Steps of sae-lens, and those of dictionary_learning's gated SAE, are its own trainer's.  Of its Matryoshka
SAE the loss is; what follows is done here, as its own projection has rows of norm ``1 − 1e-6``: the gradient's part
along decoder rows is removed, its norm clipped at 1, and after Adam's step rows are brought back to norm 1.  Its loss
rounds to float32 in between, which is switched off.

Each file holds the SAE before and after, what was logged at each step, and of sae-lens what it saves and computes from
that.  The batches are a part of those in ``golden_topk/``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
D_IN, D_SAE, ROWS = 16, 48, 48
SCALED = {"normalize_activations": "expected_average_only_in"}
TRAINING: dict[str, Any] = {"lr": 2e-3, "adam_beta1": 0.9, "dead_feature_window": 1000}
LEVELS = {"k": 5, "matryoshka_widths": [6, 18, 48]}
SAE_LENS: dict[str, dict[str, Any]] = {
    "gated_plain": {"l1_coefficient": 0.7},
    "gated_warm_up": {"l1_coefficient": 2.0, "l1_warm_up_steps": 9, "lr": 1e-2},
    "gated_no_b_dec_to_input": {"l1_coefficient": 1.0, "apply_b_dec_to_input": False},
    "gated_activations_scaled": {"l1_coefficient": 1.0, **SCALED},
    "matryoshka_plain": LEVELS,
    "matryoshka_norms_not_counted": {**LEVELS, "rescale_acts_by_decoder_norm": False},
    "matryoshka_dead": {**LEVELS, "k": 2, "dead_feature_window": 1, "lr": 1e-2},
    "matryoshka_dead_by_level": {
        **LEVELS, "k": 2, "dead_feature_window": 1, "lr": 1e-2, "use_matryoshka_aux_loss": True,
    },
    "matryoshka_activations_scaled": {**LEVELS, "dead_feature_window": 3, **SCALED},
}  # fmt: skip
DICTIONARY_LEARNING: dict[str, dict[str, Any]] = {
    "gated_dictionary_learning": {"l1_penalty": 0.4, "sparsity_warmup_steps": 7},
    "matryoshka_dictionary_learning": {"k": 5, "group_fractions": [0.125, 0.25, 0.625], "dead_after": 1},
    "matryoshka_dictionary_learning_weights": {
        "k": 3, "group_fractions": [0.25, 0.25, 0.5], "group_weights": [0.5, 0.0, 2.0], "dead_after": 3,
    },
}  # fmt: skip

Traces = dict[str, list[float]]


def by_sae_lens(name: str, changed: dict[str, Any], batches: torch.Tensor) -> tuple[dict[str, torch.Tensor], Traces]:
    training = {key: changed.get(key, value) for key, value in TRAINING.items()}
    options = {key: value for key, value in changed.items() if key not in TRAINING}
    size = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "device": "cpu"}
    sae: Any = (
        GatedTrainingSAE(GatedTrainingSAEConfig(**size, **options))
        if name.startswith("gated")
        else MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**size, **options))
    )
    stir(sae)
    samples = len(batches) * ROWS
    config = SAETrainerConfig(
        total_training_samples=samples, train_batch_size_samples=ROWS, lr_end=training["lr"] / 10, **training
    )
    trainer: Any = SAETrainer(config, sae, iter(batches))
    if options.get("normalize_activations"):
        trainer.activation_scaler.scaling_factor = 1.7
    tensors, traces = weights(sae, "init"), Traces()
    for batch in batches:
        dead = int(trainer.dead_neurons.sum())
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        step = {key: float(value) for key, value in output.losses.items()}
        step |= {"loss": float(output.loss), "l0": float((output.feature_acts > 0).sum()) / ROWS, "dead_features": dead}
        if hasattr(sae, "topk_threshold"):
            step["topk_threshold"] = float(sae.topk_threshold)
        trace(traces, step)
    tensors |= weights(sae, "final")
    if options.get("normalize_activations"):
        sae.fold_activation_norm_scaling_factor(1.7)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = load_file(f"{folder}/sae_weights.safetensors")
        peer = sae_lens.SAE.load_from_disk(folder)
    tensors |= {f"saved.{key}": value for key, value in saved.items()}
    return tensors | {"features": peer.encode(batches[0]).detach(), "output": peer(batches[0]).detach()}, traces


def by_dictionary_learning(
    name: str, options: dict[str, Any], batches: torch.Tensor
) -> tuple[dict[str, torch.Tensor], Traces]:
    stand_in: Any = sys.modules.setdefault("nnsight", types.ModuleType("nnsight"))
    stand_in.LanguageModel = object  # which its package imports, and no trainer uses
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    kind: Any = GatedSAETrainer if name.startswith("gated") else MatryoshkaBatchTopKTrainer
    given = {key: value for key, value in options.items() if key != "dead_after"}
    trainer = kind(
        steps=len(batches), activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="", lr=2e-3, warmup_steps=0,
        device="cpu", **given,
    )  # fmt: skip
    trainer.ae.double()
    stir(trainer.ae)
    if kind is MatryoshkaBatchTopKTrainer:
        trainer.dead_feature_threshold, trainer.threshold_start_step = options["dead_after"] * ROWS, 10**9
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    renormalize(trainer.ae.W_dec if kind is MatryoshkaBatchTopKTrainer else trainer.ae.decoder.weight.T)
    tensors, traces, dead = weights(trainer.ae, "init"), Traces(), []
    adam = torch.optim.Adam(trainer.ae.parameters(), lr=2e-3, betas=(0.9, 0.999))
    for number, batch in enumerate(batches):
        if kind is GatedSAETrainer:
            trace(traces, trainer.loss(batch, step=number, logging=True).losses)
            trainer.update(number, batch)
            continue
        found = trainer.loss(batch, step=number, logging=True)
        trainer.num_tokens_since_fired -= ROWS  # the second look counts the same tokens
        loss = trainer.loss(batch, step=number)
        dead.append(trainer.num_tokens_since_fired >= trainer.dead_feature_threshold)
        trace(traces, {**found.losses, "dead_features": float(dead[-1].sum())})
        loss.backward()
        W_dec = trainer.ae.W_dec
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(trainer.ae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        renormalize(W_dec)
    if dead:
        tensors["dead"] = torch.stack(dead)
    return tensors | weights(trainer.ae, "final"), traces


def stir(sae: torch.nn.Module) -> None:
    """So that no weight is like another."""
    with torch.no_grad():
        for value in sae.parameters():
            value += 0.05 * torch.randn_like(value)


@torch.no_grad()
def renormalize(rows: torch.Tensor) -> None:
    rows /= rows.norm(dim=1, keepdim=True)


def weights(sae: torch.nn.Module, when: str) -> dict[str, torch.Tensor]:
    return {f"{when}.{key}": value.detach().clone() for key, value in sae.named_parameters()}


def trace(traces: Traces, step: dict[str, float]) -> None:
    for key, value in step.items():
        traces.setdefault(key, []).append(value)


def main() -> None:
    batches = load_file(HERE.with_name("golden_topk") / "batches.safetensors")["batches"].double()[:, :ROWS, :D_IN]
    batches = batches.contiguous()
    for cases, make in ((SAE_LENS, by_sae_lens), (DICTIONARY_LEARNING, by_dictionary_learning)):
        for name, options in cases.items():
            torch.manual_seed(len(name))
            tensors, traces = make(name, dict(options), batches)
            tensors |= {f"trace.{key}": torch.tensor(values, dtype=torch.float64) for key, values in traces.items()}
            peers = ", ".join(f"{peer} {version(peer)}" for peer in ("sae-lens", "dictionary-learning"))
            metadata = {"made_with": peers, "config": json.dumps(options)}
            contiguous = {key: value.contiguous() for key, value in tensors.items()}
            save_file(contiguous, HERE / f"{name}.safetensors", metadata)
            dead = [int(value) for value in traces.get("dead_features", [0])]
            print(f"{name}: loss {traces['loss'][0]:.4f} to {traces['loss'][-1]:.4f}, dead {min(dead)} to {max(dead)}")


if __name__ == "__main__":
    main()
