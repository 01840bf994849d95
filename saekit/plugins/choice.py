"""A plugin that a configuration chooses, bound: after that, nobody looks its name up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import attrs

from saekit.kinds import Kind
from saekit.plugins.building import built
from saekit.plugins.registry import Registered

__all__ = ["Choice"]

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, eq=False)
class Choice(Generic[T_co]):
    """What ``sae = "topk"`` or ``sae=TopKConfig(k=8)`` is once a configuration was loaded.

    It is equal to what it was made from, the qualified key or the options, so that configurations are equal to those
    that plain code makes.
    """

    kind: Kind[T_co]
    item: Registered
    options: Any
    """An instance of the plugin's options class."""
    spelled: bool = True
    """Whether options were given; the key alone is written where they were not."""

    @property
    def key(self) -> str:
        """The qualified key, ``distribution:name``."""
        return self.item.key

    @property
    def needs_text(self) -> bool:
        """Of a source or an eval: whether it opens a text, which must then be there."""
        return self.item.entry.needs_text

    @property
    def given(self) -> Any:
        """The same as plain code has it: the options, or the key where none were given."""
        return self.options if self.spelled else self.key

    def with_defaults(self, stated: Mapping[str, Any]) -> Choice[T_co]:
        """The same choice, with those of its options that are None as ``stated``."""
        unset = {name: value for name, value in stated.items() if getattr(self.options, name) is None}
        return dataclasses.replace(self, options=attrs.evolve(self.options, **unset))

    def build(self, **services: Any) -> T_co:
        """What the plugin builds, checked: see :func:`saekit.plugins.building.built`."""
        made: T_co = built(self.item, self.options, **services)
        return made

    def __repr__(self) -> str:
        return f"Choice({self.key!r}, {self.options!r})"

    def __eq__(self, other: object) -> bool:
        return bool(self.given == (other.given if isinstance(other, Choice) else other))

    def __hash__(self) -> int:
        return hash(self.given)

    def __copy__(self) -> Choice[T_co]:
        return self

    def __deepcopy__(self, memo: object) -> Choice[T_co]:
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        """Pickled as it was given: what a stranger builds with need not be picklable, the options are."""
        return _itself, (self.given,)


def _itself(value: object) -> object:
    return value
