"""Names that are not written out: ``gemma``, ``resid_post``, ``12``.  What is exact goes before what only fits."""

from __future__ import annotations

from collections.abc import Iterable

from saekit.pretrained.catalog import nearest

__all__ = ["hooks_like", "models_like", "near_hooks"]

_SAID_ANYHOW = {"layer", "layers", "block", "blocks"}


def models_like(wanted: str, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that are ``wanted``, with their owner or without; if none is, those that it is a part of."""
    names, folded = set(names), _folded(wanted)
    exact = {name for name in names if folded in (_folded(name), _folded(name).rpartition("/")[2])}
    return exact or {name for name in names if folded.strip() and folded in _folded(name)}


def hooks_like(wanted: str, hooks: Iterable[str]) -> set[str]:
    """Those of ``hooks`` that are ``wanted``, of a block or of any; if none is, those that have each of its words.

    A number is that of a block; ``12``, ``resid_post``, ``12.resid_post`` and ``layer 12 resid_post`` are understood.
    """
    hooks = set(hooks)
    exact = {hook for hook in hooks if hook == wanted or hook.endswith(f".{wanted}")}
    words = [word for word in _words(wanted) if word not in _SAID_ANYHOW]
    return exact or {hook for hook in hooks if words and all(_has(hook, word) for word in words)}


def near_hooks(wanted: str, hooks: Iterable[str]) -> list[str]:
    """Those that are spelled like ``wanted``; where that says no block, without theirs."""
    if any(word.isdigit() for word in _words(wanted)):
        return nearest(wanted, hooks)
    return nearest(wanted, dict.fromkeys(hook.rpartition(".")[2] for hook in sorted(hooks)))


def _has(hook: str, word: str) -> bool:
    return word in _words(hook) if word.isdigit() else word in hook.casefold()


def _words(text: str) -> list[str]:
    return text.casefold().replace(".", " ").replace("/", " ").split()


def _folded(name: str) -> str:
    return name.casefold().replace("_", "-")
