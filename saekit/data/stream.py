"""What an activation source is built from."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from saekit.data.contexts import ContextStream
from saekit.protocols import ModelBackend
from saekit.site import Site

__all__ = ["StreamContext"]


@attrs.frozen
class StreamContext:
    """Everything that a source of activations may draw on."""

    backend: ModelBackend
    contexts: ContextStream
    widths: Mapping[Site, int]
    """The sites to read, and the width of each."""
    batch_size: int
    """Rows in a batch."""
    seed: int
    """For the source's own generators."""
