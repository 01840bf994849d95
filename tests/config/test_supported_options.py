"""What an option's type may be, so that a file can hold it and give it back."""

from __future__ import annotations

import dataclasses
import datetime
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, TypeVar

import attrs
import pytest
from support.every_config import EveryKind, Inner

from saekit.config.converter import unsupported_options
from saekit.config.describe import describe_fields

if TYPE_CHECKING:
    import decimal

T = TypeVar("T")
Name = NewType("Name", str)


class Shade(enum.Enum):
    DARK = "dark"


class Empty(enum.Enum):
    pass


@attrs.frozen
class Other:
    a: int = 1


@dataclasses.dataclass
class Data:
    a: int = 1


@attrs.frozen
class Bad:
    when: datetime.date | None = None
    fine: int = 1


@attrs.frozen
class Tree:
    children: tuple[Tree, ...] = ()


def option(kind: Any, default: Any = attrs.NOTHING) -> list[tuple[str, str]]:
    return unsupported_options(attrs.make_class("Options", {"x": attrs.field(type=kind, default=default)}, frozen=True))


@pytest.mark.parametrize(
    "kind",
    [
        bool, int, float, str, Any, object, Path, Shade, Other, Inner, Tree, list, dict, tuple, set, Name,
        list[int], tuple[int, str], tuple[int, ...], set[str], frozenset[Shade], dict[str, Any], dict[int, Other],
        dict[Literal["a", "b"], int], Mapping[str, float], Sequence[Path], Literal["a", 1, None, True],
        int | None, str | int | None, int | float | str | bool | None, Other | None, Other | str, list[int] | int,
        Literal["auto"] | int, Literal["auto"] | str, Annotated[int, "rows"], Annotated[list[Name] | None, 3],
        list[list[dict[str, Shade | None]]], Path | int | None, Shade | int, dict[str, Any] | list[int] | None,
    ],
    ids=str,
)  # fmt: skip
def test_supported(kind: Any) -> None:
    assert option(kind) == []


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (datetime.date, "is of the type date, which no configuration file can hold; use bool, int, float"),
        (bytes, "is of the type bytes, which no"),
        (Callable, "is of the type Callable, which no"),
        (Callable[[int], int], "which no configuration file can hold"),
        (complex | None, "is of the type complex"),
        (list[datetime.date], "is of the type date"),
        (PurePath, "is of the type PurePath"),
        (Data, "is of the type Data"),
        (T, "is of the type T"),
        (Empty, "is of the enum Empty, which has no members"),
        (dict[float, int], "has keys of the type a number; keys of a table in a file are texts: use str or int"),
        (dict[str, bytes], "is of the type bytes"),
        (Path | str, "may be a path or a text, which a file cannot tell apart: both are written as a text"),
        (Shade | str, "which a file cannot tell apart"),
        (Other | Inner | None, "may be a table or a table, which a file cannot tell apart: both are written as a"),
        (Other | dict[str, int], "which a file cannot tell apart"),
        (list[int] | tuple[str, ...], "both are written as a list"),
        (set[tuple[int, ...]], "is a set of lists or tables"),
        (Literal[b"x"], "has a Literal of b'x'; use texts and whole numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported(kind: Any, told: str) -> None:
    ((name, why),) = option(kind)
    assert name == "x"
    assert told in why


def test_without_a_type() -> None:
    ((name, why),) = unsupported_options(attrs.make_class("Options", ["x"], frozen=True))
    assert (name, why.partition(";")[0]) == ("x", "has no type")


def test_annotations_that_cannot_be_resolved() -> None:
    @attrs.frozen
    class Options:
        fine: int = 1
        number: decimal.Decimal | None = None
        missing: list[Nowhere] = attrs.field(factory=list)  # type: ignore[name-defined]  # noqa: F821
        path: Path = Path()

    found = unsupported_options(Options)
    assert [name for name, _ in found] == ["number", "missing"]
    assert "has the annotation 'decimal.Decimal | None', which cannot be resolved: NameError" in found[0][1]
    assert "must be imported at the top of the module, not under TYPE_CHECKING" in found[0][1]


def test_faults_inside_nested_classes_are_named_by_their_path() -> None:
    @attrs.frozen
    class Options:
        inner: Any = None

    made = attrs.make_class("Outer", {"inner": attrs.field(type=list[Bad]), "more": attrs.field(type=Bad | None)})
    assert [name for name, _ in unsupported_options(made)] == ["inner.when", "more.when"]
    assert unsupported_options(EveryKind) == []


@pytest.mark.parametrize(
    ("kind", "default", "told"),
    [
        (int, "three", "has the default 'three', which is not of its type a whole number"),
        (Any, {1, 2}, "has the default {1, 2}, which"),
        (tuple[int, ...], [1], "has the default [1], which comes back from a file as (1,)"),
        (Any, (1, 2), "has the default (1, 2), which comes back from a file as [1, 2]"),
        (int, None, "has the default None, which is not of its type"),
        (list[int], attrs.Factory(lambda: 1 / 0), "has a default that cannot be made: ZeroDivisionError"),
    ],
    ids=["text", "set", "list for tuple", "tuple for any", "none", "failing factory"],
)
def test_defaults_that_do_not_come_back(kind: Any, default: Any, told: str) -> None:
    ((_, why),) = option(kind, default)
    assert told in why


@pytest.mark.parametrize("default", [3, float("nan"), float("inf")])
def test_defaults_that_come_back(default: Any) -> None:
    assert option(float, default) == []


def test_how_they_are_described() -> None:
    told = {field.name: (field.type, field.default) for field in describe_fields(EveryKind)}
    assert told["path"] == ("path", "/here")
    assert told["color"] == ('"red" or "green"', "red")
    assert told["level"] == ("1 or 2 or none", 1)
    assert told["required"] == ("int or none", ...)
    assert told["length"] == ("float", 2.0)


def test_it_never_raises() -> None:
    class Hostile(type):
        def __getattr__(cls, name: str) -> Any:
            raise RuntimeError("no")

    class Awkward:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

        def __repr__(self) -> str:
            raise RuntimeError("no")

        __hash__ = None  # type: ignore[assignment]

    for cls in (int, Hostile("H", (), {}), None, 3, "x"):
        ((name, why),) = unsupported_options(cls)  # type: ignore[arg-type]
        assert name == "", why
    ((name, why),) = option(Any, Awkward())
    assert name == "x"
