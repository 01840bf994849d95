"""Figures of benches as tables: a page for each machine, and on `docs/performance.md` a column for each.

Of each machine `docs/figures/NAME.json` holds all rows, from which `NAME.md` and the columns are made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

import saekit

__all__ = ["Measured", "write_pages"]

BEGIN, END = "<!-- figures: every machine, written by make bench -->", "<!-- end of figures -->"
_RATIO = " / it"  # ends the name of a figure that says how many times as long another takes


@attrs.define
class Measured:
    """What was measured on a machine."""

    machine: Mapping[str, Any]
    """`name`, and what else is known of it."""
    benches: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    @classmethod
    def of(cls, docs: Path, machine: Mapping[str, Any]) -> Measured:
        """With what was measured before on the machine of this name."""
        file = docs / "figures" / f"{slug(machine['name'])}.json"
        kept = json.loads(file.read_text(encoding="utf-8"))["benches"] if file.exists() else {}
        return cls(machine, kept)

    def add(self, name: str, *, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        """A bench's rows take the place of earlier ones; of a bench that fails, what it found before it did."""
        self.benches[name] = {"saekit": saekit.__version__, **facts, "rows": [*joined(rows)]}


def joined(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows with those of the same table and case in one."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["table"], row["case"]), {}).update(row["figures"])
    for (table, case), figures in found.items():
        yield {"table": table, "case": case, "figures": figures}


def slug(name: str) -> str:
    """A machine's name as that of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:120] or "machine"


def write_pages(docs: Path, measured: Measured) -> list[Path]:
    """The page of this machine, and the columns of all; gives the files that were written."""
    folder = docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug(measured.machine['name'])}.json"
    text = json.dumps(attrs.asdict(measured), indent=1, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")
    page = file.with_suffix(".md")
    page.write_text(page_of(measured), encoding="utf-8")
    tables = [json.loads(one.read_text(encoding="utf-8")) for one in sorted(folder.glob("*.json"))]
    performance = docs / "performance.md"
    performance.write_text(with_columns(performance.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return [file, page, performance]


def with_columns(text: str, tables: Sequence[Mapping[str, Any]]) -> str:
    """``text`` with the columns of all machines between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"docs/performance.md has lost its marks: {BEGIN!r} and {END!r} on lines of their own")
    return f"{before}{BEGIN}\n\n{columns(tables)}\n{END}{after}"


def columns(tables: Sequence[Mapping[str, Any]]) -> str:
    """How many times as long others take than saekit, and µs per token of saekit: a column for each machine."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for number, table in enumerate(tables):
        for bench, found in table["benches"].items():
            for row in found["rows"]:
                ratios = [name for name in row["figures"] if name.endswith(_RATIO)]
                if ratios and row["case"].startswith("saekit"):
                    key = (bench, row["table"], row["case"])
                    cells.setdefault(key, {})[str(number)] = _beside(row["figures"], ratios)
    heads = [f"[{_cell(table['machine']['name'])}](figures/{slug(table['machine']['name'])}.md)" for table in tables]
    lines = [_line("", *heads), _line("---", *["---"] * len(heads))]
    for (bench, table_name, case), own in cells.items():
        label = f"`{bench}`: {table_name}" + ("" if case == "saekit" else f": {case}")
        lines.append(_line(_cell(label), *(own.get(str(number), "") for number in range(len(tables)))))
    return "\n".join(lines) + "\n"


def _beside(figures: Mapping[str, Any], ratios: Sequence[str]) -> str:
    """The first ratio, with what was measured, and the others with whom they are beside."""
    time = figures.get("µs per token")
    more = [] if time is None else [f"{_number(time[0] if isinstance(time, list) else time)} µs"]
    more += [f"{_number(figures['× mm1'])} mm1"] if "× mm1" in figures else []
    more += [f"{_number(figures[ratio])} beside {_cell(ratio.removesuffix(_RATIO))}" for ratio in ratios[1:]]
    return f"**{_number(figures[ratios[0]])}**" + (f" ({', '.join(more)})" if more else "")


def page_of(measured: Measured) -> str:
    """All tables of one machine."""
    lines = ["---", "orphan: true", "---", "", f"# {measured.machine['name']}", ""]
    lines += ["Written by `make bench`; times are medians, in brackets the least and the largest. "
              "[Performance](../performance.md) says how they are measured.", ""]  # fmt: skip
    for name, found in measured.benches.items():
        lines += [f"## {name}", "", f"{_cell(found['about'])}", ""]
        lines += [f"{', '.join(f'`{one}`' for one in found['command'])}; saekit {found['saekit']}.", ""]
        if found.get("wrong"):
            lines += [f"Not whole: {_cell(found['wrong'])}.", ""]
        if found.get("cut"):
            lines += [f"For want of time: {_cell('; '.join(found['cut']))}.", ""]
        by_table: dict[str, list[Mapping[str, Any]]] = {}
        for row in found["rows"]:
            by_table.setdefault(row["table"], []).append(row)
        for table, rows in by_table.items():
            lines += [f"**{_cell(table)}**", "", *_table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    lines = [_line("", *map(_cell, heads)), _line("---", *["---"] * len(heads))]
    for row in rows:
        values = [row["figures"].get(name, "") for name in heads]
        lines.append(_line(_cell(row["case"]), *map(_shown, values)))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Words in a table, which no mark of theirs may break."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", " ".join(text.split()))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        middle, least, most = map(_number, value)
        return middle if least == most else f"{middle} ({least}–{most})"
    return _cell(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """With three digits, or all before the point."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"
