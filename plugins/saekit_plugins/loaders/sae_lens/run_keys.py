"""The keys of a run's configuration in sae-lens: which option each is here, and which say nothing that would matter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

__all__ = ["BEFORE_6", "KEPT", "NEUTRAL", "NORMALIZATIONS", "NOT_TRAINED", "OF_6",
           "OF_ARCHITECTURES", "OTHERS_BEFORE_6", "OTHER_NORMALIZATIONS", "SPECIAL_TOKENS", "Key"]  # fmt: skip


def _same(value: Any) -> Any:
    return value


@attrs.frozen
class Key:
    """What a key of theirs is here."""

    path: str
    of: Callable[[Any], Any] = _same
    """From their value to the one here."""
    none: Any = None
    """What null means; None: the option is left out."""


NORMALIZATIONS: Mapping[Any, str] = {
    True: "expected_average_only_in",
    False: "none",
    "none": "none",
    "expected_average_only_in": "expected_average_only_in",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "covariance_whitening": "whitening",
}
"""Their names of input transforms, and those here."""
_OF_ROWS = "the loss is of rows as they are there, and here of normalized ones: other weights and another L0 come of it"
OTHER_NORMALIZATIONS: Mapping[Any, str] = {
    "layer_norm": _OF_ROWS,
    "constant_norm_rescale": _OF_ROWS,
    "covariance_whitening": (
        "covariance_whitening leaves rows on the principal axes, and adds 1e-3 to the variances; whitening rotates "
        f"them back, and adds eps in units of the mean variance; and {_OF_ROWS}"
    ),
}
"""Those that are not quite the same here, and why."""
SPECIAL_TOKENS = (
    "is true, which means bos, eos, pad, sep and decoder_start in 6.54.12, and here all that the tokenizer calls "
    "special: where it has more, as for chats, give the ids instead, as in tokens.exclude_special_tokens=[0,2]"
)
KEPT: Mapping[str, Key] = {
    "model_name": Key("model.name"),
    "autocast_lm": Key("model.autocast"),
    "compile_llm": Key("model.compile"),
    "llm_compilation_mode": Key("model.compile_mode"),
    "hook_name": Key("site.hook_name"),
    "hook_point": Key("site.hook_name"),
    "hook_head_index": Key("site.hook_head_index"),
    "hook_point_head_index": Key("site.hook_head_index"),
    "dataset_path": Key("dataset.path"),
    "streaming": Key("dataset.streaming"),
    "context_size": Key("dataset.context_size"),
    "prepend_bos": Key("dataset.prepend_bos"),
    "sequence_separator_token": Key("dataset.sequence_separator_token", none="none"),
    "use_chat_formatting": Key("dataset.chat_template"),
    "disable_concat_sequences": Key("dataset.disable_concat_sequences"),
    "seqpos_slice": Key("tokens.seqpos_slice"),
    "exclude_special_tokens": Key("tokens.exclude_special_tokens"),
    "normalize_activations": Key(
        "activations.normalize_activations",
        lambda value: NORMALIZATIONS.get(value, value),
        none="none",
    ),
    "n_batches_in_buffer": Key("activations.source.n_batches_in_buffer"),
    "store_batch_size_prompts": Key("activations.source.store_batch_size_prompts"),
    "prefetch_llm_batches": Key("activations.source.prefetch", bool),
    # the SAE
    "d_in": Key("sae.d_in"),
    "d_sae": Key("sae.d_sae"),
    "apply_b_dec_to_input": Key("sae.apply_b_dec_to_input"),
    "b_dec_init_method": Key("sae.b_dec_init_method"),
    "normalize_sae_decoder": Key("sae.normalize_sae_decoder"),
    "noise_scale": Key("sae.noise_scale"),
    "decoder_orthogonal_init": Key("sae.decoder_orthogonal_init"),
    "decoder_heuristic_init": Key("sae.decoder_heuristic_init"),
    "init_encoder_as_decoder_transpose": Key("sae.init_encoder_as_decoder_transpose"),
    "mse_loss_normalization": Key("sae.mse_loss_normalization", none="none"),
    "l1_coefficient": Key("sae.l1_coefficient"),
    "l1_warm_up_steps": Key("sae.l1_warm_up_steps"),
    "lp_norm": Key("sae.lp_norm"),
    "scale_sparsity_penalty_by_decoder_norm": Key("sae.scale_sparsity_penalty_by_decoder_norm"),
    "use_ghost_grads": Key("sae.use_ghost_grads"),
    "k": Key("sae.k"),
    "aux_loss_coefficient": Key("sae.aux_loss_coefficient"),
    "rescale_acts_by_decoder_norm": Key("sae.rescale_acts_by_decoder_norm"),
    "topk_threshold_lr": Key("sae.threshold_lr"),
    "matryoshka_widths": Key("sae.widths"),
    "jumprelu_init_threshold": Key("sae.initial_threshold"),
    "jumprelu_bandwidth": Key("sae.bandwidth"),
    "jumprelu_ste_to_input": Key("sae.ste_to_input"),
    "l0_coefficient": Key("sae.l0_coefficient"),
    "l0_warm_up_steps": Key("sae.l0_warm_up_steps"),
    "pre_act_loss_coefficient": Key("sae.pre_act_loss_coefficient", none=0.0),
    # training
    "training_tokens": Key("training.training_tokens"),
    "finetuning_tokens": Key("training.finetuning_tokens"),
    "finetuning_method": Key("training.finetuning_method"),
    "from_pretrained_path": Key("training.from_pretrained_path"),
    "train_batch_size_tokens": Key("training.train_batch_size_tokens"),
    "adam_beta1": Key("optimizer.beta1"),
    "adam_beta2": Key("optimizer.beta2"),
    "lr": Key("training.lr"),
    "lr_warm_up_steps": Key("training.lr_warm_up_steps"),
    "lr_decay_steps": Key("training.lr_decay_steps"),
    "seed": Key("training.seed"),
    "autocast": Key("training.autocast"),
    "compile_sae": Key("training.compile"),
    "sae_compilation_mode": Key("training.compile_mode"),
    "dead_feature_window": Key("training.dead_feature_window"),
    "feature_sampling_window": Key("training.feature_sampling_window"),
    "verbose": Key("training.verbose"),
    "n_checkpoints": Key("checkpoints.n_checkpoints"),
    **{
        f"{prefix}{name}": key
        for prefix in ("", "logger.")
        for name, key in {
            "wandb_log_frequency": Key("training.log_frequency"),
        }.items()
    },
}
"""Those that are an option by themselves.  Of 6, what is below ``sae`` is called the same without that."""

_OF_FILE = "is of sae-lens's own files"
_W_AND_B = "is what sae-lens logs to W&B: weights are logged as histograms, and activations are not"
NEUTRAL: Mapping[str, tuple[str, Any]] = {
    "hook_layer": ("hook_name says the layer", Any),
    "hook_point_layer": ("hook_name says the layer", Any),
    "hook_eval": ("evals measure at the site itself", Any),
    "hook_point_eval": ("evals measure at the site itself", Any),
    "is_dataset_tokenized": ("is found out from the data", Any),
    "dataset_trust_remote_code": ("no dataset brings code that is run", Any),
    "use_chat_formatting": ("texts are not formatted as chats", (False, None)),
    "disable_concat_sequences": ("documents are packed into whole contexts", (False, None)),
    "seqpos_slice": ("every position of a context counts", (None, [None], (None,), [])),
    "exclude_special_tokens": ("special tokens count, too", (False, None, [])),
    "activations_mixing_fraction": ("half of the buffer is kept and mixed with what is new", (0.5, None)),
    "n_batches_for_norm_estimate": ("the norm is estimated on the first buffer", Any),
    "dead_feature_threshold": ("features are dead that have not fired for dead_feature_window steps", Any),
    "feature_sampling_method": ("dead features are trained by ghost gradients or AuxK", (None, "none")),
    "sparsity_penalty_decoder_norm_lambda": ("there is one penalty", (None, 0)),
    "decoder_init_norm": ("says it in decoder_heuristic_init", (None, 0.1)),
    "tokens_per_buffer": ("follows from the options of the buffer", Any),
    "save_final_checkpoint": ("the SAE is always saved at the end", Any),
    "resume": ("a run goes on by `saekit train --resume RUN`", Any),
    "resume_from_checkpoint": ("a run goes on by `saekit train --resume RUN`", Any),
    "neuronpedia_id": (_OF_FILE, Any),
    "sae_lens_version": (_OF_FILE, Any),
    "sae_lens_training_version": (_OF_FILE, Any),
    "sae.device": ("is training.device", Any),
    "sae.metadata": (_OF_FILE, Any),
    "sae.reshape_activations": ("heads are laid side by side where the hook has them", Any),
    "sae.use_sparse_activations": ("products are sparse where that is faster", Any),
    **{
        f"{prefix}{name}": found
        for prefix in ("", "logger.")
        for name, found in {
            "wandb_id": ("a run keeps its own", Any),
            "log_activations_store_to_wandb": (_W_AND_B, (False, None)),
            "log_optimizer_state_to_wandb": (_W_AND_B, (False, None)),
            "log_weights_to_wandb": (_W_AND_B, Any),
        }.items()
    },
}
"""Those that are no option here: why, and the values that change nothing (``Any``: all).  Of those in :data:`KEPT`,
other values are options."""

BEFORE_6: Mapping[str, Any] = {
    "context_size": 128, "expansion_factor": 4, "b_dec_init_method": "geometric_median", "normalize_sae_decoder": True,
    "apply_b_dec_to_input": True, "n_batches_in_buffer": 20, "training_tokens": 2_000_000, "prepend_bos": True,
    "store_batch_size_prompts": 32, "train_batch_size_tokens": 4096, "adam_beta1": 0.0, "adam_beta2": 0.999,
    "l1_coefficient": 1e-3, "lr": 3e-4, "init_encoder_as_decoder_transpose": False, "streaming": True, "seed": 42,
    "dead_feature_window": 1000, "feature_sampling_window": 2000, "n_eval_batches": 10, "wandb_log_frequency": 10,
    "eval_every_n_wandb_logs": 100, "jumprelu_init_threshold": 0.001, "jumprelu_bandwidth": 0.001,
}  # fmt: skip
"""What holds in 3.0.0, 4.4.5 and 5.11.0 where nothing is said, of what saekit has other defaults for or might have."""

OF_6: Mapping[str, Any] = {
    "context_size": 128, "n_batches_in_buffer": 20, "training_tokens": 2_000_000, "prepend_bos": True, "seed": 42,
    "store_batch_size_prompts": 32, "train_batch_size_tokens": 4096, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "lr": 3e-4, "streaming": True, "sequence_separator_token": "bos", "dead_feature_window": 1000,
    "feature_sampling_window": 2000, "n_eval_batches": 10, "logger.wandb_log_frequency": 10,
    "logger.eval_every_n_wandb_logs": 100, "prefetch_llm_batches": False, "sae.l1_coefficient": 1.0,
    "sae.l1_warm_up_steps": 0, "sae.k": 100, "sae.aux_loss_coefficient": 1.0, "sae.topk_threshold_lr": 0.01,
    "sae.rescale_acts_by_decoder_norm": True, "sae.jumprelu_init_threshold": 0.01, "sae.jumprelu_bandwidth": 0.05,
    "sae.l0_coefficient": 1.0, "sae.jumprelu_ste_to_input": False,
}  # fmt: skip
"""The same, of 6.54.12."""

_TOPK = ("k", "aux_loss_coefficient", "rescale_acts_by_decoder_norm")
OF_ARCHITECTURES: Mapping[str, Collection[str]] = {
    "standard": ("l1_coefficient", "l1_warm_up_steps"),
    "gated": ("l1_coefficient", "l1_warm_up_steps"),
    "topk": _TOPK,
    "abstopk": _TOPK,
    "batchtopk": (*_TOPK, "topk_threshold_lr"),
    "matryoshka_batchtopk": (*_TOPK, "topk_threshold_lr"),
    "jumprelu": ("jumprelu_init_threshold", "jumprelu_bandwidth", "l0_coefficient", "jumprelu_ste_to_input"),
}
"""The options of :data:`OF_6` that each has."""

NOT_TRAINED = ("matching_pursuit", "temporal")
"""Architectures of 6 that are for inference alone here."""

OTHERS_BEFORE_6: Mapping[str, tuple[Collection[str], Any]] = {
    "l1_coefficient": (("standard", "gated"), Any),
    "l1_warm_up_steps": (("standard", "gated"), Any),
    "lp_norm": (("standard",), Any),
    "scale_sparsity_penalty_by_decoder_norm": (("standard",), Any),
    "use_ghost_grads": (("standard",), (False, None)),
    "mse_loss_normalization": (("standard",), (None, "none")),
    "noise_scale": (("standard",), (0, None)),
    "jumprelu_init_threshold": (("jumprelu",), Any),
    "jumprelu_bandwidth": (("jumprelu",), Any),
}
"""Options before 6 that not every architecture has: which do, and the values by which others lose nothing.  Any: all,
as sae-lens does not look at it for these."""
