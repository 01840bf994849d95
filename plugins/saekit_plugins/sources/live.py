"""Activation source ``live``: the model runs as the batches are needed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from saekit import Batch, ConfigError, Entry, Site, hookimpl
from saekit.abilities import SourceForwards
from saekit.config import Dtype, check
from saekit.devices import resolve_device

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.data import ShuffleBuffer, StreamContext

_SECONDS_BEFORE_A_WORD = 2.0
_positive = check(lambda value: value >= 1, "1 or more", most=2**24)


@attrs.frozen(kw_only=True)
class LiveConfig:
    """Runs the model and mixes its activations in a buffer, which is refilled when it is half empty."""

    store_batch_size_prompts: int = attrs.field(default=16, validator=_positive)
    """Contexts in one forward of the model.  Halved, with a warning, when the model runs out of memory."""
    n_batches_in_buffer: int = attrs.field(default=32, validator=_positive)
    """Forwards that fill the buffer."""
    refill: Literal["full", "needed"] = "full"
    """How far the buffer is filled up: `full`, or `needed`: to no more activations than training still takes, which
    spares the forwards that a run has left over in the end.  The last batches are drawn from fewer activations then,
    and a run that goes on with more `training.training_tokens` is not as one that had them from the start."""
    act_store_device: str = "with_model"
    """Where the buffer is: `cpu`, `cuda`, ..., or `with_model`."""
    dtype: Dtype | None = None
    """The type of the numbers in the buffer.  None: what the model gives."""
    prefetch: bool = True
    """Run the model in a background thread while the SAE trains.  The batches are the same.  Where the SAEs of a sweep
    are laid out over processes (`distributed.saes`), these run it together instead, each a part, between two steps."""
    tokenize_processes: int = attrs.field(default=0, validator=check(lambda value: value >= 0, "0 or more", most=256))
    """Processes that tokenize texts before the model needs them.  The batches are the same.  0: none, the thread that
    runs the model tokenizes."""

    @property
    def ends_with_training(self) -> bool:
        """Whether batches depend on how many rows training takes: see :class:`saekit.abilities.EndsWithTraining`."""
        return self.refill == "needed"


class LiveSource:
    """Shuffled batches from the model itself."""

    copies_state = True  # the buffer gathers its rows for each, and all else is numbers
    shares_rows = True

    def __init__(self, config: LiveConfig, stream: StreamContext) -> None:
        import torch

        from saekit.data import ActivationStream, DealtActivations, Prefetched

        stream = stream.own
        self._stream, self._config = stream, config
        context_size = stream.contexts.policy.context_size  # opens the text, before the model runs
        rows = stream.rows_per_context(context_size)
        self._rows_per_forward = config.store_batch_size_prompts * rows  # at most, where ids or a mask choose
        self._capacity = self._rows_per_forward * config.n_batches_in_buffer
        if self._capacity - self._rows_per_forward + 1 < stream.batch_size:  # a forward is added where it fits whole
            raise ConfigError(
                f"the buffer holds {self._capacity:,} activations ({config.n_batches_in_buffer} forwards of "
                f"{config.store_batch_size_prompts} contexts of {rows}), too few for "
                f"batches of {stream.batch_size:,} and room for a forward; raise "
                "activations.source.n_batches_in_buffer"
            )
        own_device = config.act_store_device == "with_model"
        self._device = (
            stream.backend.device
            if own_device
            else resolve_device(config.act_store_device, "activations.source.act_store_device", config.dtype)
        )
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self._dtypes = {site: dtype or held for site, held in stream.dtypes.items()}
        readers = stream.readers.size
        kind = ActivationStream if readers == 1 else DealtActivations
        self._model = kind(stream, config.store_batch_size_prompts, device=self._device, dtype=dtype)
        # Ahead by as much as a batch uses, so that the thread need not wait while an SAE trains on one.
        depth = -(-stream.batch_size // self._rows_per_forward)
        ahead = config.prefetch and readers == 1  # threads of several processes would not end at one forward
        self._prefetched = Prefetched(self._model, depth) if ahead else None
        self._rows_ahead = (depth if ahead else readers if readers > 1 else 0) * self._rows_per_forward
        self._forwards: Any = self._prefetched or self._model
        self._least = max(stream.batch_size, self._capacity // 2)  # with fewer rows, the buffer is filled up
        self._made: ShuffleBuffer | None = None
        self._ended = False
        if config.tokenize_processes:
            stream.contexts.tokenize_ahead(config.tokenize_processes, "activations.source.tokenize_processes")
        self._shuffled: Any = (self._model.state_dict(), False)  # how far the text was read at the last shuffle

    @property
    def _buffer(self) -> ShuffleBuffer:
        """Made when the first activations come, so that a run can be planned where its buffer does not fit."""
        import torch

        from saekit.data import ShuffleBuffer

        if self._made is None:
            generator = torch.Generator().manual_seed(self._stream.seed)
            try:
                self._made = ShuffleBuffer(
                    self._stream.widths,
                    self._capacity,
                    generator=generator,
                    dtypes=self._dtypes,
                    device=self._device,
                    recipes=self._stream.keeps_recipe,
                )
            except RuntimeError as error:  # torch has no type of its own for this on every device
                raise ConfigError(
                    f"the buffer of {self._capacity:,} activations ({self.memory_bytes() / 1e9:,.1f} GB) cannot be "
                    f"allocated on {self._device}: lower activations.source.n_batches_in_buffer, or choose another "
                    "act_store_device or dtype"
                ) from error
        return self._made

    @property
    def source_forwards(self) -> SourceForwards:
        """As the options have it."""
        config = self._config
        return SourceForwards(
            contexts=config.store_batch_size_prompts,
            buffered=config.n_batches_in_buffer,
            ahead=self._prefetched is not None,
            needed=config.ends_with_training,
            needed_line="activations.source.refill=needed",
            tokenizing=config.tokenize_processes,
            device=None if config.act_store_device == "with_model" else self._device,
            dtype=config.dtype,
            contexts_option="activations.source.store_batch_size_prompts",
            buffered_option="activations.source.n_batches_in_buffer",
        )

    def memory_bytes(self) -> int:
        """Those of the buffer, when it is there, and of the forwards that are made ahead."""
        row = sum(width * self._dtypes[site].itemsize for site, width in self._stream.widths.items())
        return (self._capacity + self._rows_ahead) * row

    def recipe_size(self) -> tuple[int, int]:
        """After the buffer was filled up many times.

        Of what is in it then, about half is left when it is filled up again, so the last of a forward's rows is served
        long after most of them.
        """
        rows, size, capacity = self._rows_per_forward, self._stream.contexts.policy.context_size, self._capacity
        batch = self._stream.batch_size
        served = batch * ((capacity - max(batch, capacity // 2)) // batch + 1)
        left, added = capacity - served, served // rows
        forwards = self._config.n_batches_in_buffer
        if left > 0 and added > 0:
            # Of n rows, a part p of which is left each time, the last goes after H_n / -log(p) + 1/2 times, about.
            harmonic = math.log(rows) + 0.5772 + 1 / (2 * rows)
            forwards = math.ceil(added * (harmonic / -math.log(left / capacity) + 0.5))
        contexts = forwards * self._config.store_batch_size_prompts
        return capacity * (4 + 2) + contexts * (4 * size + 16) + 8 * forwards, forwards

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        wanted, buffer = self._stream.batch_size, self._buffer
        if buffer.filled < self._least:
            self._refill()
        elif self._prefetched is not None and self._to_come() != 0 and not self._shares_what_is_left:
            # What the thread has made goes to slots that came free, to be mixed in at the next refill.
            while self._takes_more() and self._prefetched.available():
                self._add()
        if not buffer.filled:
            raise StopIteration
        return buffer.take(wanted)

    def peek(self) -> Mapping[Site, Tensor]:
        import torch

        if not self._buffer.filled:
            self._refill()
        rows, n, wanted = self._buffer.peek(), self._buffer.filled, -(-self._capacity // self._stream.processes)
        if n <= wanted:
            return rows
        # Of several processes, which together show as many as one; from the whole buffer, since neighbours are alike.
        shown = torch.arange(wanted) * n // wanted
        return {site: values[shown.to(values.device)] for site, values in rows.items()}

    def _refill(self) -> None:
        start = time.monotonic()
        next_word = _SECONDS_BEFORE_A_WORD if self._buffer.free == self._capacity else math.inf
        while self._takes_more():
            if (seconds := time.monotonic() - start) >= next_word:  # the first filling is long, and so told of
                next_word = 2 * seconds
                here = self._buffer.waiting
                wanted = min(self._capacity, here + self._lacking())
                self._stream.say(f"filling the buffer, {here:,} of {wanted:,} activations")
            self._add()
        if self._buffer.waiting:
            self._buffer.shuffle()
        self._shuffled = (self._forwards.state_dict(), self._ended)

    def _takes_more(self) -> bool:
        """Whether a forward has its place in the buffer, and its use."""
        return not self._ended and self._buffer.free >= self._rows_per_forward and self._lacking() > 0

    def _lacking(self) -> float:
        """Rows that are neither there nor needless; each batch takes them from what is there and from what is left, so
        it makes no difference when this is asked."""
        if self._config.refill == "full" or (left := self._stream.left()) is None:
            return math.inf
        return -(-left // self._stream.processes) - self._buffer.filled - self._buffer.waiting

    @property
    def _shares_what_is_left(self) -> bool:
        """Whether each of several processes takes a part of what is left, which need not be the same in each batch."""
        return self._config.refill == "needed" and self._stream.processes > 1

    def _to_come(self) -> int | None:
        """Forwards still needed for what is still to be taken; None: more than are made ahead, or that is not known."""
        if (left := self._stream.left()) is None or self._prefetched is None:
            return None
        if (lacking := self._lacking()) <= self._rows_ahead:
            return math.ceil(max(lacking, 0) / self._rows_per_forward)
        if self._config.refill == "needed":
            return None
        rows, filled, free = -(-left // self._stream.processes), self._buffer.filled, self._buffer.free
        wanted, size, found = self._stream.batch_size, self._rows_per_forward, 0
        while (batches := max((filled - self._least) // wanted + 1, 0)) * wanted < rows:
            rows, free = rows - batches * wanted, free + batches * wanted
            found, free = found + free // size, free % size
            filled = self._capacity - free
            if found * size > self._rows_ahead + size or filled < self._least:
                return None
        return found

    def _add(self) -> None:
        """One forward; the thread makes no others ahead than are still needed."""
        to_come = self._to_come()
        ahead = None if to_come is None else max(to_come - 1, 0)
        try:
            rows = next(self._model) if self._prefetched is None else self._prefetched.next_of(ahead)
        except StopIteration:
            self._ended = True
        else:
            self._buffer.add(rows)

    def state_dict(self) -> dict[str, Any]:
        # How many rows wait by now is a matter of time; they are made again, so that the same step has the same state.
        contexts, ended = self._shuffled
        from saekit.data import computed_by

        made_with = {"made_with": computed_by(self._stream.backend.device)} if self._stream.keeps_recipe else {}
        buffer = self._buffer.state_dict(waiting=False)
        return {"buffer": buffer, "contexts": contexts, "ended": ended, **made_with}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._buffer.load_state_dict(self._with_rows(state))
        self._forwards.load_state_dict(state["contexts"])
        self._ended = state["ended"] and not self._stream.repeat  # which may be allowed by now
        self._shuffled = (state["contexts"], state["ended"])

    def _with_rows(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state of the buffer, where that has a recipe with the rows that the model makes by it."""
        from saekit.data import told_of_others, with_rows

        self.pause()
        self._buffer.check_fits(state["buffer"])
        found, differing = with_rows(state["buffer"], self._model.again, self._stream.say)
        if differing:
            now, rows = self._stream.backend.device, len(found["origins"])
            self._stream.differs(told_of_others(differing, rows, state["made_with"], now))
        return found

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        from saekit.data import buffer_handed_over

        contexts = self._model.taken_over([state["contexts"] for state in states])
        place = self._stream.process, self._stream.processes
        buffers = [state["buffer"] for state in states]
        buffer = buffer_handed_over(buffers, *place, made=lambda which: self._with_rows(states[which]))
        self.load_state_dict({"buffer": buffer, "contexts": contexts, "ended": False})

    def pause(self) -> None:
        """End the background thread; the next batch starts it again, where it would have gone on."""
        if self._prefetched is not None:
            self._prefetched.close()

    def close(self) -> None:
        self.pause()
        self._stream.contexts.close()


@hookimpl
def saekit_register_activation_sources() -> Iterable[Entry]:
    yield Entry("live", LiveConfig, LiveSource, summary="the model runs as batches are needed; shuffled in memory")
