"""A conversion of a run's configuration while it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saekit.config import shown

__all__ = ["Work"]


class Work:
    """Keys are taken one after the other, until none is left; options, and a word about each, come in their place."""

    def __init__(self, keys: Mapping[str, Any], version: int) -> None:
        self.given = keys
        self.left = dict(keys)
        self.version = version
        self.options: list[tuple[str, Any]] = []
        self.renamed: dict[str, str] = {}
        self.changed: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.said: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is dealt with from here on."""
        return self.left.pop(key, default)

    def set(self, path: str, value: Any, *keys: str) -> None:
        """An option here, and the keys of theirs that it is made of."""
        self.options.append((path, value))
        self.said |= set(keys)
        for key in keys:
            if key.removeprefix("sae.").removeprefix("logger.") != path.rpartition(".")[2]:
                self.renamed[key] = path
            theirs = self.given.get(key)
            if key in self.given and theirs is None:
                self.changed.setdefault(key, f"null is {path} = {shown(value)}")
            elif theirs is not None and theirs != value:
                self.changed.setdefault(key, f"{shown(theirs)} is {path} = {shown(value)}")

    def leave_out(self, keys: Iterable[str], why: str) -> None:
        """What says nothing here, of those that are left."""
        for key in keys:
            if key in self.left:
                del self.left[key]
                self.dropped[key] = why

    def without(self, *paths: str) -> list[str]:
        """Take options back, and say which there were."""
        found = [path for path, _ in self.options if path in paths]
        self.options[:] = [option for option in self.options if option[0] not in found]
        return found
