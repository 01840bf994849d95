"""How the rows of a buffer can be computed again: which contexts the model was given together, and each row's place.

A checkpoint holds this in the place of rows where it is asked to (``checkpoints.buffer = "recipe"``).  The model is
given the very same contexts at once, so that the same machine computes the very same bits; checksums tell where it
does not.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.devices import sent
from saekit.precision import current_precision
from saekit.shapes import by_shapes
from saekit.site import Site
from saekit.values import Batch

__all__ = [
    "ForwardInput",
    "MadeBatch",
    "RowRecipes",
    "computed_by",
    "row_sums",
    "told_of_others",
    "with_rows",
    "with_unknown",
]

_LARGEST_INT16 = 2**15 - 1
_SECONDS_BETWEEN_LINES = 10.0


@attrs.frozen(eq=False)
class ForwardInput:
    """What the model was given for the rows of one :class:`MadeBatch`."""

    tokens: Tensor
    """``[n, context_size]`` int32."""
    documents: Tensor
    """``[n, context_size]``: the document of each token."""
    sizes: tuple[int, ...]
    """Contexts that the model ran on at once, one time after the other: their sum is ``n``."""


@attrs.frozen(eq=False, kw_only=True)
class MadeBatch(Batch):
    """The rows of one forward, and how to make them again."""

    forward: ForwardInput
    places: Tensor
    """``[rows]``: the number of each row's token among those of the forward, ``context * context_size + position``."""
    sums: Tensor
    """``[rows]`` int64: see :func:`row_sums`."""

    __repr__ = by_shapes


# ---- checksums


def row_sums(activations: Mapping[Site, Tensor]) -> Tensor:
    """``[n]`` int64: a checksum of the bits of each row, at all sites together, on the device of those of the first.

    Words of 8 bytes (where a row has no whole number of them, single numbers) times odd numbers, added up modulo 2^64:
    a row with one other word has another.  Sums of sites after the first are stirred before they are added: odd numbers
    differ by even ones, so what differs in a word's highest bits alone would cancel where sites are exchanged.
    """
    whole: Tensor | None = None
    for number, rows in enumerate(activations.values()):
        words = _words(rows)
        sums = (words * sent(words.device, _odd_numbers(words.shape[1], number))).sum(1)
        whole = sums if whole is None else whole + _stirred(sums).to(whole.device)
    assert whole is not None
    return whole


def _words(rows: Tensor) -> Tensor:
    rows = rows.detach().contiguous()
    if rows.shape[1] * rows.itemsize % 8 == 0:
        rows = rows if rows.storage_offset() * rows.itemsize % 8 == 0 else rows.clone()
        return rows.view(torch.int64)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return rows.view(kinds[rows.itemsize]).to(torch.int64)


def _stirred(sums: Tensor) -> Tensor:
    """Others for others, with high bits and low bits mixed (the last steps of splitmix64)."""
    sums = (sums ^ (sums >> 32 & (1 << 32) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return sums ^ (sums >> 31 & (1 << 33) - 1)


@functools.lru_cache(maxsize=64)
def _odd_numbers(n: int, which: int) -> Tensor:
    """``[n]`` odd numbers without a pattern, the same on every machine (splitmix64: Steele et al. 2014)."""
    mixed = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(which << 32)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)).view(np.int64))


def _of_forward(sums: Tensor, places: Tensor) -> Tensor:
    """The checksums of rows so that they can be added up, whichever rows there are: each by its place."""
    return sums * (2 * places + 1)


def computed_by(device: str) -> dict[str, str]:
    """What the last digits of a forward depend on beside the model and its input, as far as it is known, by name."""
    where = torch.device(device)
    known = {"torch": torch.__version__, "matmul precision": current_precision()}
    if where.type == "cuda":
        return known | {"device": torch.cuda.get_device_name(where)}
    if where.type == "cpu":
        return known | {
            "device": f"a CPU with {torch.backends.cpu.get_cpu_capability()}",
            "threads": str(torch.get_num_threads()),
        }
    return known | {"device": where.type}


def told_of_others(differing: int, rows: int, before: Mapping[str, str], device: str) -> str:
    """In words that ``differing`` of ``rows`` were not computed as ``before``, and what has changed since then."""
    now = computed_by(device)
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    changed = [f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}" for name in names]
    why = "; ".join(changed) or f"{' and '.join(now)} are the same, so the model or the code that runs it is another"
    return (
        f"of {rows:,} activations that waited in the buffer, {differing:,} are of forwards that do not come out as "
        f"they did, bit for bit: {why}"
    )


# ---- while rows wait in a buffer


