"""The names of sae-lens (2.1.3, 3.0.0 and 6) that are others here, and where each of them is: options, and what SAEs
have there; of the latter those of dictionary_learning and sparsify, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FACTORIES", "OF_CONFIGS", "OF_SAES", "SAE_LENS", "is_run_of_sae_lens", "is_sae_alone", "is_sae_of_sae_lens"]

SAE_LENS: dict[str, str] = {
    # the model
    "model_name": "model.name",
    "model_class_name": "model.backend",
    "model_kwargs": "model.backend.forward_kwargs",
    "model_from_pretrained_kwargs": "model.backend.from_pretrained_kwargs",
    "autocast_lm": "model.autocast",
    "compile_llm": "model.compile",
    "llm_compilation_mode": "model.compile_mode",
    "llm_device": "model.device",
    # the site
    "hook_point": "site.hook_name",
    "hook_point_layer": "a part of site.hook_name, which is enough",
    "hook_layer": "a part of site.hook_name, which is enough",
    "hook_point_head_index": "site.hook_head_index",
    "hook_point_eval": "site.hook_name, where evals measure too",
    "hook_eval": "site.hook_name, where evals measure too",
    # the text
    "dataset_path": "dataset.path",
    "is_dataset_tokenized": "found out from the data (dataset.column)",
    "use_chat_formatting": "dataset.chat_template",
    "dataset_trust_remote_code": "not there: no dataset brings code that is run",
    # activations
    "use_cached_activations": "activations.source.name=cached, with activations.source.folder",
    "cached_activations_path": "activations.source.folder, of the source `cached`",
    "new_cached_activations_path": "activations.cache.folder, which `saekit cache` writes",
    "n_batches_in_store_buffer": "activations.source.n_batches_in_buffer",
    "store_batch_size": "activations.source.store_batch_size_prompts",
    "prefetch_llm_batches": "activations.source.prefetch",
    "activations_mixing_fraction": "not there: half of the buffer is filled anew",
    "n_batches_for_norm_estimate": "not there: the norm is estimated on the first buffer",
    # the SAE
    "reshape_activations": "not needed: heads are laid side by side where a hook has them",
    "architecture": "sae.name",
    "activation_fn": "sae.activation",
    "activation_fn_str": "sae.activation",
    "activation_fn_kwargs": "sae.activation, as a table with its name and options",
    "b_dec_init_mean": "sae.b_dec_init_method",
    "decoder_init_norm": "sae.decoder_heuristic_init, which starts from norms of 0.1",
    "topk_threshold_lr": "sae.threshold_lr",
    "matryoshka_widths": "sae.widths, of `matryoshka`",
    "use_matryoshka_aux_loss": 'sae.aux_loss_levels, "each" for True and "whole" for False',
    "jumprelu_init_threshold": "sae.initial_threshold",
    "jumprelu_bandwidth": "sae.bandwidth",
    "jumprelu_sparsity_loss_mode": "sae.sparsity_loss, which is l0 for step, target_l0 for quadratic, and tanh",
    "jumprelu_tanh_scale": "sae.tanh_scale",
    "jumprelu_ste_to_input": "sae.ste_to_input",
    "sparsity_penalty_decoder_norm_lambda": "sae.scale_sparsity_penalty_by_decoder_norm",
    # training
    "total_training_tokens": "training.training_tokens",
    "train_batch_size": "training.train_batch_size_tokens",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "lr_scheduler": "lr_schedule",
    "lr_scheduler_name": "lr_schedule",
    "lr_end": "lr_schedule.end, of the cosine schedules",
    "compile_sae": "training.compile",
    "sae_compilation_mode": "training.compile_mode",
    "use_compile": "training.compile",
    "from_pretrained": "training.from_pretrained_path",
    "dead_feature_threshold": "not there: 1e-5 and 1e-6 are both reported",
    # evals
    "eval_every_n_wandb_logs": "evals.every_n_steps, in steps",
    "n_eval_batches": "evals.n_contexts, in contexts",
    "n_eval_seqs": "evals.n_contexts",
    "eval_batch_size_prompts": (
        'evals.run=[{name = "reconstruction", batch_size_prompts = N}, {name = "downstream", batch_size_prompts = N}]'
    ),
    "run_evals": "evals.run",
    # trackers
    "log_to_wandb": 'trackers=["wandb"]',
    "logger": "trackers",
    "wandb_project": 'trackers=[{name = "wandb", project = ...}]',
    "wandb_entity": 'trackers=[{name = "wandb", entity = ...}]',
    "wandb_id": "kept in the run folder",
    "wandb_log_frequency": "training.log_frequency",
    "feature_sampling_method": "not there: dead features are trained by sae.use_ghost_grads or AuxK",
    # the run folder
    "run_name": "checkpoints.name",
    "output_path": "checkpoints.folder",
    "checkpoint_path": "checkpoints.folder",
    "save_final_checkpoint": "not needed: the SAE is always saved at the end",
    "resume": "a command: saekit train --resume RUN",
    "resume_from_checkpoint": "a command: saekit train --resume RUN",
}
"""What the option is here.  Names that are the same in both, such as ``l1_coefficient``, are found by themselves."""

_METADATA = ("model_name", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id", "sae_lens_training_version")

_ABOUT = {
    "hook_name": "sae.site.hook_name",
    "hook_point": "sae.site.hook_name",
    "hook_point_head_index": "sae.site.hook_head_index",
    "hook_head_index": "sae.site.hook_head_index",
    "hook_layer": "a part of sae.site.hook_name",
    "hook_point_layer": "a part of sae.site.hook_name",
    "metadata": "sae.info.metadata, and the hook sae.site",
    **{name: f'sae.info.metadata["{name}"]' for name in _METADATA},
}

FACTORIES: dict[str, str] = {
    "load_from_disk": "SAE.load(path)",
    "load_from_pretrained": "SAE.load(path), and of a name SAE.from_pretrained(release, sae_id)",
    "load_from_pretrained_legacy": "SAE.load(path)",
    "from_pretrained_with_cfg_and_sparsity": "SAE.from_pretrained(release, sae_id); sae.to_dict() and sae.log_sparsity",
    "from_config": "SAE.from_dict(options)",
    "load_many": "SAE.from_release(release, sae_ids)",
}
"""What makes SAEs there, called on the class."""

OF_SAES: dict[str, str] = {
    **FACTORIES,
    **_ABOUT,
    "save_model": "sae.save(path)",
    "save_inference_model": "sae.save(path)",
    "save_to_disk": "sae.save(path)",
    "sparsity": "sae.log_sparsity",
    "activation_fn": "sae.activation",
    "get_activation_fn": "sae.activation",
    "encode_standard": "sae.encode(x)",
    "encode_gated": "sae.encode(x)",
    "encode_jumprelu": "sae.encode(x)",
    "encode_with_hidden_pre": "sae.pre_activations(x), and sae.encode(x)",
    "encode_with_hidden_pre_fn": "sae.pre_activations(x), and sae.encode(x)",
    "process_sae_in": "a part of sae.encode(x)",
    "training_forward_pass": "sae.training_step(x, step), and saekit.train for a run",
    "set_decoder_norm_to_unit_norm": "done after each step of training (sae.config.normalize_sae_decoder)",
    "remove_gradient_parallel_to_decoder_directions": "done in each step (sae.config.normalize_sae_decoder)",
    "fold_activation_norm_scaling_factor": "sae.fold_activation_scale(factor)",
    "apply_finetuning_scaling_factor": "known by sae.scaling_factor, which is None where there is none",
    "turn_on_forward_pass_hook_z_reshaping": "not needed: [..., head, d_head] is taken as it is",
    "turn_off_forward_pass_hook_z_reshaping": "not needed: [..., head, d_head] is taken as it is",
    "hook_z_reshaping_mode": "not needed: [..., head, d_head] is taken as it is",
    "run_time_activation_norm_fn_in": "a part of sae.encode(x) (sae.input_transform)",
    "run_time_activation_norm_fn_out": "a part of sae.decode(features, like=x) (sae.input_transform)",
    "run_with_cache": "sae.hook_sae_acts_post.add_hook(...), and in a model saekit.splice(model, sae)",
    "run_with_hooks": "sae.hook_sae_acts_post.add_hook(...), and in a model saekit.splice(model, sae)",
    "architecture": "sae.info.architecture",
    # dictionary_learning
    "activation_dim": "sae.d_in",
    "dict_size": "sae.d_sae",
    "encoder": "sae.W_enc [d_in, d_sae] and sae.b_enc",
    "decoder": "sae.W_dec [d_sae, d_out] and sae.b_dec",
    "scale_biases": "sae.fold_activation_scale(factor)",
    "normalize_decoder": "sae.fold_W_dec_norm()",
    # sparsify
    "num_latents": "sae.d_sae",
    "pre_acts": "sae.pre_activations(x)",
    "select_topk": "sae.encode_topk(x, k)",
}
"""What SAEs have there, and what it is called here."""

OF_CONFIGS: dict[str, str] = {
    **_ABOUT,
    "architecture": "sae.info.architecture, and a method there",
    "activation_fn": "sae.config.activation",
    "activation_fn_str": "sae.config.activation",
    "activation_fn_kwargs": "sae.config.activation",
    "device": "sae.device",
    "normalize_activations": "sae.info.metadata and sae.input_transform",
    "reshape_activations": "not needed: [..., head, d_head] is taken as it is",
    "to_dict": "sae.to_dict()",
}
"""What the configuration of an SAE (``sae.cfg``) has there, and where it is here."""

_VERSIONS = {"sae_lens_version", "sae_lens_training_version"}
_MANY = 8
_MARKS = {"metadata", "hook_point", "hook_name", "finetuning_scaling_factor"}
_OF_RUNS = {"lr", "training_tokens", "total_training_tokens", "train_batch_size_tokens", "sae"}
"""One of them is in each configuration of a run, and none in what an SAE states."""


def is_run_of_sae_lens(table: Mapping[str, Any]) -> bool:
    """Whether this is the whole configuration of a run there, and not one of saekit with a name or two of theirs."""
    theirs = bool(_VERSIONS & table.keys()) or len(SAE_LENS.keys() & table.keys()) >= _MANY
    return theirs and not is_sae_alone(table)


def is_sae_alone(table: Mapping[str, Any]) -> bool:
    """Whether this is what an SAE states about itself, and nothing of a run."""
    return is_sae_of_sae_lens(table) and "d_sae" in table and not _OF_RUNS & table.keys()


def is_sae_of_sae_lens(table: Mapping[str, Any]) -> bool:
    """Whether this is what an SAE there states about itself (``cfg.json``, ``sae.cfg.to_dict()``), or a run's flat
    configuration, which states that, too."""
    if (_VERSIONS | {"reshape_activations"}) & table.keys():
        return True
    return "architecture" in table and "name" not in table and bool(_MARKS & table.keys())
