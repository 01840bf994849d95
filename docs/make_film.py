"""Film a terminal: run commands for real, and write what they show as an animated SVG.

    python docs/make_film.py            # docs/images/film.svg, of the commands below
    python docs/make_film.py FILE COMMAND ...

Each command runs in a terminal of its own, in an empty folder.  What it writes is kept with its time; in the film,
pauses are short and the rest is faster.  The SVG has no script and loads nothing: it moves by style sheet alone, so it
plays where an image is shown, and where nothing moves its last picture stands.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path

import attrs
from rich.ansi import AnsiDecoder
from rich.color import Color
from rich.style import Style
from rich.terminal_theme import MONOKAI

TARGET = Path(__file__).parent / "images" / "film.svg"
COMMANDS = ("saekit demo",)
COLUMNS, ROWS = 100, 30
WIDTH, HEIGHT, MARGIN = 8.4, 19, 14  # of a character and of a line, in pixels; around the text
TYPED, THINKING, AT_THE_END = 0.025, 0.6, 4.0  # seconds: for a character, before a command, before the film begins anew
PAUSE, LONGEST, FRAME = 0.5, 12.0, 0.15  # seconds: the longest pause, the longest command, and the shortest picture
INK, PAPER = "#d9d9d9", "#16181d"


@attrs.frozen
class Shown:
    """A line of the terminal, from when to when it read so; None: to the end."""

    row: int
    text: str
    start: float
    end: float | None = None


@attrs.define
class Screen:
    """What terminals do with what rich writes: lines that grow, lines that are written anew, a cursor that goes up."""

    lines: list[str] = attrs.field(factory=lambda: [""])
    row: int = 0
    fresh: bool = False
    """Whether the next text takes the place of the line."""

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\r|\n|[^\x1b\r\n]+", text):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\n":
            whole = wrapped(self.lines[self.row])
            self.lines[self.row : self.row + 1] = whole
            self.row, self.fresh = self.row + len(whole), False
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part == "\r":
            self.fresh = True
        elif part.endswith("A") and part[0] == "\x1b":
            self.row = max(self.row - int(part[2:-1] or 1), 0)
        elif part.endswith("K") and part[0] == "\x1b":
            self.lines[self.row] = ""
        elif part[0] != "\x1b" or part.endswith("m"):
            self.lines[self.row] = part if self.fresh else self.lines[self.row] + part
            self.fresh = False


def wrapped(line: str) -> list[str]:
    """A line as lines that are no wider than the terminal; what is said of its looks goes on in the next."""
    lines, looks, width = [""], "", 0
    for part in re.findall(r"\x1b\[[0-9;]*m|.", line):
        if len(part) > 1:
            looks = part if part in ("\x1b[0m", "\x1b[m") else looks + part
        elif width == COLUMNS:
            lines.append(looks)
            width = 0
        lines[-1] += part
        width += len(part) == 1
    return lines


def recorded(command: str, folder: Path) -> list[tuple[float, str]]:
    """What ``command`` writes to a terminal, each piece with the seconds since its start."""
    ours, theirs = pty.openpty()
    # What a terminal is this wide, and has colors, whatever the one is that this runs in.
    asked = {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    start, pieces = time.monotonic(), list[tuple[float, str]]()
    process = subprocess.Popen(
        command, shell=True, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | asked
    )
    os.close(theirs)
    unfinished = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        text = (unfinished + data).decode("utf-8", errors="ignore")
        unfinished = (unfinished + data)[len(text.encode()) :]
        pieces.append((time.monotonic() - start, text))
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{command} failed:\n{''.join(text for _, text in pieces)}")
    return pieces


def edited(pieces: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The same without long pauses, faster where it is long, and in no more pictures than eyes take in."""
    times = [moment for moment, _ in pieces]
    waits = [min(after - before, PAUSE) for before, after in pairwise([0.0, *times])]
    speed = max(sum(waits) / LONGEST, 1.0)
    found: list[tuple[float, str]] = []
    for now, (_, text) in zip(accumulate(wait / speed for wait in waits), pieces, strict=True):
        if found and now - found[-1][0] < FRAME:
            found[-1] = (found[-1][0], found[-1][1] + text)
        else:
            found.append((now, text))
    return found


def filmed(recordings: Sequence[tuple[str, Sequence[tuple[float, str]]]]) -> tuple[list[Shown], float]:
    """Every line with its times, and how long the film is."""
    screen, shown, now = Screen(), dict[int, Shown](), 0.0
    over: list[Shown] = []

    def look() -> None:
        for row, text in enumerate(screen.lines):
            if (last := shown.get(row)) is None or last.text != text:
                if last is not None:
                    over.append(attrs.evolve(last, end=now))
                shown[row] = Shown(row, text, now)

    for command, pieces in recordings:
        screen.write("\x1b[32m$\x1b[0m ")
        look()
        now += THINKING
        for letters in (command[at : at + 4] for at in range(0, len(command), 4)):
            screen.write(letters)
            now += len(letters) * TYPED
            look()
        screen.write("\r\n" if not command else "\n")
        begin = now + THINKING
        for moment, text in pieces:
            now = begin + moment
            screen.write(text)
            look()
        if screen.lines[screen.row]:
            screen.write("\n")
        screen.write("\n")
    found = [one for one in (*over, *shown.values()) if one.text]
    return sorted(found, key=lambda one: (one.start, one.row)), now + AT_THE_END


