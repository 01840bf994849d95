"""Makes ``tests/golden_variants/``: SAEs as their libraries write them, with the options that an SAE can have there.

``training_abstopk.safetensors`` has the loss and the gradients of a training step for several options.  With
sae-lens 6.54.12, eai-sparsify 1.3.3 and dictionary-learning 0.1.0, in an environment that has them.  Each folder
holds what the library wrote and ``expected.safetensors``, what it then computes of what it wrote: ``x``, ``encode``,
``decode`` and ``forward``.  The weights are random.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

nnsight = types.ModuleType("nnsight")  # which dictionary_learning imports and saved SAEs do not need
nnsight.LanguageModel = object
sys.modules.setdefault("nnsight", nnsight)

import sae_lens  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from sae_lens.saes import abstopk_sae, matching_pursuit_sae, temporal_sae, topk_sae  # noqa: E402
from sae_lens.saes.sae import SAEMetadata, TrainStepInput  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

HERE = Path(__file__).parent
D_IN, D_SAE = 8, 24
METADATA = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2", "context_size": 64, "prepend_bos": False}
SEQUENCES = {"n_heads": 2, "bottleneck_factor": 3}
# What else than the defaults: of the inference classes of sae-lens.
SAE_LENS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk_rescaled": ("TopK", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "topk_not_rescaled": ("TopK", {"k": 4, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}),
    "abstopk_rescaled": ("AbsTopK", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "abstopk_not_rescaled": ("AbsTopK", {"k": 4, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}),
    "abstopk_heads": ("AbsTopK", {"k": 5, "rescale_acts_by_decoder_norm": False, "reshape_activations": "hook_z"}),
    "abstopk_bfloat16": ("AbsTopK", {"k": 4, "rescale_acts_by_decoder_norm": False, "dtype": "bfloat16"}),
    "abstopk_checkpoint": ("AbsTopKTraining", {"k": 4}),
    "pursuit_iterations": ("MatchingPursuit", {"max_iterations": 3, "residual_threshold": 0.0}),
    "pursuit_threshold": ("MatchingPursuit", {"residual_threshold": 1.5, "stop_on_duplicate_support": False}),
    "pursuit_duplicates": (
        "MatchingPursuit", {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "max_iterations": 12},
    ),
    "pursuit_no_b_dec": ("MatchingPursuit", {"residual_threshold": 0.5, "apply_b_dec_to_input": False}),
    "pursuit_heads": ("MatchingPursuit", {"residual_threshold": 0.5, "reshape_activations": "hook_z"}),
    "pursuit_bfloat16": ("MatchingPursuit", {"max_iterations": 2, "dtype": "bfloat16"}),
    "pursuit_checkpoint": ("MatchingPursuitTraining", {"residual_threshold": 0.7}),
    "temporal_untied": ("Temporal", {"tied_weights": False, "kval_topk": 5, "n_attn_layers": 2, **SEQUENCES}),
    "temporal_untied_no_b_dec": (
        "Temporal", {"tied_weights": False, "kval_topk": 5, "apply_b_dec_to_input": False, **SEQUENCES},
    ),
    "temporal_heads": ("Temporal", {"kval_topk": 5, "reshape_activations": "hook_z", **SEQUENCES}),
    "temporal_relu": ("Temporal", {"sae_diff_type": "relu", "apply_b_dec_to_input": False, **SEQUENCES}),
    "temporal_all_above_zero": ("Temporal", {"kval_topk": None, "n_attn_layers": 0, **SEQUENCES}),
    "temporal_scaled": (
        "Temporal", {"kval_topk": 3, "n_heads": 4, "bottleneck_factor": 2, "activation_normalization_factor": 0.3,
                     "normalize_activations": "constant_scalar_rescale"},
    ),
    "temporal_factor_unused": ("Temporal", {"kval_topk": 3, "activation_normalization_factor": 0.3, **SEQUENCES}),
}  # fmt: skip
SPARSIFY: dict[str, dict[str, Any]] = {
    "groupmax": {"activation": "groupmax", "k": 6, "expansion_factor": 3},
    "groupmax_transcoder": {"activation": "groupmax", "k": 4, "num_latents": 24, "transcode": True},
    "groupmax_skip": {
        "activation": "groupmax", "k": 4, "num_latents": 24, "transcode": True, "skip_connection": True,
    },
    "topk_transcoder": {"k": 5, "num_latents": 20, "transcode": True},
    "topk_not_normalized": {"k": 5, "expansion_factor": 2, "normalize_decoder": False},
    "topk_skip_around": {"k": 5, "num_latents": 20, "skip_connection": True},
    "groupmax_skip_around": {"activation": "groupmax", "k": 5, "num_latents": 20, "skip_connection": True},
}  # fmt: skip
DICTIONARIES = {
    "batchtopk_never_set": (BatchTopKSAE, -1.0),
    "matryoshka_never_set": (MatryoshkaBatchTopKSAE, -1.0),
    "topk_threshold": (AutoEncoderTopK, 0.4),
}

TRAINING: dict[str, tuple[int, dict[str, Any]]] = {
    "none_dead": (0, {}),
    "few_dead": (2, {"aux_loss_coefficient": 0.5}),
    "many_dead": (12, {"rescale_acts_by_decoder_norm": False}),
    "no_b_dec": (9, {"apply_b_dec_to_input": False}),
}
"""Of abstopk: how many features are dead, and options."""


def stirred(module: torch.nn.Module) -> None:
    """Random weights, of which no decoder row has the norm of another."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape) * (0.4 if value.ndim > 1 else 0.2))
            if name in ("W_dec", "decoder.weight"):
                value *= 0.5 + torch.rand(value.shape[0], 1)