class RowRecipes:
    """For each slot of a buffer, how the row in it was made; rows of which nobody knows have none."""

    def __init__(self, capacity: int) -> None:
        self._forward = torch.full((capacity,), -1)  # the number of its forward; -1: not known
        self._place = torch.zeros(capacity, dtype=torch.long)
        self._sum = torch.zeros(capacity, dtype=torch.long)
        self._forwards: dict[int, ForwardInput] = {}
        self._made = 0

    def note(self, slots: Tensor, batch: Batch) -> None:
        """``slots`` have the rows of ``batch`` from now on."""
        if not isinstance(batch, MadeBatch):
            self._forward[slots] = -1
            return
        self._forward[slots], self._place[slots] = self._made, batch.places
        # Checksums stay where they were made: on a GPU, each forward would be waited for.
        self._sum = sent(batch.sums.device, self._sum)
        self._sum.index_copy_(0, sent(self._sum.device, slots), batch.sums)
        self._forwards[self._made] = batch.forward
        self._made += 1

    def known(self, slots: Tensor) -> Tensor:
        """``[n]`` bool: which of the rows in ``slots`` can be made again."""
        return self._forward[slots] >= 0

    def forget_all_but(self, slots: Tensor) -> None:
        """Keep of no forward of which no row is in ``slots``."""
        left = _numbers_in(self._forward[slots])
        self._forwards = {number: self._forwards[number] for number in left}

    def state_dict(self, slots: Tensor) -> dict[str, Any]:
        """How to make the rows in ``slots`` again, in their order; see :func:`with_rows`."""
        forward, place = self._forward[slots], self._place[slots]
        known = forward >= 0
        left = _numbers_in(forward)
        inputs = [self._forwards[number] for number in left]
        size = inputs[0].tokens.shape[1] if inputs else 1
        index = torch.searchsorted(torch.tensor(left, dtype=torch.long), forward.clamp(min=0))
        before = torch.tensor([0, *(len(one.tokens) for one in inputs)]).cumsum(0)
        sums = torch.zeros(len(inputs), dtype=torch.long)
        sums.index_add_(0, index[known], _of_forward(self._sum.cpu()[slots], place)[known])
        contexts = torch.where(known, before[index.clamp(max=len(inputs))] + place // size, -1)
        positions = torch.where(known, place % size, 0)
        return {
            "tokens": torch.cat([one.tokens for one in inputs]) if inputs else torch.zeros(0, size, dtype=torch.int32),
            "documents": _runs([one.documents for one in inputs]),
            "forwards": [list(one.sizes) for one in inputs],
            "sums": sums,
            "contexts": contexts.to(torch.int32),
            "positions": positions.to(torch.int16 if size <= _LARGEST_INT16 else torch.int32),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """The first slots have the rows of which ``state`` says how they are made, after :func:`with_rows`.

        None: of no row it is known.
        """
        self._forward.fill_(-1)
        self._forwards, self._made, self._sum = {}, 0, self._sum.cpu()
        if state is None:
            return
        recipe = _Recipe.of(state)
        for one in recipe.forwards():
            self._forward[one.rows], self._place[one.rows] = self._made, one.places
            self._sum[one.rows] = state["row_sums"][one.rows]
            self._forwards[self._made] = one.input
            self._made += 1


def _numbers_in(forwards: Tensor) -> list[int]:
    """Which numbers from 0 there are, in their order."""
    found = forwards[forwards >= 0]
    if not len(found):
        return []
    low = int(found.min())
    return [low + int(number) for number in torch.bincount(found - low).nonzero()[:, 0]]


def _runs(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Where another document begins, and which it is, of tokens one after the other."""
    whole = torch.cat([part.flatten() for part in documents]) if documents else torch.zeros(0, dtype=torch.long)
    begins = torch.ones(len(whole), dtype=torch.bool)
    begins[1:] = whole[1:] != whole[:-1]
    starts = begins.nonzero()[:, 0]
    return {"starts": starts, "numbers": whole[starts]}


# ---- when a run goes on


@attrs.frozen(eq=False)
class _Again:
    """One forward that is to be made again."""

    input: ForwardInput
    rows: Tensor
    """``[m]``: which rows of the buffer are of it, in the order of their places."""
    places: Tensor
    """``[m]``, ascending."""

    @property
    def kept(self) -> Tensor:
        """``[n, context_size]`` bool: the tokens whose rows are wanted."""
        kept = torch.zeros(self.input.tokens.numel(), dtype=torch.bool)
        kept[self.places] = True
        return kept.view(self.input.tokens.shape)


@attrs.frozen(eq=False)
class _Recipe:
    """A recipe as it was read from a file, checked."""

    tokens: Tensor
    documents: Tensor
    sizes: Sequence[tuple[int, ...]]
    sums: Tensor
    places: Tensor
    """``[rows]``: of each row the number of its token among all; below 0: the row itself is there."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Recipe:
        """:class:`ValueError` for what was never written so."""
        tokens, contexts, positions = state["tokens"], state["contexts"].long(), state["positions"].long()
        sizes = [tuple(forward) for forward in state["forwards"]]
        n, size = tokens.shape
        fine = [
            all(type(some) is int and some > 0 for forward in sizes for some in forward) and all(sizes),
            sum(map(sum, sizes)) == n and tuple(state["sums"].shape) == (len(sizes),),
            contexts.shape == positions.shape and contexts.ndim == 1 and size > 0,
            tokens.dtype == torch.int32 and state["sums"].dtype == torch.long,
        ]
        if not all(fine) or not _within(contexts, -1, n) or not _within(positions, 0, size):
            raise ValueError("the recipe of the saved buffer is not as saekit writes it")
        places = torch.where(contexts >= 0, contexts * size + positions, -1)
        known = places[places >= 0]
        if len(known.unique()) < len(known):
            raise ValueError("the recipe of the saved buffer has a row twice")
        return cls(tokens, _from_runs(state["documents"], tokens), sizes, state["sums"], places)

    def forwards(self) -> Iterator[_Again]:
        """In the order in which they were made, each with the rows that are wanted of it."""
        size, first = self.tokens.shape[1], 0
        order = self.places.argsort(stable=True)
        ordered = self.places[order]
        for sizes in self.sizes:
            last = first + sum(sizes)
            start, end = (int(torch.searchsorted(ordered, place * size)) for place in (first, last))
            made_from = ForwardInput(self.tokens[first:last], self.documents[first:last], sizes)
            yield _Again(made_from, order[start:end], ordered[start:end] - first * size)
            first = last


def _within(values: Tensor, low: int, end: int) -> bool:
    return not len(values) or (int(values.min()) >= low and int(values.max()) < end)


def _from_runs(runs: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The document of each of ``tokens``, from :func:`_runs`."""
    starts, numbers, n = runs["starts"].long(), runs["numbers"], tokens.numel()
    ends = torch.cat([starts[1:], torch.tensor([n])]) if len(starts) else starts
    if starts.shape != numbers.shape or bool(n) != bool(len(starts)) or (n and int(starts[0])):
        raise ValueError("the documents of the saved buffer are not those of its tokens")
    if not bool((ends > starts).all()):
        raise ValueError("the documents of the saved buffer do not begin one after the other")
    return numbers.repeat_interleave(ends - starts).view(tokens.shape)


def with_unknown(recipe: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The ``recipe`` where ``n`` rows come after those that it tells of, and are there themselves."""
    contexts, positions = recipe["contexts"], recipe["positions"]
    return {
        **recipe,
        "contexts": torch.cat([contexts, contexts.new_full((n,), -1)]),
        "positions": torch.cat([positions, positions.new_zeros(n)]),
    }


def with_rows(
    state: Mapping[str, Any],
    make: Callable[[ForwardInput, Tensor], Mapping[Site, Tensor]],
    say: Callable[[str], object] = lambda text: None,
) -> tuple[dict[str, Any], int]:
    """The ``state`` of a buffer as it would be with every row in it, and how many rows came out otherwise than before.

    ``make(forward, kept)`` gives the rows of the tokens that ``kept [n, context_size]`` chooses, in their order;
    ``say`` is told how far it is.  A state that has its rows is given back as it is.  :class:`ValueError` for a recipe
    that was never written so.
    """
    if state.get("recipe") is None:
        return dict(state), 0
    recipe = _Recipe.of(state["recipe"])
    known = recipe.places >= 0
    if int((~known).sum()) != len(state["origins"]):
        raise ValueError("the saved buffer has another number of rows than its recipe says")
    rows, origins = {}, torch.zeros(len(known), 3, dtype=torch.long)
    for name, stored in state["rows"].items():
        rows[name] = stored.new_empty(len(known), stored.shape[1])
        rows[name][~known] = stored
    origins[~known] = state["origins"]
    sums, differing = torch.zeros(len(known), dtype=torch.long), 0
    new_sums = recipe.sums.clone()
    told = -math.inf
    for number, one in enumerate(recipe.forwards()):
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            so_far = f", {number:,} are made" if number else ""
            say(f"computing {int(known.sum()):,} activations again, by {len(recipe.sizes):,} forwards{so_far}")
        made = make(one.input, one.kept)
        for site, values in made.items():
            rows[site.name][one.rows] = values.to("cpu", rows[site.name].dtype)
        tokens, documents = one.input.tokens.flatten()[one.places], one.input.documents.flatten()[one.places]
        origins[one.rows] = torch.stack([tokens.long(), documents, one.places % one.input.tokens.shape[1]], 1)
        sums[one.rows] = row_sums(made).cpu()
        new_sums[number] = _of_forward(sums[one.rows], one.places).sum()
        if new_sums[number] != recipe.sums[number]:
            differing += len(one.rows)
    found = {**state["recipe"], "sums": new_sums, "row_sums": sums}
    return {**state, "rows": rows, "origins": origins, "recipe": found}, differing