def svg(shown: Sequence[Shown], length: float) -> str:
    """The film.  Lines have their place on a long sheet, which is moved up as it fills."""
    spans = sorted({(one.start, one.end) for one in shown}, key=str)
    names = {span: f"f{number}" for number, span in enumerate(spans)}
    rules = [_shown_between(name, start, end, length) for (start, end), name in names.items()]
    lines = "".join(_line(one, names[one.start, one.end]) for one in shown)
    wide, high = round(COLUMNS * WIDTH + 2 * MARGIN), ROWS * HEIGHT + 2 * MARGIN
    style = (
        f"svg svg{{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:{INK}}}"
        f"text{{white-space:pre}}g{{animation:{length:.1f}s step-end infinite}}"
        "@media(prefers-reduced-motion){g{animation:none!important}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">'
        f"<title>saekit in a terminal</title><style>{style}{_scrolled(shown, length)}{''.join(rules)}</style>"
        f'<rect width="{wide}" height="{high}" rx="8" fill="{PAPER}"/><svg x="{MARGIN}" y="{MARGIN}" '
        f'width="{wide - MARGIN}" height="{ROWS * HEIGHT}"><g class="s">{lines}</g></svg></svg>\n'
    )


def _shown_between(name: str, start: float, end: float | None, length: float) -> str:
    before = f"0%{{visibility:hidden}}{100 * start / length:.2f}%" if start else "0%"
    after = "" if end is None else f"{100 * end / length:.2f}%{{visibility:hidden}}"
    still = "" if end is None else "visibility:hidden;"
    return f"@keyframes {name}{{{before}{{visibility:visible}}{after}}}.{name}{{{still}animation-name:{name}}}"


def _scrolled(shown: Sequence[Shown], length: float) -> str:
    """How far the sheet is moved up, at each time that it is."""
    steps, top = ["0%{transform:none}"], 0
    for one in shown:
        if one.row - ROWS + 1 > top:
            top = one.row - ROWS + 1
            steps.append(f"{100 * one.start / length:.2f}%{{transform:translateY({-top * HEIGHT}px)}}")
    return f"@keyframes s{{{''.join(steps)}}}.s{{transform:translateY({-top * HEIGHT}px);animation-name:s}}"


def _line(one: Shown, name: str) -> str:
    text = AnsiDecoder().decode_line(one.text)
    y, parts, at = one.row * HEIGHT + 14, [], 0
    for segment in text.render(_NoConsole()):  # type: ignore[arg-type]
        if segment.style and segment.style.bgcolor:
            place = f'x="{at * WIDTH:.1f}" y="{y - 14}" width="{len(segment.text) * WIDTH:.1f}" height="{HEIGHT}"'
            parts.append(f'<rect {place} fill="{_hex(segment.style.bgcolor)}"/>')
        if segment.text.strip():
            place = f'x="{at * WIDTH:.1f}" y="{y}" textLength="{len(segment.text) * WIDTH:.1f}"'
            parts.append(f"<text {place}{_look(segment.style)}>{escape(segment.text, quote=False)}</text>")
        at += len(segment.text)
    return f'<g class="{name}">{"".join(parts)}</g>' if parts else ""


class _NoConsole:
    """What rich asks a console for to lay out one line."""

    options = None

    def get_style(self, style: Style | str, default: object = None) -> Style:
        return style if isinstance(style, Style) else Style.null()


def _look(style: Style | None) -> str:
    if style is None:
        return ""
    color = "" if style.color is None else f' fill="{_hex(style.color)}"'
    bold = ' font-weight="bold"' if style.bold else ""
    italic = ' font-style="italic"' if style.italic else ""
    return f"{color}{bold}{italic}" + (' opacity=".6"' if style.dim else "")


def _hex(color: Color) -> str:
    return color.get_truecolor(MONOKAI).hex


def main() -> None:
    target, commands = (Path(sys.argv[1]), sys.argv[2:]) if len(sys.argv) > 2 else (TARGET, COMMANDS)
    with tempfile.TemporaryDirectory() as folder:
        recordings = [(command, edited(recorded(command, Path(folder)))) for command in commands]
    target.write_text(svg(*filmed(recordings)), encoding="utf-8")
    print(f"{target}: {target.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
