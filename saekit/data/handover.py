"""What several readers of a text have left, shared out among others: states are made of states, and nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch

from saekit.data.dealing import Place

__all__ = ["buffer_handed_over", "handed_over"]

_State = Mapping[str, Any]
_T = TypeVar("_T")


def handed_over(states: Sequence[_State], number: int, of: int) -> dict[str, Any]:
    """The state of part ``number`` of ``of`` of the text that was read by :class:`~saekit.data.ContextStream` parts.

    Documents that nobody had come to are dealt out anew, from where the last reader was.  What each had in hand (the
    rest of a document, with what its packer holds) goes to one of the new parts, and so does each context that was
    packed.
    """
    last = min(states, key=lambda state: (state["epoch"], state["reader"]["next"]))
    first = last["epoch"]
    before: list[Any] = [*last.get("dealt", ()), [list(_place(state)) for state in states]]
    met: list[int] = [last["reader"].get("met", 0), *last["reader"].get("met_since", ()), 0]
    while len(before) > 1 and max(reading for reading, _ in before[0]) < first:  # nothing is left of those readings
        before, met = before[1:], met[1:]
    hands = _part(list(chain.from_iterable(map(_hands, states))), number, of)
    packer = states[0]["packer"]
    packer = {name: [] if isinstance(value, list) else type(value)() for name, value in packer.items()}
    if hands:
        packer, hands[0] = hands[0]["packer"], {name: hands[0][name] for name in hands[0] if name != "packer"}
    return {
        "reader": {**last["reader"], "met": met[0], "met_since": met[1:]},
        "offset": 0,
        "in_hand": False,
        "epoch": first,
        "tokens_this_epoch": sum(state["tokens_this_epoch"] for state in states if state["epoch"] == first) // of,
        "contexts_served": sum(state["contexts_served"] for state in states) // of,
        "ready": _part(list(chain.from_iterable(state["ready"] for state in states)), number, of),
        "packer": packer,
        "document": 0,
        "dealt": before,
        "inherited": hands,
    }


def _place(state: _State) -> Place:
    """Where the reader of a state goes on, when the document in hand is done."""
    return state["epoch"], state["document"] + 1 if state["in_hand"] else state["reader"]["next"]


def _hands(state: _State) -> list[dict[str, Any]]:
    """What a reader had in hand, itself or from others before it, each with what a packer held."""
    others = [dict(left) for left in state.get("inherited", ())]
    own: dict[str, Any] = {}
    if others and "packer" not in others[0]:
        own = others.pop(0)
    elif state["in_hand"]:
        reader = {name: state["reader"][name] for name in ("next", "records") if name in state["reader"]}
        own = {"reader": reader, "document": state["document"], "offset": state["offset"]}
    return [{**own, "packer": state["packer"]}, *others]


def _part(items: list[_T], number: int, of: int) -> list[_T]:
    return items[number * len(items) // of : (number + 1) * len(items) // of]


def buffer_handed_over(
    states: Sequence[_State], number: int, of: int, made: Callable[[int], _State] | None = None
) -> dict[str, Any]:
    """The state of one of ``of`` :class:`~saekit.data.ShuffleBuffer`, which have the rows of those in ``states``.

    They have about as many rows each, mixed; of other states than those whose rows they are, no row is read.
    ``made(which)`` is the state of that number with all of its rows, where some have a recipe in their place.
    """
    lengths = [
        len(state["origins"] if state.get("recipe") is None else state["recipe"]["contexts"]) for state in states
    ]
    total, capacity = sum(lengths), states[0]["capacity"]
    start, stop = number * total // of, (number + 1) * total // of
    pieces, first = [], 0
    for which, (state, length) in enumerate(zip(states, lengths, strict=True)):
        piece = slice(max(start - first, 0), min(max(stop - first, 0), length))
        if piece.start < piece.stop:
            pieces.append((state if made is None else made(which), piece))
        first += length
    pieces = pieces or [(states[0], slice(0))]
    generator = torch.Generator()
    generator.set_state(states[number % len(states)]["generator"].clone())
    order = torch.randperm(stop - start, generator=generator)
    rows = {
        site: torch.cat([state["rows"][site][piece] for state, piece in pieces])[order] for site in states[0]["rows"]
    }
    return {
        "rows": rows,
        "origins": torch.cat([state["origins"][piece] for state, piece in pieces])[order],
        "waiting": 0,
        "beyond": max(stop - start - capacity, 0),
        "capacity": capacity,
        "generator": generator.get_state(),
    }


def _rows(state: _State) -> int:
    return len(state["origins"] if state.get("recipe") is None else state["recipe"]["contexts"])
