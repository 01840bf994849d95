"""What the picture of a sweep shows, for whoever draws it: sparsity against fidelity, and which SAE is where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from saekit.reports.colors import colors_of

__all__ = [
    "MARKERS", "PANELS", "Look", "has_place", "key_of", "not_drawn", "shortened", "spreads",
    "value_of",
]  # fmt: skip

PANELS = {"explained_variance": "Explained variance", "ce_recovered": "CE recovered"}
"""What may be drawn over L0."""
MARKERS = "os^Dv<>pPX"
"""matplotlib's names of shapes."""

Row = Mapping[str, Any]


@attrs.frozen
class Look:
    """Which changed option is shown how."""

    names: Mapping[str, str]
    """The options that were changed, each with the name that it is shown under."""
    along: str | None
    """Its values are written at the points, and lines connect them: the option that changes L0 the most."""
    colors: Mapping[Any, tuple[str, str]]
    """By value of :attr:`color`, on a light ground and on a dark one."""
    color: str | None
    markers: Mapping[Any, str]
    marker: str | None

    @classmethod
    def of(cls, rows: Sequence[Row], names: Mapping[str, str]) -> Look:
        """How ``rows`` of :attr:`saekit.SweepResult.summary` are told apart, which differ in ``names``."""
        drawn = [row for row in rows if any(has_place(row, key) for key in PANELS)]
        spreads = {option: _spread(drawn, option, names) for option in names if _numeric(drawn, option)}
        along = max(spreads, key=lambda option: spreads[option], default=None)
        if along is not None and not spreads[along]:
            along = None
        others = sorted((o for o in names if o != along), key=lambda option: -len(_values(rows, option)))
        color, marker, *_ = [*others, None, None]
        if marker is not None and len(_values(rows, marker)) > len(MARKERS):
            marker = None
        return cls(
            names,
            along,
            colors_of(_values(rows, color), ordered=_numeric(rows, color)) if color else {},
            color,
            dict(zip(_values(rows, marker), MARKERS, strict=False)) if marker else {},
            marker,
        )

    def color_of(self, row: Row, *, dark: bool = False) -> str:
        """The color of the point of ``row``."""
        colors = self.colors[key_of(row[self.color])] if self.color else colors_of([None])[None]
        return colors[dark]

    def marker_of(self, row: Row) -> str:
        """The shape of the point of ``row``."""
        return self.markers[key_of(row[self.marker])] if self.marker else "o"

    def label_of(self, row: Row) -> str:
        """What is written at the point of ``row``."""
        if self.along is not None:
            return value_of(row[self.along])
        return _short_name(str(row["name"])) if self.by_name else ""

    @property
    def by_name(self) -> bool:
        """Whether nothing else tells the SAEs apart."""
        return self.along is None and (not self.names or not set(self.names) <= {self.color, self.marker})

    def caption(self, number: int) -> str:
        """What is what, in a line, of so many SAEs."""
        parts = [f"{number} SAE{'s' if number > 1 else ''}"]
        if self.along is not None:
            parts.append(f"at the points and along lines: {self.names[self.along]}")
        elif self.by_name:
            parts.append("at the points: names")
        return " · ".join(parts)

    def families(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows on one line each, which differ in :attr:`along` alone, in its order."""
        lines: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            lines.setdefault(tuple(key_of(row[o]) for o in self.names if o != self.along), []).append(row)
        if (along := self.along) is None:
            return [[row] for row in rows]
        return [sorted(line, key=lambda row: row[along]) for line in lines.values()]


def has_place(row: Row, key: str) -> bool:
    """Whether ``row`` has a place in the panel of ``key``."""
    l0, value = row["l0"], row.get(key)
    return bool(l0) and value is not None and math.isfinite(l0) and math.isfinite(value)


def spreads(xs: Sequence[float]) -> bool:
    """Whether L0s are far enough apart for a logarithmic axis."""
    return max(xs) >= 3 * min(xs)


def not_drawn(rows: Sequence[Row]) -> list[str]:
    """Which SAEs are not in the picture, and why, a line for each reason."""
    left = [row for row in rows if not any(has_place(row, key) for key in PANELS)]
    reasons = {
        "diverged": [str(row["name"]) for row in left if row["status"] == "diverged"],
        "without a feature that fires, or without numbers": [
            str(row["name"]) for row in left if row["status"] != "diverged"
        ],
    }
    return [_named(f"Not drawn, {reason}: ", names) for reason, names in reasons.items() if names]


def _named(start: str, names: Sequence[str], most: int = 88) -> str:
    """As many ``names`` as go into a line of ``most`` letters, and how many more there are."""
    shown: list[str] = []
    for number, name in enumerate(names):
        name = shortened(name, 60)
        if shown and len(start) + len(", ".join([*shown, name])) > most:
            shown.append(f"and {len(names) - number} more")
            break
        shown.append(name)
    return start + ", ".join(shown)


def _spread(rows: Sequence[Row], option: str, options: Mapping[str, str]) -> float:
    """By how much L0 changes along ``option``, where all others are the same: the mean range of its logarithm."""
    lines: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        lines.setdefault(tuple(key_of(row[o]) for o in options if o != option), []).append(math.log(row["l0"]))
    ranges = [max(line) - min(line) for line in lines.values() if len(line) > 1]
    return sum(ranges) / len(ranges) if ranges else 0.0


def _values(rows: Sequence[Row], option: str) -> list[Any]:
    """The distinct values of ``option``; numbers in their order, others in that of the rows."""
    values = list(dict.fromkeys(key_of(row[option]) for row in rows))
    return sorted(values) if _numeric(rows, option) else values


def _numeric(rows: Sequence[Row], option: str | None) -> bool:
    return option is not None and all(
        isinstance(row[option], (int, float)) and not isinstance(row[option], bool) for row in rows
    )


def key_of(value: Any) -> Any:
    """``value``, or its text where it is a list or the like."""
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def value_of(value: Any) -> str:
    """A value as a text."""
    return f"{value:,.10g}" if isinstance(value, float) else str(value)


def _short_name(name: str) -> str:
    """Of a name that is made of the options, the number."""
    number, _, rest = name.partition("_")
    return number if number.isdecimal() and "=" in rest else shortened(name, 24)


def shortened(text: str, most: int = 38) -> str:
    """``text``, cut where it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
