"""Recovery of true features: 5 in 2 dimensions, and 100 in 20 beside an SAE that started at the true directions.

``python tests/bench/toy_models.py``; the numbers of docs/toy-models.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import row
from torch.nn.functional import normalize

import saekit
from saekit.toy import Recovery, ToyConfig, ToyModel, measure_recovery, train_toy_model


def trained(folder: Path, toy: Path, sae: dict[str, Any], steps: int, lr: float, **options: Any) -> saekit.SAE:
    """By the ordinary trainer, in batches of 1024."""
    training = {"training_tokens": steps * 1024, "train_batch_size_tokens": 1024, "lr": lr, "verbose": False,
                "lr_decay_steps": steps // 2, "device": "cpu"}  # fmt: skip
    transform = options.pop("normalize_activations", None)
    activations = {"source": {"name": "toy", "path": str(toy)}, "normalize_activations": transform}
    return saekit.train(
        {
            "model": {"backend": "none"},
            "activations": activations,
            "site": {"hook_name": "hidden"},
            "sae": sae,
            "evals": {"run": [], "held_out_every": 0},
            "training": training | options,
            "checkpoints": {"folder": str(folder)},
            "reports": {"pictures": False},
        }
    ).sae


def show(table: str, what: str, found: Recovery, seconds: float) -> None:
    told = {"MMCS": found.mmcs, "precision": found.precision, "recall": found.recall, "L0": found.l0}
    row(table, what.strip(), told | {"true L0": found.true_l0, "seconds": seconds})
    print(
        f"{what:44} MMCS {found.mmcs:.3f}  of found {found.mmcs_of_found:.3f}  precision {found.precision:.3f}  "
        f"recall {found.recall:.3f}  L0 {found.l0:.2f} of {found.true_l0:.2f}  silent {found.silent}  {seconds:.1f} s",
        flush=True,
    )


def five_in_two(folder: Path, seeds: int) -> None:
    start = time.perf_counter()
    model = train_toy_model(ToyConfig(feature_probability=0.02, steps=1000, lr_decay_steps=500)).model
    toy = model.save(folder / "five.safetensors")
    print(f"5 in 2, each firing in 2 % of rows: the toy model took {time.perf_counter() - start:.1f} s")
    for d_sae in (5, 10):
        sae = {"name": "standard", "d_sae": d_sae, "l1_coefficient": 10.0}
        for seed in range(seeds):
            for steps in (1, 400):
                start = time.perf_counter()
                found = trained(
                    folder, toy, sae, steps, 1e-2, seed=seed, normalize_activations="expected_average_only_in"
                )
                what = f"  {d_sae} features, seed {seed}, {'trained' if steps > 1 else 'untrained'}"
                show("5 in 2", what, measure_recovery(found, model), time.perf_counter() - start)


def hundred_in_twenty(folder: Path, chance: float, steps: int, seeds: int) -> None:
    start = time.perf_counter()
    config = ToyConfig(
        n_features=100, n_hidden=20, feature_probability=chance, steps=1000, lr_decay_steps=1000, batch_size=512
    )
    model = train_toy_model(config).model
    toy = model.save(folder / "hundred.safetensors")
    table = "100 in 20"
    print(f"{table}, each firing in {chance:.0%} of rows: the toy model took {time.perf_counter() - start:.1f} s")
    sae = {"name": "topk", "d_sae": 100, "k": round(100 * chance)}
    for seed in range(seeds):
        start = time.perf_counter()
        found = measure_recovery(trained(folder, toy, sae, steps, 3e-2, seed=seed), model)
        show(table, f"  seed {seed}", found, time.perf_counter() - start)
        at_truth = measure_recovery(trained(folder, toy, sae, steps, 3e-2, seed=seed,
                                            from_pretrained_path=str(_true(folder, sae, model))), model)  # fmt: skip
        show(table, f"  seed {seed}, started at the true directions", at_truth, 0)
        print(f"  ratio of MMCS {found.mmcs / at_truth.mmcs:.3f}", flush=True)


@torch.no_grad()
def _true(folder: Path, options: dict[str, Any], model: ToyModel) -> Path:
    sae = saekit.SAE.from_dict({**options, "d_in": 20}, device="cpu")
    directions = normalize(model.directions, dim=1)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(directions.T)
    sae.save(folder / "true")
    return folder / "true"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        five_in_two(Path(place), given.seeds)
        hundred_in_twenty(Path(place), 0.02, given.steps, given.seeds)
