"""How one run is spread over processes."""

from __future__ import annotations

import attrs

from saekit.config.fields import at_least_1, check
from saekit.config.showing import changed_repr
from saekit.errors import ConfigError

__all__ = ["DistributedConfig"]


@attrs.frozen(kw_only=True)
class DistributedConfig:
    """How a run is spread over the processes that `torchrun` starts.  Without that, a run is one process."""

    features: int = attrs.field(default=1, validator=at_least_1)
    """Processes over which the features of the SAE are split: each has its part of the weights.  It must divide
    `sae.d_sae` and the number of processes."""
    saes: int = attrs.field(default=1, validator=at_least_1)
    """Processes over which the SAEs of a sweep are laid out: each trains some of them, whole, on the same rows.  It
    must divide the number of processes, and there must be as many SAEs or more; then `features` is 1."""
    data: int | None = attrs.field(default=None, validator=at_least_1)
    """Groups of so many processes, each of which trains on its part of every batch.  None: all processes over
    `features`, or over `saes`."""
    timeout_s: float = attrs.field(default=600.0, validator=check(lambda v: v > 0, "above 0", most=10**8))
    """Seconds that a process waits for the others in a step, or for a word of one, before it gives up."""
    stuck_s: float = attrs.field(default=3600.0, validator=check(lambda v: v > 0, "above 0", most=10**8))
    """Seconds for which a process may do nothing at all, neither compute nor read or write, while the others wait for
    it beside steps, before they give up."""

    __repr__ = changed_repr

    def __attrs_post_init__(self) -> None:
        if self.features > 1 and self.saes > 1:
            raise ConfigError(
                [("saes", f"is {self.saes}, and features is {self.features}: processes with the same rows have SAEs of "
                  "their own, or split the features of each; set one of the two to 1")]
            )  # fmt: skip
