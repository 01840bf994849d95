"""The training steps and the inference of other libraries, on weights and activations that all share.

Each is made by its own code.  What is not installed is named and left out.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import WORKERS
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["PARTS", "K", "missing", "peer_inference", "peer_steps", "version"]

K = 32
PARTS = (16, 8, 4, 2)
"""The levels of a Matryoshka SAE end at the number of features divided by these, and at all of them."""
_LR = 1e-7  # so that what is active stays active
_NEEDED = {"sae-lens": "sae_lens", "eai-sparsify": "sparsify", "dictionary-learning": "dictionary_learning"}
_WORKER = Path(__file__).parent / "sae_lens_3_worker.py"
_SAE_LENS_3 = os.environ.get("SAEKIT_BENCH_SAE_LENS_3", "")

Weights = Mapping[str, Tensor]
Step = Callable[[], object]


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """What cannot be compared with."""
    return [name for name in _NEEDED if version(name) is None] + ([] if _SAE_LENS_3 else ["sae-lens 3.0.0"])


def peer_steps(kind: str, weights: Weights, x: Tensor, leave_out: Sequence[str] = ()) -> dict[str, Step]:
    """For a ``kind`` of :data:`step.CONFIGS`: steps on ``x [n, d_in]`` by the name of what makes them.

    Those with one of the words ``leave_out`` in their name are not made.
    """
    there: dict[str, Callable[[], Step]] = {}
    if version("sae-lens"):
        there[f"sae-lens {version('sae-lens')} {kind}"] = lambda: _sae_lens(kind, weights, x)
    if kind == "standard" and _SAE_LENS_3:
        there["sae-lens 3.0.0 standard"] = lambda: _sae_lens_3(weights, x)
    if kind == "topk" and version("eai-sparsify"):
        there[f"sparsify {version('eai-sparsify')} topk"] = lambda: _sparsify(weights, x)
    if kind == "topk" and version("dictionary-learning"):
        there[f"dictionary_learning {version('dictionary-learning')} topk"] = lambda: _dictionary_learning(weights, x)
    return {name: make() for name, make in there.items() if not any(word in name for word in leave_out)}


def _sae_lens(kind: str, weights: Weights, x: Tensor) -> Step:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae, device = _sae_lens_sae(kind, weights), str(x.device)
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=len(x), lr=_LR, lr_end=_LR, device=device
    )
    trainer = SAETrainer(config, sae, iter([]))

    def step() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def _sae_lens_sae(kind: str, weights: Weights) -> Any:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    d_in, d_sae = weights["W_enc"].shape
    size = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": str(weights["W_enc"].device)}
    sae: Any = {
        "standard": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**size, l1_coefficient=1e-3)),
        "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=K)),
        "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=K)),
        "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(**size, l1_coefficient=1e-3)),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**size, k=K, matryoshka_widths=[d_sae // part for part in (*PARTS, 1)])
        ),
    }[kind]()
    own = dict(weights)
    if kind == "gated":
        own["b_gate"] = own["b_mag"] = own.pop("b_enc")
    with torch.no_grad():
        for name, value in own.items():
            getattr(sae, name).copy_(value)
    return sae


def _sae_lens_3(weights: Weights, x: Tensor) -> Step:
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: value.contiguous() for name, value in {**weights, "x": x}.items()}
        save_file(tensors, Path(folder) / "given.safetensors")
        worker = subprocess.Popen(
            [_SAE_LENS_3, "-W", "ignore", str(_WORKER), folder, str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        if not worker.stdout.readline().startswith("ready 3.0.0"):
            raise SystemExit(f"{_SAE_LENS_3} cannot run the step of sae-lens 3.0.0")
    WORKERS.append(worker.pid)
    stdin, stdout = worker.stdin, worker.stdout

    def step() -> None:
        stdin.write("step\n")
        stdin.flush()
        stdout.readline()

    return step


def _sparsify(weights: Weights, x: Tensor) -> Step:
    """Its modules in the order of its trainer, with torch's Adam, which takes the same time for everybody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

    d_in, d_sae = weights["W_enc"].shape
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=K), device=x.device)
    with torch.no_grad():
        sae.encoder.weight.copy_(weights["W_enc"].T)
        sae.encoder.bias.copy_(weights["b_enc"])
        sae.W_dec.copy_(weights["W_dec"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=_LR, fused=True)

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dictionary_learning(weights: Weights, x: Tensor) -> Step:
    stand_in: Any = types.ModuleType("nnsight")  # which its package imports and its trainers do not use
    stand_in.LanguageModel = object
    sys.modules.setdefault("nnsight", stand_in)
    from dictionary_learning.trainers.top_k import TopKTrainer

    d_in, d_sae = weights["W_enc"].shape
    trainer = TopKTrainer(10**6, d_in, d_sae, K, layer=0, lm_name="", lr=_LR, device=str(x.device))
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(weights["W_enc"].T)
        trainer.ae.encoder.bias.copy_(weights["b_enc"])
        trainer.ae.decoder.weight.copy_(weights["W_dec"].T)
    return lambda: trainer.update(1, x)


def peer_inference(kind: str, weights: Weights, x: Tensor) -> dict[str, Step]:
    """Encoding and decoding ``x``, and encoding alone, without gradients."""
    if not version("sae-lens"):
        return {}
    sae = _sae_lens_sae(kind, weights)

    @torch.no_grad()
    def both() -> None:
        sae.decode(sae.encode(x))

    @torch.no_grad()
    def encode() -> None:
        sae.encode(x)

    own = f"sae-lens {version('sae-lens')} {kind}"
    return {f"{own} encode, decode": both, f"{own} encode": encode}
