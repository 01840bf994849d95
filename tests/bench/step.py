"""The SAE's training step, and inference, beside those of other libraries and beside one product with the encoder.

    python tests/bench/step.py [--size small large] [--rounds 5]
        [--only standard dense topk batchtopk gated matryoshka inference] [--leave-out reference "sae-lens 3.0.0"]

Every SAE has the same weights and batch, and learns so little that what is active stays active.  Prints figures; it
judges nothing.
"""

from __future__ import annotations

import argparse
import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import figures
import torch
from common import BATCH, Times
from peers import PARTS, K, Step, missing, peer_inference, peer_steps, version
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.optimizers.adam import AdamConfig
from torch import Tensor

import saekit
import saekit.kernels.screen
from saekit.config import SAEConfig
from saekit.runs.benching import encoder_product, resting_trainer
from saekit.sae.build import build_module
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.trainer import SAETrainer

SIZES = {"small": (512, 4096), "large": (768, 24576)}
L0 = 48  # of the standard SAE late in training
CONFIGS: dict[str, Callable[[int], SAEConfig]] = {
    "standard": lambda d_sae: StandardConfig(d_sae=d_sae, l1_coefficient=1e-3, normalize_sae_decoder=False),
    "topk": lambda d_sae: TopKConfig(d_sae=d_sae, k=K),
    "batchtopk": lambda d_sae: BatchTopKConfig(d_sae=d_sae, k=K),
    "gated": lambda d_sae: GatedConfig(
        d_sae=d_sae,
        l1_coefficient=1e-3,
        aux_loss_trains_decoder=True,
        scale_sparsity_penalty_by_decoder_norm=True,
        normalize_sae_decoder=False,
    ),
    "matryoshka": lambda d_sae: MatryoshkaConfig(d_sae=d_sae, k=K, widths=tuple(d_sae // part for part in PARTS)),
}
BY_INT8 = " screened by int8"
WHY_NO_SCREEN = saekit.kernels.screen.why_no_screen


def shared_weights(d_in: int, d_sae: int, x: Tensor, active: float | None) -> dict[str, Tensor]:
    """Unit decoder rows, the encoder their transpose, and a bias that leaves ``active`` features above zero."""
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(1)), dim=1)
    bias = torch.zeros(d_sae)
    if active is not None:
        pre = x[:512] @ decoder.T
        bias -= pre.flatten().topk(int(active * len(pre))).values[-1]
    return {"W_enc": decoder.T.contiguous(), "W_dec": decoder, "b_enc": bias, "b_dec": torch.zeros(d_in)}


def trainer_of(config: SAEConfig, weights: Mapping[str, Tensor]) -> SAETrainer:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, len(weights["b_dec"]), plugins)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("b_mag", "r_mag"):  # magnitudes are those of the gates
                parameter.copy_(weights["b_enc"] * (name == "b_mag"))
            else:
                parameter.copy_(weights["b_enc" if name == "b_gate" else name])
    build = functools.partial(plugins.build, "optimizers", AdamConfig(beta1=0.9))
    return resting_trainer(sae, ScheduledOptimizer(sae.named_parameters(), build, lambda step: 1e-7))


def screens(x: Tensor, d_sae: int) -> list[str]:
    """No screen, and those that this CPU has."""
    there = ((" screened", False), (BY_INT8, True))
    return ["", *(name for name, int8 in there if WHY_NO_SCREEN(x.device, x.dtype, d_sae, int8) is None)]


def with_screen(on: bool, work: Callable[[], object]) -> Step:
    def run() -> object:
        saekit.kernels.screen.why_no_screen = WHY_NO_SCREEN if on else lambda *args: "off"
        return work()

    return run


def case(work: Step) -> Callable[[], int]:
    def run() -> int:
        work()
        return BATCH

    return run


def product(weights: Mapping[str, Tensor], x: Tensor) -> Step:
    return encoder_product(x, weights["W_enc"].T.contiguous())


