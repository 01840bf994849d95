"""Stage three: the model's activations on contexts, one forward at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.cautions import warn
from saekit.data.contexts import Contexts
from saekit.data.faults import check_counts
from saekit.data.recipe import ForwardInput, MadeBatch, row_sums
from saekit.data.stream import StreamContext, check_by_token, kept_of
from saekit.devices import free_memory, sent
from saekit.errors import DataError, ModelError
from saekit.site import Site
from saekit.values import Batch

__all__ = ["ActivationStream", "DealtActivations", "check_contexts", "is_out_of_memory"]

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What libraries say in errors of other classes."""


class ActivationStream:
    """One :class:`~saekit.Batch` per forward of ``batch_size_prompts`` contexts, in the order of the text.

    Its rows are those of the contexts one after the other: context ``i`` has rows ``i * context_size`` on.  Where not
    every token counts (``stream.choice``, and a mask that contexts have), the others' rows are left out, and forwards
    of which nothing is left are passed over.  They are handed out on ``device`` (None: where the model runs) in
    ``dtype`` (None: as the model gives them).  When a forward runs out of memory, it and the ones after it are run in
    halves, with one warning.
    """

    def __init__(
        self,
        stream: StreamContext,
        batch_size_prompts: int,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._stream, self._contexts = stream, stream.contexts
        self._batch_size = batch_size_prompts
        self._at_once = batch_size_prompts  # fewer after the model ran out of memory
        self._device, self._dtype = device, dtype
        self._barren_since: int | None = None  # the reading of the text in which the last forwards began to have none

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while not len(batch := self._next()):
            self._check_barren()
        self._barren_since = None
        return batch

    def _check_barren(self) -> None:
        """Text that is read again and again, and of which nothing counts, would never end."""
        readings = self._contexts.readings
        if self._barren_since is None:
            self._barren_since = readings
        if readings > self._barren_since + 1:
            raise DataError(
                "no token of the text counts: what tokens.exclude_special_tokens, tokens.seqpos_slice and "
                "tokens.mask_column leave of it is nothing"
            )

    def _next(self) -> Batch:
        with self._stream.model_lock:  # its tokenizer may not be used by two threads either
            before = self._contexts.state_dict()
            contexts = self._contexts.take(self._batch_size)
        if not len(contexts):
            raise StopIteration
        try:
            return self.run(contexts)
        except BaseException:
            self._contexts.load_state_dict(before)  # so that a run that goes on later does not miss them
            raise

    def run(self, contexts: Contexts) -> Batch:
        """The activations of ``contexts``, of the positions that count."""
        kept = self._kept_of(contexts)
        rows, sizes = self._in_parts(torch.from_numpy(contexts.tokens), kept)
        return self._batch(contexts, kept, rows, sizes)

    def _kept_of(self, contexts: Contexts) -> Tensor | None:
        """``[n, context_size]`` bool: which tokens count; None: all do."""
        return None if self._stream.counts_all else kept_of(self._stream.choice, contexts)

    def _batch(
        self, contexts: Contexts, kept: Tensor | None, rows: dict[Site, Tensor], sizes: tuple[int, ...]
    ) -> Batch:
        """The ``rows`` of ``contexts``, of which the model took ``sizes`` at once each time, with what they are of."""
        tokens, documents = torch.from_numpy(contexts.tokens), torch.from_numpy(contexts.documents)
        origins: dict[str, Any] = {
            "tokens": tokens.flatten(),
            "documents": documents.flatten(),
            "positions": torch.arange(tokens.shape[1]).repeat(len(tokens)),
        }
        if kept is not None:
            origins = {name: values[kept.flatten()] for name, values in origins.items()}
        if not self._stream.keeps_recipe:
            return Batch(rows, **origins)
        places = torch.arange(tokens.numel()) if kept is None else kept.flatten().nonzero()[:, 0]
        forward = ForwardInput(tokens.to(torch.int32), documents, sizes)
        return MadeBatch(rows, **origins, forward=forward, places=places, sums=row_sums(rows))

    def again(self, forward: ForwardInput, kept: Tensor) -> dict[Site, Tensor]:
        """The rows of the tokens that ``kept [n, context_size]`` chooses, as they came out when they were first made.

        Where the model runs out of memory, in halves, as ever.
        """
        if not _are_ids(forward.tokens, self._stream.backend.d_vocab):
            raise ValueError("the tokens of the saved buffer are not of the model's vocabulary")
        rows, _ = self._in_parts(forward.tokens.long(), kept, forward.sizes)
        return rows

    def _in_parts(
        self, tokens: Tensor, kept: Tensor | None, sizes: Sequence[int] = ()
    ) -> tuple[dict[Site, Tensor], tuple[int, ...]]:
        """The rows of ``tokens [n, context_size]`` that are ``kept``, and how many contexts the model took at once each
        time; ``sizes`` of them, as long as they fit into memory."""
        parts: list[dict[Site, Tensor]] = []
        made: list[int] = []
        while (done := sum(made)) < len(tokens):
            failure: BaseException | None = None
            size = sizes[len(made)] if len(made) < len(sizes) else self._at_once
            now = slice(done, done + size)
            try:
                parts.append(self._forward(tokens[now], None if kept is None else kept[now]))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold the tensors of the forward
            if failure is not None:
                self._halve(min(size, len(tokens)), failure)
                sizes = ()
            else:
                made.append(len(tokens[now]))
        rows = {
            site: torch.cat([part[site] for part in parts]) if len(parts) > 1 else parts[0][site] for site in parts[0]
        }
        return rows, tuple(made)

    def _forward(self, tokens: Tensor, kept: Tensor | None) -> dict[Site, Tensor]:
        sites = self._stream.sites
        with self._stream.model_lock:
            held = self._stream.backend.run(tokens, read={site.hook_name for site in sites}).held
            for site in sites:
                check_by_token(site, held[site.hook_name], tokens)
            rows = {site: site.extract(held[site.hook_name]).flatten(0, 1) for site in sites}
            if kept is not None:  # before they are moved or made of another type
                left = kept.flatten().nonzero()[:, 0]
                rows = {site: values[sent(values.device, left)] for site, values in rows.items()}
            return {site: self._kept(values, own=kept is not None) for site, values in rows.items()}

    def _kept(self, values: Tensor, *, own: bool) -> Tensor:
        """``values`` where and as they are handed out, in memory of their own, which those that are ``own`` have."""
        kept = values if self._dtype is None else values.to(self._dtype)
        rounded = self._dtype == torch.float16 != values.dtype
        if rounded and kept.isinf().any() and not values.isinf().any():  # on a GPU, this is waited for
            raise DataError(
                f"activations are as large as {values.abs().max():,.0f}, which float16 cannot hold: choose bfloat16"
            )
        kept = kept if self._device is None else sent(self._device, kept)
        # A view would keep what the model holds, of other heads, too, and its next forward may write there.
        return kept.clone() if kept is values and not own else kept

    def _halve(self, at_once: int, error: BaseException) -> None:
        """After a forward of so many contexts."""
        if at_once == 1:
            raise ModelError(
                f"the model {self._stream.backend.name!r} runs out of memory on one context of "
                f"{self._contexts.policy.context_size} tokens. Lower dataset.context_size, or choose a smaller "
                "model.dtype or another model.device"
            ) from error
        if self._at_once == self._batch_size:
            warn(
                f"the model ran out of memory on {at_once} contexts at once; it goes on with fewer. Lower the source's "
                "batch size (store_batch_size_prompts) to avoid the attempt",
                RuntimeWarning,
            )
        self._at_once = at_once // 2
        free_memory()

    def state_dict(self) -> dict[str, Any]:
        """The position in the text, and how many contexts the model takes at once."""
        return {"contexts": self._contexts.state_dict(), "at_once": self._at_once}

    def taken_over(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state in which this goes on where others were, on other parts of the text, in ``states``."""
        contexts = self._contexts.taken_over([state["contexts"] for state in states])
        return {"contexts": contexts, "at_once": min(state["at_once"] for state in states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next context."""
        check_counts(state, "at_once")
        self._contexts.load_state_dict(state["contexts"])
        self._at_once = max(min(state["at_once"], self._batch_size), 1)


def _are_ids(tokens: Tensor, d_vocab: int) -> bool:
    return not tokens.numel() or (int(tokens.min()) >= 0 and int(tokens.max()) < d_vocab)


class DealtActivations(ActivationStream):
    """The same batches, on processes that all read the same text (``stream.readers``) and deal its forwards out.

    Each reads the contexts of as many forwards as there are processes, runs the model on its own of them, and has the
    others' rows from them: so much is sent, and so many batches are held.  All must ask for each batch, in one order.
    """

    def __init__(
        self,
        stream: StreamContext,
        batch_size_prompts: int,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(stream, batch_size_prompts, device=device, dtype=dtype)
        self._made: deque[tuple[Batch, dict[str, Any]]] = deque()
        self._read: dict[str, Any] | None = None  # how far the text was read for what was handed out; None: all is

    def _next(self) -> Batch:
        if not self._made:
            self._made.extend(self._round())
        batch, self._read = self._made.popleft()
        return batch

    def _round(self) -> list[tuple[Batch, dict[str, Any]]]:
        """A forward of each process, as far as there is text, and how far it was read for each."""
        group, before = self._stream.readers, self._contexts.state_dict()
        turns: list[tuple[Contexts, dict[str, Any]]] = []
        try:
            with self._stream.model_lock:
                while len(turns) < group.size and len(contexts := self._contexts.take(self._batch_size)):
                    turns.append((contexts, self._contexts.state_dict()))
            if not turns:
                raise StopIteration
            kept = [self._kept_of(contexts) for contexts, _ in turns]
            counts = [
                contexts.tokens.size if chosen is None else int(chosen.sum())
                for (contexts, _), chosen in zip(turns, kept, strict=True)
            ] + [0] * (group.size - len(turns))
            own, sizes = self._nothing(), tuple[int, ...]()
            if group.rank < len(turns):
                own, sizes = self._in_parts(torch.from_numpy(turns[group.rank][0].tokens), kept[group.rank])
            found = {site: group.gather_rows(values, counts) for site, values in own.items()} if any(counts) else {}
            taken = self._all_sizes(sizes, own) if self._stream.keeps_recipe else [()] * group.size
        except BaseException:
            self._contexts.load_state_dict(before)
            raise
        made = []
        for turn, (contexts, read) in enumerate(turns):
            rows = {site: found[site][turn] if found else own[site][:0] for site in own}
            made.append((self._batch(contexts, kept[turn], rows, taken[turn]), read))
        return made

    def _all_sizes(self, sizes: tuple[int, ...], own: Mapping[Site, Tensor]) -> list[tuple[int, ...]]:
        """In what parts each process's forward went: by a message of the engine's, since this is asked every time."""
        device = next(value.device for value in own.values())
        padded = torch.zeros(self._batch_size, dtype=torch.int64, device=device)
        padded[: len(sizes)] = torch.tensor(sizes, dtype=torch.int64, device=device)
        return [tuple(size for size in one.tolist() if size) for one in self._stream.readers.gather(padded)]

    def _nothing(self) -> dict[Site, Tensor]:
        """No rows, such as a forward would have given."""
        stream, device = self._stream, self._device or self._stream.backend.device
        return {
            site: torch.empty(0, width, dtype=self._dtype or stream.dtypes[site], device=device)
            for site, width in stream.widths.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """As of the last batch that was handed out."""
        state = super().state_dict()
        return state if self._read is None else {**state, "contexts": self._read}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._made.clear()
        self._read = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory left, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


def check_contexts(contexts: int, context_size: int) -> None:
    """Refuse data that gave no context."""
    if not contexts:
        raise DataError(f"the data does not fill one context of {context_size} tokens")
