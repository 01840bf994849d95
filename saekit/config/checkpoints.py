"""Where a run is kept."""

from __future__ import annotations

from typing import Literal

import attrs

from saekit.config.fields import at_least_0, not_empty, path_field
from saekit.config.showing import changed_repr

__all__ = ["CheckpointsConfig"]


@attrs.frozen(kw_only=True)
class CheckpointsConfig:
    """Where a run is kept."""

    folder: str = path_field("runs", validator=not_empty)
    """The folder that holds the run folders."""
    name: str | None = None
    """The run folder's name, which must be new.  None: the date, the site and a number that is free."""
    n_checkpoints: int = attrs.field(default=0, validator=at_least_0)
    """Checkpoints at even distances during training; the SAEs in them are kept."""
    every_minutes: float = attrs.field(default=30.0, validator=at_least_0)
    """Minutes between two checkpoints; 0: none by the clock."""
    keep_last: int = attrs.field(default=2, validator=at_least_0)
    """Checkpoints that a run can go on from are kept up to this number, the newest ones; 0: no checkpoints, and a run
    that ends early cannot be resumed."""

    buffer: Literal["rows", "recipe"] = "rows"
    """What a checkpoint has of activations that were mixed and not yet trained on: the `rows` themselves, or a
    `recipe`: the tokens that they are of, many times smaller.  A run that goes on then runs the model on them again."""

    __repr__ = changed_repr
