"""Measurements."""

from __future__ import annotations

import attrs

from saekit.config.fields import PluginChoice, a_size, at_least_0, check, plugin_field
from saekit.config.showing import changed_repr
from saekit.defaults import DEFAULT_EVALS
from saekit.kinds import EVALS
from saekit.plugins.choice import Choice

__all__ = ["EvalsConfig"]


@attrs.frozen(kw_only=True)
class EvalsConfig:
    """Measurements on text that is never trained on."""

    run: tuple[PluginChoice, ...] = plugin_field(EVALS, DEFAULT_EVALS)
    """What to measure, at the end of training and every `every_n_steps`."""
    every_n_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps between two evals during training; 0: only at the end."""
    n_contexts: int = attrs.field(default=64, validator=a_size)
    """Held-out contexts to measure on."""
    split: str | None = None
    """A split of the dataset to measure on.  None: one document in `held_out_every` is kept from training."""
    held_out_every: int = attrs.field(default=20, validator=check(lambda v: v == 0 or v >= 2, "0, or 2 or more"))
    """See `split`.  0 trains on every document."""

    __repr__ = changed_repr

    @property
    def reads_text(self) -> bool:
        """Whether anything that is measured needs held-out text."""
        return any(not isinstance(choice, Choice) or choice.needs_text for choice in self.run)
