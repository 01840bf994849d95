"""Small tables for notebooks: HTML that needs nothing beside it and looks right on light pages and on dark ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["ShownByLines", "facts_html", "table_html"]

_LONGEST = 80  # of a fact in a line of several
# Colors are those of the page around it; lines are the text's color, made faint.
_TABLE = "border-collapse:collapse;color:inherit;background:none;font-size:0.95em"
_LINE = "border:0;border-bottom:1px solid rgba(128,128,128,.35);padding:.15em .8em .15em 0;background:none"
_TITLE = "text-align:left;color:inherit;font-weight:600;padding:.2em 0"


def facts_html(title: str, facts: Iterable[tuple[str, str]]) -> str:
    """A table of names and what they are, under ``title``."""
    rows = [
        f'<tr><td style="{_LINE};text-align:left;opacity:.75">{escape(name)}</td>'
        f'<td style="{_LINE};text-align:left">{escape(text)}</td></tr>'
        for name, text in facts
    ]
    return _table(title, "".join(rows))


def table_html(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a heading for each column; the first column is text, the others are numbers."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        aligned = ["left", *["right"] * (len(texts) - 1)]
        return "".join(
            f'<{tag} style="{_LINE};text-align:{align}">{escape(text)}</{tag}>'
            for align, text in zip(aligned, texts, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return _table(title, f"<thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody>")


def _table(title: str, rows: str) -> str:
    return f'<table style="{_TABLE}"><caption style="{_TITLE}">{escape(title)}</caption>{rows}</table>'


class ShownByLines:
    """What tells of itself in lines, ``name=value``: one cut line in prompts, a table in notebooks."""

    __slots__ = ()

    def lines(self) -> list[str]:
        """What is known, a line each."""
        raise NotImplementedError(f"{type(self).__name__} must have lines()")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(_cut, self.lines()))})"

    def _repr_html_(self) -> str:
        return facts_html(type(self).__name__, [(name, value) for name, _, value in
                                                (line.partition("=") for line in self.lines())])  # fmt: skip


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
