"""What is saved with an SAE of what it was fed."""

from __future__ import annotations

import json
from typing import Any

from saekit.abilities import StatesProcessing
from saekit.config import TrainConfig
from saekit.config.files import plain_config
from saekit.data import Corpus
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.checks import has_model
from saekit.tokens import token_choice

__all__ = ["metadata_of"]


def metadata_of(config: TrainConfig, backend: ModelBackend, corpus: Corpus, plugins: PluginManager) -> dict[str, Any]:
    """What decides what the SAE is fed: the model, how it is loaded and run, and how text becomes contexts."""
    training = {"training_tokens": config.training.training_tokens, "seed": config.training.seed}
    if not has_model(config, plugins):
        return training
    dataset = corpus.config
    backend_choice = plugins.bound(MODEL_BACKENDS, config.model.backend)
    model_options = plain_config(backend_choice.options, plugins)
    return {
        "model_name": backend.name,
        "model_class_name": backend_choice.item.entry.name,
        # sae-lens knows one of them by this name, too: model_from_pretrained_kwargs
        **{f"model_{name}": json.loads(json.dumps(value, default=str)) for name, value in model_options.items()},
        **_weights(backend),
        "model_autocast": config.model.autocast,
        "dataset_path": dataset.path if corpus.dataset is None else None,  # data in memory has no path to name
        "context_size": dataset.context_size,
        "prepend_bos": dataset.prepend_bos,
        "begin_batch_token": dataset.begin_batch_token,
        "begin_sequence_token": dataset.begin_sequence_token,
        "sequence_separator_token": dataset.sequence_separator_token,
        "held_out_every": corpus.evals.held_out_every if corpus.evals.split is None else None,
        "held_out_split": corpus.evals.split,
        **_chosen(config, backend, corpus),
        **training,
    }


def _weights(backend: ModelBackend) -> dict[str, Any]:
    """What was done to the model's weights as it was loaded, which its options do not always say, and which they are,
    whatever the model is called elsewhere."""
    # What is empty is saved, too: that nothing was known is not what another backend may presume of the name.
    known = dict(backend.processing()) if isinstance(backend, StatesProcessing) else None
    found = {"model_processing": known, "model_fingerprint": backend.fingerprint()}
    return {name: value for name, value in found.items() if value is not None}


def _chosen(config: TrainConfig, backend: ModelBackend, corpus: Corpus) -> dict[str, Any]:
    """What is saved with an SAE of which tokens count and how documents become contexts, where that is not the
    default."""
    said = {
        **token_choice(config.tokens, backend).metadata(),
        "mask_column": config.tokens.mask_column,
        "disable_concat_sequences": corpus.config.disable_concat_sequences,
        "chat_template": corpus.config.chat_template,
    }
    return {name: value for name, value in said.items() if value}