def inputs(name: str) -> torch.Tensor:
    places = (3, 6) if name.startswith("temporal") else (12,)
    x = torch.randn(*places, D_IN) * (4 if len(places) > 1 else 1)
    return x.unflatten(-1, (2, -1)) if name.endswith("heads") else x


def write(folder: Path, x: torch.Tensor, encode: Any, decode: Any, forward: Any) -> None:
    with torch.no_grad():
        features = encode(x)
        found = {"x": x, "encode": features, "decode": decode(features), "forward": forward(x)}
    save_file(
        {key: value.detach().clone().contiguous() for key, value in found.items()}, folder / "expected.safetensors"
    )


def of_sae_lens(name: str, kind: str, options: dict[str, Any]) -> None:
    module = (
        {"T": topk_sae, "A": abstopk_sae, "M": matching_pursuit_sae}[kind[0]] if kind != "Temporal" else temporal_sae
    )
    hook = {"hook_name": "blocks.1.attn.hook_z"} if name.endswith("heads") else {}
    config = getattr(module, f"{kind}SAEConfig")(
        d_in=D_IN, d_sae=D_SAE, device="cpu", **{"dtype": "float32", **options}, metadata=SAEMetadata(**METADATA | hook)
    )
    sae = getattr(module, f"{kind}SAE")(config)
    stirred(sae)
    folder = HERE / f"sae_lens_{name}"
    sae.save_model(folder)
    peer = (sae_lens.TrainingSAE if kind.endswith("Training") else sae_lens.SAE).load_from_disk(folder)
    write(folder, inputs(name), peer.encode, peer.decode, peer)


def of_sparsify(name: str, options: dict[str, Any]) -> None:
    coder = SparseCoder(D_IN, SparseCoderConfig(**options))
    stirred(coder)
    folder = HERE / f"sparsify_{name}"
    coder.save_to_disk(folder)
    peer = SparseCoder.load_from_disk(folder)

    def encode(x: torch.Tensor) -> torch.Tensor:
        values, places, _ = peer.encode(x)
        return torch.zeros(len(x), peer.num_latents).scatter(1, places, values)

    def decode(features: torch.Tensor) -> torch.Tensor:
        values, places = features.topk(features.shape[1])
        return peer.decode(values, places)

    write(folder, inputs(name), encode, decode, lambda x: peer(x).sae_out)


def of_dictionary_learning(name: str, kind: Any, threshold: float) -> None:
    groups = ([8, 16],) if kind is MatryoshkaBatchTopKSAE else ()
    sae = kind(D_IN, D_SAE, 4, *groups)
    stirred(sae)
    sae.threshold.fill_(threshold)
    folder = HERE / f"dictionary_learning_{name}"
    folder.mkdir()
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": kind.__name__, "k": 4, "layer": 1, "lm_name": "gpt2", "submodule_name": "mlp_out_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    peer = kind.from_pretrained(folder / "ae.pt", k=4)
    write(folder, inputs(name), peer.encode, peer.decode, peer)


def of_training() -> None:
    found: dict[str, torch.Tensor] = {"x": torch.randn(20, D_IN, dtype=torch.float64)}
    for name, (dead, options) in TRAINING.items():
        config = abstopk_sae.AbsTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, dtype="float64", **options)
        sae = abstopk_sae.AbsTopKTrainingSAE(config)
        stirred(sae)
        mask = torch.arange(D_SAE) < dead
        step = TrainStepInput(
            sae_in=found["x"], coefficients={}, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False
        )
        output = sae.training_forward_pass(step)
        output.loss.backward()
        numbers = {"loss": output.loss, "aux": output.losses["auxiliary_reconstruction_loss"], "dead": mask.double()}
        numbers |= dict(sae.named_parameters())
        numbers |= {f"grad.{key}": value.grad for key, value in sae.named_parameters()}
        found |= {f"{name}.{key}": value.detach().clone().contiguous() for key, value in numbers.items()}
    options = json.dumps({name: options for name, (_, options) in TRAINING.items()})
    save_file(found, HERE / "training_abstopk.safetensors", {"options": options})


if __name__ == "__main__":
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    torch.manual_seed(0)
    for name, (kind, options) in SAE_LENS.items():
        of_sae_lens(name, kind, options)
    for name, options in SPARSIFY.items():
        of_sparsify(name, options)
    for name, (kind, threshold) in DICTIONARIES.items():
        of_dictionary_learning(name, kind, threshold)
    of_training()