def own_steps(kind: str, weights: Mapping[str, Tensor], x: Tensor, dense: bool) -> dict[str, Step]:
    d_sae = len(weights["b_enc"])
    steps: dict[str, Step] = {}
    for screen in [""] if dense else screens(x, d_sae):
        trainer = trainer_of(CONFIGS[kind](d_sae), weights)
        trainer.sae.kernels = "int8" if screen == BY_INT8 else "auto"
        steps[f"saekit {kind}{screen}"] = with_screen(
            bool(screen),
            lambda trainer=trainer: trainer.train_on(x),  # type: ignore[misc]
        )
    reference = trainer_of(CONFIGS[kind](d_sae), weights)
    reference.sae.kernels = "reference"
    steps[f"saekit {kind}, kernels = reference"] = lambda: reference.train_on(x)
    return steps


def own_inference(kind: str, weights: Mapping[str, Tensor], x: Tensor) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for screen in screens(x, len(weights["b_enc"])):
        sae = trainer_of(CONFIGS[kind](len(weights["b_enc"])), weights).sae
        sae.kernels = "int8" if screen == BY_INT8 else "auto"

        @torch.no_grad()
        def both(sae: Any = sae) -> None:
            sae.decode(sae.encode(x))

        @torch.no_grad()
        def forward(sae: Any = sae) -> None:
            sae(x)

        @torch.no_grad()
        def sparse(sae: Any = sae) -> None:
            sae.encode_sparse(x)

        steps[f"saekit {kind} encode, decode{screen}"] = with_screen(bool(screen), both)
        steps[f"saekit {kind} encode_sparse{screen}"] = with_screen(bool(screen), sparse)
        steps[f"saekit {kind} forward{screen}"] = with_screen(bool(screen), forward)
    return steps


def compared(title: str, steps: Mapping[str, Step], mm1: Step, rounds: int) -> None:
    """Print the times of ``steps``, and how many times as long as saekit's others take that do the same."""
    print(title, flush=True)
    for work in steps.values():  # buffers are made, and Adam's moments
        work()
    times = Times({"mm1": case(mm1), **{name: case(work) for name, work in steps.items()}}, rounds)
    times.table("mm1", title)
    for name in steps:
        if name.startswith("saekit") and "reference" not in name:
            ratios = {f"{peer} / it": times.ratio(peer, name) for peer in beside(name, [*steps])}
            figures.row(title, name, {**ratios})
            for what, ratio in ratios.items():
                print(f"  {what.removesuffix('it')}{name} = {ratio:.2f}", flush=True)


def beside(name: str, steps: Sequence[str]) -> list[str]:
    """What others do that ``name`` does, by saekit, of all ``steps``; sae-lens's newest first.

    Sparse encoding has the peer's encoding beside it, and a forward has encoding and decoding.
    """
    sparse = "encode_sparse" in name
    peers = [one for one in steps if not one.startswith("saekit") and one.endswith(" encode") == sparse]
    first = f"sae-lens {version('sae-lens')}"
    return sorted(peers, key=lambda one: not one.startswith(first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    names = ["standard", "dense", "topk", "batchtopk", "gated", "matryoshka", "inference"]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="WORDS", help="cases with one of these in the name"
    )
    asked: Any = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    figures.missing(*(name for name in missing() if not any(word in name for word in asked.leave_out)))
    for size in asked.size:
        d_in, d_sae = SIZES[size]
        x = torch.randn(BATCH, d_in, generator=torch.Generator().manual_seed(0))
        for name in asked.only:
            kind = {"dense": "standard", "inference": "standard"}.get(name, name)
            weights = shared_weights(d_in, d_sae, x, {"standard": L0, "inference": L0, "gated": L0}.get(name))
            mm1 = product(weights, x)
            title = f"{d_in:,} → {d_sae:,}, {name}"
            if name == "inference":
                steps = {**peer_inference(kind, weights, x), **own_inference(kind, weights, x)}
            else:
                steps = {
                    **peer_steps(kind, weights, x, asked.leave_out),
                    **own_steps(kind, weights, x, name == "dense"),
                }
            wanted = {name: step for name, step in steps.items() if not any(word in name for word in asked.leave_out)}
            compared(title, wanted, mm1, asked.rounds)


if __name__ == "__main__":
    main()
