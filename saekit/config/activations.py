"""Batches of activations, and their cache."""

from __future__ import annotations

import attrs

from saekit.config.fields import Dtype, PluginChoice, a_size, at_least_1, check, not_empty, path_field, plugin_field
from saekit.config.showing import changed_repr
from saekit.defaults import DEFAULT_SOURCE
from saekit.kinds import ACTIVATION_SOURCES, INPUT_TRANSFORMS
from saekit.site import Site

__all__ = ["ActivationsConfig", "CacheConfig"]


@attrs.frozen(kw_only=True)
class CacheConfig:
    """What `saekit cache` writes.  Training reads it with `activations.source.name=cached` and its `folder`."""

    folder: str = path_field("activations", validator=not_empty)
    """The folder to write, or to go on with."""
    tokens: int | None = attrs.field(default=None, validator=at_least_1)
    """Activation vectors to write, rounded up to whole contexts.  None: `training.training_tokens`."""
    sites: tuple[Site, ...] = ()
    """Sites to write in the same pass beside `site`."""
    dtype: Dtype | None = None
    """The type of the numbers on disk.  None: what the model gives."""
    batch_size_prompts: int = attrs.field(default=16, validator=a_size)
    """Contexts in one forward of the model."""
    shard_megabytes: int = attrs.field(
        default=2048, validator=check(lambda v: 1 <= v <= 8192, "1 to 8192, which can be mapped into little memory")
    )
    """The size of a shard's largest file, about.  After an interruption, writing goes on from the last whole shard;
    many small ones make reading slower."""

    __repr__ = changed_repr


@attrs.frozen(kw_only=True)
class ActivationsConfig:
    """From contexts to shuffled batches."""

    source: PluginChoice = plugin_field(ACTIVATION_SOURCES, DEFAULT_SOURCE)
    """Where batches come from."""
    normalize_activations: PluginChoice | None = plugin_field(INPUT_TRANSFORMS, None)
    """What activations go through before the SAE reads them; none: nothing. `expected_average_only_in` scales them to a
    mean norm of `sqrt(d_in)`, and `whitening` to one variance in all directions: estimated on the first buffer, before
    anything else uses activations, and folded into the weights that are saved, so that they work on raw activations.
    `layer_norm`, `constant_norm` and `rms` normalize each row by itself, and stay a part of the SAE."""
    cache: CacheConfig = attrs.field(factory=CacheConfig)
    """What `saekit cache` writes."""

    __repr__ = changed_repr
