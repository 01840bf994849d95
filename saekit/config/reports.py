"""What a run leaves behind to be looked at."""

from __future__ import annotations

import attrs

__all__ = ["ReportsConfig"]


@attrs.frozen(kw_only=True)
class ReportsConfig:
    """What a run leaves behind to be looked at.  It changes nothing of the run, which goes on with any of these."""

    pictures: bool = True
    """When training ends, draw its metrics: `curves.png` and `curves.html`; of a sweep also `summary.png` and
    `summary.html`."""
