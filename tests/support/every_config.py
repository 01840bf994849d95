"""Every configuration class, and values for each of its options, made from the types and the validators alone."""

from __future__ import annotations

import enum
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NewType, Union, get_args, get_origin

import attrs

import saekit
from saekit.config import PLUGIN_KIND, CacheConfig, PretokenizeConfig, SAEConfig, TrainConfig, plugin_field
from saekit.testing import fake_plugin, isolated_manager


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    ONE = 1
    PAIR = (1, 2)


class Bits(enum.Flag):
    A = 1
    B = 2


class Spoken(str, enum.Enum):  # noqa: UP042 - as many write it
    YES = "yes"
    NO = "no"


Metres = NewType("Metres", float)


@attrs.frozen(kw_only=True)
class Inner:
    """Options inside options."""

    where: Path | None = Path("/there")
    size: int | None = 3
    deeper: tuple[Inner, ...] = ()


@attrs.frozen(kw_only=True)
class EveryKind:
    """Whatever a plugin's options may be."""

    required: int | None
    text_or_none: str | None = "text"
    number_or_none: float | None = 1.5
    word_or_none: Literal["none", "some", 3] | None = "some"
    literal_none: Literal["a", None] = "a"
    path: Path = Path("/here")
    color: Color = Color.RED
    level: Level | None = Level.LOW
    mixed: Mixed = Mixed.PAIR
    bits: Bits = Bits.A
    spoken: Spoken = Spoken.YES
    inner: Inner = attrs.field(factory=Inner)
    inner_or_none: Inner | None = attrs.field(factory=lambda: Inner(size=None))
    several: list[Inner] = attrs.field(factory=list)
    names: frozenset[str] = frozenset({"b", "a"})
    colors: set[Color] = attrs.field(factory=set)
    pair: tuple[int, str | None] = (1, None)
    table: dict[str, int | None] = attrs.field(factory=dict)
    by_number: dict[int, Inner | None] = attrs.field(factory=dict)
    anything: Any = None
    nothing: None = None
    bare: list = attrs.field(factory=list)  # type: ignore[type-arg]
    mixture: int | float | str | bool | tuple[float | None, ...] | None = 1
    length: Metres = Metres(2.0)
    token: str | int | None = None
    words: dict[str, Any] = attrs.field(factory=dict)
    chosen: Any = plugin_field("activation_functions", None)


def manager() -> saekit.PluginManager:
    """The built-in plugins, and one with every kind of option."""
    return isolated_manager(fake_plugin("trackers", "every", build=print, config=EveryKind), builtins=True)


def every_config_class() -> list[type]:
    plugins = saekit.default_manager()
    options = [item.entry.config for registry in plugins.registries.values() for item in registry.items]
    sections = [TrainConfig, *(type(getattr(TrainConfig(), field.name)) for field in attrs.fields(TrainConfig))]
    own = [*(cls for cls in sections if attrs.has(cls)), CacheConfig, PretokenizeConfig, SAEConfig]
    return list(dict.fromkeys([*own, *options, Inner, EveryKind]))


_TEXTS = [
    "none",
    "None",
    "null",
    "~",
    "on",
    "1e-4",
    "0o17",
    "",
    "true",
    "2024-01-01",
    "a b",
    "é\n",
    '"',
    "\U0001f600",
    "x",
]
_INTEGERS = [0, 1, 2, 3, 8, 40, 1000, -3, 2**31, 2**63]
_FLOATS = [0.0, 0.5, 1.0, 1e-5, 1e-300, 3.25, 1e22, 123456.789, -1.5]


def _text(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(_TEXTS)
    return "".join(chr(rng.choice([*range(32, 600), 9, 10, 13, 0x2028, 0xFEFF, 0x1F600])) for _ in range(5))


def _number(rng: random.Random) -> float:
    return rng.choice(_FLOATS) if rng.random() < 0.7 else rng.uniform(0, 1)


def _anything(rng: random.Random, depth: int) -> Any:
    kinds = [bool, int, float, str, None, *([list[Any], dict[str, Any]] if depth < 4 else [])]
    return value_of(rng.choice(kinds), rng, depth + 1)


def value_of(kind: Any, rng: random.Random, depth: int = 0) -> Any:
    """A value of an option's type; None wherever it is allowed, sometimes."""
    origin, members = get_origin(kind), get_args(kind)
    simple: dict[Any, Callable[[], Any]] = {
        Any: lambda: _anything(rng, depth),
        None: lambda: None,
        type(None): lambda: None,
        bool: lambda: rng.random() < 0.5,
        int: lambda: rng.choice(_INTEGERS),
        float: lambda: _number(rng),
        str: lambda: _text(rng),
        Path: lambda: Path(rng.choice(["/a/b c", "none", "é"])),
    }
    if hasattr(kind, "__supertype__"):
        kind = kind.__supertype__
    if kind in simple:
        return simple[kind]()
    if origin in (Union, types.UnionType):
        return value_of(rng.choice(members), rng, depth)
    if origin is Literal:
        return rng.choice(members)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return rng.choice(list(kind))
    if attrs.has(kind):
        return config_of(kind, rng, depth + 1)
    if origin is tuple and members[-1] is not ...:
        return tuple(value_of(member, rng, depth) for member in members)
    length = 0 if depth > 2 else rng.randrange(4)
    if origin is dict:
        return {value_of(members[0], rng): value_of(members[1], rng, depth + 1) for _ in range(length)}
    return (origin or list)(value_of(members[0] if members else Any, rng, depth + 1) for _ in range(length))


def _fits(field: attrs.Attribute[Any], value: Any) -> bool:
    try:
        if field.validator is not None:
            field.validator(None, field, value)  # type: ignore[arg-type]
    except Exception:
        return False
    return True


def config_of(cls: type, rng: random.Random, depth: int = 0) -> Any:
    """An object of a configuration class, with some options left at their defaults."""
    attrs.resolve_types(cls)
    while True:
        given = {}
        for field in attrs.fields(cls):
            if field.default is not attrs.NOTHING and rng.random() < 0.4:
                continue
            for _ in range(20):
                chooses = field.metadata.get(PLUGIN_KIND)
                value = _choice(field, rng, depth) if chooses else value_of(field.type, rng, depth)
                if _fits(field, value):
                    given[field.name] = value
                    break
        try:
            return cls(**given)
        except saekit.ConfigError:  # a contradiction between two options
            continue


def _choice(field: attrs.Attribute[Any], rng: random.Random, depth: int) -> Any:
    """A plugin by its key, or an object of its options; or several."""
    kind = field.metadata[PLUGIN_KIND]
    if field.default is None and rng.random() < 0.3:
        return None
    if isinstance(field.default, tuple):
        more = [EveryKind] if kind == "trackers" else []
        return tuple(_one(kind, rng, depth, more) for _ in range(rng.randrange(3)))
    return _one(kind, rng, depth, [])


def _one(kind: str, rng: random.Random, depth: int, more: list[type]) -> Any:
    items = saekit.default_manager().registries[kind].items
    if rng.random() < 0.3:
        return rng.choice([item.key for item in items if not _required(item.entry.config)])
    return config_of(rng.choice([*(item.entry.config for item in items), *more]), rng, depth + 1)


def _required(cls: type) -> bool:
    return any(field.default is attrs.NOTHING for field in attrs.fields(cls))


def having(option: str) -> str:
    """The architectures that have ``option``, as they are listed in words."""
    items = saekit.default_manager().registry("sae_architectures").items
    *others, last = [item.key for item in items if option in attrs.fields_dict(item.entry.config)]
    return f"{', '.join(others)} and {last}"
