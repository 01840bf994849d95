"""The model of a plan without its weights."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from saekit.config import TrainConfig
from saekit.data.stream import probe
from saekit.errors import ModelError
from saekit.kinds import MODEL_BACKENDS
from saekit.plugins.building import blamed, outlined
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.opening import sites_by_option
from saekit.tokens import special_ids

__all__ = ["of_outline", "outlined_for"]


def outlined_for(configs: Sequence[TrainConfig], plugins: PluginManager) -> ModelBackend:
    """The model that all of ``configs`` have; :class:`ModelError` where its backend cannot make one without weights."""
    chosen = plugins.bound(MODEL_BACKENDS, configs[0].model.backend)
    made: ModelBackend | None = outlined(chosen.item, chosen.options, model=configs[0].model)
    if made is None:
        raise ModelError(f"the backend {chosen.key!r} cannot tell the sizes of a model before it is loaded")
    hooks = set(made.hook_names())
    sites = [site for some in sites_by_option(configs).values() for site in some if site.hook_name in hooks]
    with blamed(chosen.item, "a forward of its outline"):  # of some models, shapes depend on numbers
        probe(made, sites)
    return made


def of_outline(config: TrainConfig, outline: ModelBackend) -> TrainConfig:
    """``config``, with some id in the place of special tokens, which an outline has no tokenizer to tell.

    No size depends on which they are.
    """
    if config.tokens.exclude_special_tokens is not True or special_ids(outline):
        return config
    return attrs.evolve(config, tokens=attrs.evolve(config.tokens, exclude_special_tokens=(0,)))
