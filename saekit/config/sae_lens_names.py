"""The options of sae-lens (2.1.3, 3.0.0 and 6) whose names are others here, and where each of them is."""

from __future__ import annotations

__all__ = ["SAE_LENS"]

SAE_LENS: dict[str, str] = {
    # the model
    "model_name": "model.name",
    "model_class_name": "model.backend",
    "model_kwargs": "model.backend.forward_kwargs",
    "model_from_pretrained_kwargs": "model.backend.from_pretrained_kwargs",
    "autocast_lm": "model.autocast",
    "compile_llm": "model.compile",
    "llm_compilation_mode": "model.compile_mode",
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
    # activations
    "use_cached_activations": "activations.source.name=cached, with activations.source.folder",
    "cached_activations_path": "activations.source.folder, of the source `cached`",
    "new_cached_activations_path": "activations.cache.folder, which `saekit cache` writes",
    "n_batches_in_store_buffer": "activations.source.n_batches_in_buffer",
    "store_batch_size": "activations.source.store_batch_size_prompts",
    # the SAE
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
    "eval_batch_size_prompts": 'evals.run=[{name = "reconstruction", batch_size_prompts = ...}]',
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
