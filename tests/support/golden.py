"""The reference's own numbers, ``tests/golden``: what the files hold, and the same options as saekit's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.schedules.cosine_restarts import CosineRestartsConfig
from safetensors import safe_open
from torch import Tensor

__all__ = ["FILES", "Golden", "Options", "options_of", "read"]

FILES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))}
"""By name."""
PATCHES = {
    "the activations' norm is estimated before b_dec is initialised",
    "the fine-tuning methods name the scaling factor as the SAE names it",
    "the ghost loss is summed over d_in like the mse, and is 0 when no feature is dead",
    "the gradient parallel to the decoder rows is removed before clipping and the step",
}
"""What files may have undone in the reference: saekit does these things so."""
TRACED = {
    "loss": "losses/overall_loss",
    "mse_loss": "losses/mse_loss",
    "l1_loss": "losses/l1_loss",  # times the coefficient
    "ghost_grad_loss": "losses/ghost_grad_loss",
    "l0": "metrics/l0",
    "lr": "details/current_learning_rate",
    "l1_coefficient": "details/current_l1_coefficient",
    "grad_norm": "details/grad_norm",
    "dead_features": "sparsity/dead_features",  # at the step's begin
    "scaling_factor": "",  # one number, of the activations
}
ONLY_THE_START = {"decoder_orthogonal_init", "decoder_heuristic_init", "init_encoder_as_decoder_transpose"}
"""Options whose whole effect is in the file's ``init`` tensors."""


@attrs.frozen
class Golden:
    config: dict[str, Any]
    scaled: bool
    b_dec_from_batches: bool
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        found = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        return {name.replace("finetuning_scaling_factor", "scaling_factor"): value for name, value in found.items()}

    @property
    def activation_scale(self) -> float:
        return self.part("trace.")["scaling_factor"].item()


def read(path: Path) -> Golden:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop("made_with")
    metadata.pop("own_deviation", None)
    patched = json.loads(metadata.pop("patched", "[]"))
    golden = Golden(
        config=json.loads(metadata.pop("config")),
        scaled=json.loads(metadata.pop("scale_sparsity_penalty_by_decoder_norm")),
        b_dec_from_batches=metadata.pop("b_dec_from", None) == "batches",
        tensors=tensors,
    )
    unknown = [*metadata, *(set(patched) - PATCHES)]
    unknown += [name for name in golden.part("trace.") if name not in TRACED]
    unknown += [name for name in tensors if name != "batches" and not name.startswith(("init.", "final.", "trace."))]
    assert not unknown, f"{path.name} has {unknown}, which this test does not understand"
    return golden


@attrs.frozen
class Options:
    """The options of a file, by sections of a configuration; and of its SAE and its model."""

    sae: dict[str, Any]
    training: dict[str, Any]
    optimizer: dict[str, Any]
    lr_schedule: Any
    d_in: int
    hook_name: str


def options_of(golden: Golden) -> Options:
    """Every option is taken out of the file's; what is left over is an error."""
    config = dict(golden.config)
    for name in ONLY_THE_START:
        config.pop(name, None)
    for name, value in {"noise_scale": 0.0, "hook_head_index": None}.items():  # nothing else can be compared
        assert config.pop(name) == value, f"{name} is not {value}"
    config.pop("hook_layer")
    config.pop("b_dec_init_method")
    normalized = config.pop("normalize_activations", False)
    assert normalized or golden.activation_scale == 1
    sae = {
        "d_sae": config.pop("d_sae"),
        "activation": config.pop("activation_fn"),
        "apply_b_dec_to_input": config.pop("apply_b_dec_to_input"),
        "dtype": "float64",
        "normalize_sae_decoder": config.pop("normalize_sae_decoder"),
        "l1_coefficient": config.pop("l1_coefficient"),
        "l1_warm_up_steps": config.pop("l1_warm_up_steps"),
        "lp_norm": float(config.pop("lp_norm")),
        "scale_sparsity_penalty_by_decoder_norm": golden.scaled,
        "mse_loss_normalization": config.pop("mse_loss_normalization") or "none",
        "use_ghost_grads": config.pop("use_ghost_grads"),
    }
    training = {
        "finetuning_tokens": config.pop("finetuning_tokens", 0),
        "finetuning_method": config.pop("finetuning_method", None),
        "device": "cpu",
        "log_frequency": 1,
    }
    for name in (
        "training_tokens", "train_batch_size_tokens", "lr", "lr_warm_up_steps", "lr_decay_steps",
        "dead_feature_window", "feature_sampling_window",
    ):  # fmt: skip
        training[name] = config.pop(name)
    end, cycles = config.pop("lr_end"), config.pop("n_restart_cycles")
    schedule: Any = {
        "constant": "constant",
        "cosineannealing": CosineConfig(end=end),
        "cosineannealingwarmrestarts": CosineRestartsConfig(end=end, n_restart_cycles=cycles),
    }[config.pop("lr_scheduler_name")]
    optimizer = {"beta1": config.pop("adam_beta1"), "beta2": config.pop("adam_beta2")}
    found = Options(sae, training, optimizer, schedule, config.pop("d_in"), config.pop("hook_name"))
    assert not config, f"the file has options that this test does not understand: {config}"
    return found
