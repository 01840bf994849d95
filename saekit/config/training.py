"""How long, how fast, and what is watched."""

from __future__ import annotations

from typing import Literal

import attrs

from saekit.config.fields import CompileMode, a_seed, a_size, at_least_0, at_least_1, path_field, positive
from saekit.config.showing import changed_repr
from saekit.errors import ConfigError

__all__ = ["TrainingConfig"]


@attrs.frozen(kw_only=True)
class TrainingConfig:
    """How long, how fast, and what is watched."""

    training_tokens: int = attrs.field(default=2_000_000, validator=at_least_1)
    """Activation vectors to train on."""
    finetuning_tokens: int = attrs.field(default=0, validator=at_least_0)
    """Activation vectors to train on after that, with only some parameters learning."""
    finetuning_method: Literal["scale", "decoder", "unrotated_decoder"] | None = None
    """What learns then: `scale`: a factor for each feature; `decoder`: the factors, `W_dec` and `b_dec`;
    `unrotated_decoder`: the factors and `b_dec`."""
    from_pretrained_path: str | None = path_field(None)
    """Start from the weights of this saved SAE, of any format that `saekit.SAE.load` reads."""
    train_batch_size_tokens: int = attrs.field(default=4096, validator=a_size)
    """Activation vectors in one step."""
    lr: float = attrs.field(default=4e-4, validator=positive)
    """The peak learning rate."""
    lr_warm_up_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps of linear warm-up: step t of w has `lr * (t + 1) / w`."""
    lr_decay_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps of linear decay to zero at the end."""
    seed: int = attrs.field(default=42, validator=a_seed)
    """Seeds everything that is drawn."""
    device: str = "auto"
    """Where the SAE trains: `cpu`, `cuda`, ..., or `auto`."""
    kernels: Literal["auto", "fast", "int8", "reference"] = "auto"
    """`auto` trains by the fast kernels where the SAE has them, but not in float64 or bfloat16, where `fast` does, too
    (with float32 products for bfloat16); `fast` is an error where there are none; `int8` is `auto` with a first look in
    8-bit integers, which finds the features that are then computed in float32, and is an error where the CPU has no
    AVX-512 VNNI; `reference` trains by plain torch and autograd, in the order of operations of sae-lens."""
    autocast: bool = False
    """Run the SAE's matrix products in bfloat16 (torch's autocast) in plain torch, whatever the type of its weights."""
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """How the SAE's steps multiply float32 numbers, as in `torch.set_float32_matmul_precision`: `highest`: in full;
    `high`: in TF32; `medium`: in bfloat16, summed in float32 (in plain torch on CUDA: in TF32). Between steps, and for
    the language model, it is as the process has it. None: as the process has it. An error where it changes nothing."""
    compile: bool = False
    """Compile the SAE's training step in plain torch with `torch.compile`."""
    compile_mode: CompileMode = "default"
    """torch's mode of compilation."""
    dead_feature_window: int | None = attrs.field(default=None, validator=at_least_1)
    """A feature is dead when it has not fired for more steps than this.  None: 1000, or a tenth of all steps if that is
    fewer, so that dead features can be trained in short runs, too."""
    feature_sampling_window: int = attrs.field(default=2000, validator=at_least_1)
    """Steps over which firing fractions are counted before they are logged and counted anew."""
    log_frequency: int = attrs.field(default=10, validator=at_least_1)
    """Steps between two lines of metrics."""
    verbose: bool = True
    """Show progress."""

    __repr__ = changed_repr

    def __attrs_post_init__(self) -> None:
        if self.finetuning_tokens and self.finetuning_method is None:
            raise ConfigError(
                [("finetuning_method", f"is missing: it says what learns in the {self.finetuning_tokens} "
                  "finetuning_tokens; scale, decoder or unrotated_decoder")]
            )  # fmt: skip
        if self.finetuning_method is not None and not self.finetuning_tokens:
            raise ConfigError(
                [("finetuning_tokens", f"is 0, so finetuning_method = {self.finetuning_method!r} would never begin")]
            )
        if self.lr_warm_up_steps + self.lr_decay_steps > self.steps:
            raise ConfigError(
                [("lr_warm_up_steps", f"warm-up ({self.lr_warm_up_steps}) and decay ({self.lr_decay_steps}) take more "
                  f"than the {self.steps} steps of training")]
            )  # fmt: skip

    @property
    def steps(self) -> int:
        """The number of steps, fine-tuning's included; the last batch may be smaller than the others."""
        return -(-self.total_tokens // self.train_batch_size_tokens)

    @property
    def batch_text(self) -> str:
        """Tokens of a step, in words: of training that takes less than a batch, those that it takes."""
        batch, wanted = self.train_batch_size_tokens, self.total_tokens
        return f"{batch:,}" if wanted >= batch else f"{wanted:,} (less than a batch of {batch:,})"

    @property
    def dead_after(self) -> int:
        """Steps without firing after which a feature is dead."""
        return self.dead_feature_window or min(1000, max(self.steps // 10, 1))

    @property
    def total_tokens(self) -> int:
        """Activation vectors in training and fine-tuning together."""
        return self.training_tokens + self.finetuning_tokens
