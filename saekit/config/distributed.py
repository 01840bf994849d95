"""How one run is spread over processes."""

from __future__ import annotations

import attrs

from saekit.config.fields import at_least_1, positive
from saekit.config.showing import changed_repr

__all__ = ["DistributedConfig"]


@attrs.frozen(kw_only=True)
class DistributedConfig:
    """How a run is spread over the processes that `torchrun` starts.  Without that, a run is one process."""

    features: int = attrs.field(default=1, validator=at_least_1)
    """Processes over which the features of the SAE are split: each has its part of the weights.  It must divide
    `sae.d_sae` and the number of processes."""
    data: int | None = attrs.field(default=None, validator=at_least_1)
    """Groups of so many processes, each of which trains on its part of every batch.  None: all processes over
    `features`."""
    timeout_s: float = attrs.field(default=600.0, validator=positive)
    """Seconds that a process waits for the others before it gives up."""

    __repr__ = changed_repr
