"""Activation source ``live``: the model runs as the batches are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Batch, ConfigError, Entry, Site, hookimpl
from saekit.config import check

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.data import StreamContext

_positive = check(lambda value: value >= 1, "1 or more")


@attrs.frozen(kw_only=True)
class LiveConfig:
    """Runs the model and mixes its activations in a buffer, which is refilled when it is half empty."""

    store_batch_size_prompts: int = attrs.field(default=16, validator=_positive)
    """Contexts in one forward of the model."""
    n_batches_in_buffer: int = attrs.field(default=32, validator=_positive)
    """Forwards that fill the buffer."""


class LiveSource:
    """Shuffled batches from the model itself."""

    def __init__(self, config: LiveConfig, stream: StreamContext) -> None:
        import torch

        from saekit.data import ShuffleBuffer

        self._config = config
        self._stream = stream
        self._rows_per_forward = config.store_batch_size_prompts * stream.contexts.policy.context_size
        capacity = self._rows_per_forward * config.n_batches_in_buffer
        if capacity - self._rows_per_forward + 1 < stream.batch_size:  # a forward is added only where it fits whole
            raise ConfigError(
                f"the buffer holds {capacity:,} activations ({config.n_batches_in_buffer} forwards of "
                f"{config.store_batch_size_prompts} contexts of {stream.contexts.policy.context_size}), too few for "
                f"batches of {stream.batch_size:,} and room for a forward; raise "
                "activations.source.n_batches_in_buffer"
            )
        probe = stream.backend.activations(torch.zeros(1, 2, dtype=torch.long), {next(iter(stream.widths)).hook_name})
        self._buffer = ShuffleBuffer(
            stream.widths,
            capacity,
            generator=torch.Generator().manual_seed(stream.seed),
            dtype=next(iter(probe.values())).dtype,
            device=stream.backend.device,
        )
        self._ended = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        wanted = self._stream.batch_size
        if self._buffer.filled < max(wanted, self._buffer.capacity // 2):
            self._refill()
        if not self._buffer.filled:
            raise StopIteration
        return Batch(self._buffer.take(wanted))

    def peek(self) -> Mapping[Site, Tensor]:
        if not self._buffer.filled:
            self._refill()
        return self._buffer.peek()

    def _refill(self) -> None:
        added = False
        while not self._ended and self._buffer.free >= self._rows_per_forward:
            rows = self._forward()
            if rows is None:
                self._ended = True
            else:
                self._buffer.add(rows)
                added = True
        if added:
            self._buffer.shuffle()

    def _forward(self) -> dict[Site, Tensor] | None:
        import torch

        contexts = self._stream.contexts.take(self._config.store_batch_size_prompts)
        if not len(contexts):
            return None
        held = self._stream.backend.activations(torch.from_numpy(contexts), {s.hook_name for s in self._stream.widths})
        return {site: site.extract(held[site.hook_name]).flatten(0, 1) for site in self._stream.widths}

    def state_dict(self) -> dict[str, Any]:
        contexts = self._stream.contexts.state_dict()
        return {"buffer": self._buffer.state_dict(), "contexts": contexts, "ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._buffer.load_state_dict(state["buffer"])
        self._stream.contexts.load_state_dict(state["contexts"])
        self._ended = state["ended"]

    def close(self) -> None:
        """Nothing runs beside the caller."""


@hookimpl
def saekit_register_activation_sources() -> Iterable[Entry]:
    yield Entry("live", LiveConfig, _build, summary="the model runs as batches are needed; shuffled in memory")


def _build(config: LiveConfig, *, stream: StreamContext) -> LiveSource:
    return LiveSource(config, stream)
