"""The film of the terminal: what rich writes becomes lines with times, and these an SVG that is well formed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def film() -> Iterator[Any]:
    sys.path.insert(0, str(DOCS))
    try:
        import make_film

        yield make_film
    finally:
        sys.path.remove(str(DOCS))


def test_a_line_is_written_anew(film: Any) -> None:
    screen = film.Screen()
    screen.write("one\r\ntwo\r\x1b[2Kthree\n\x1b[1mfour\x1b[0m")
    assert screen.lines == ["one", "three", "\x1b[1mfour\x1b[0m"]
    screen.write("\r\x1b[1A\x1b[2Kfive\n\x1b[2Ksix\x1b[?25l")
    assert screen.lines == ["one", "five", "six"]


def test_a_long_line_is_wrapped(film: Any) -> None:
    screen = film.Screen()
    screen.write(f"\x1b[1m{'a' * film.COLUMNS}b\x1b[0m\nnext\n{'c' * film.COLUMNS}\n")
    assert screen.lines == [f"\x1b[1m{'a' * film.COLUMNS}", "\x1b[1mb\x1b[0m", "next", "c" * film.COLUMNS, ""]


def test_pauses_are_short_and_long_commands_fast(film: Any) -> None:
    (first, text), (second, rest) = film.edited([(10.0, "a"), (10.01, "b"), (99.0, "c")])
    assert (text, rest) == ("ab", "c")
    assert (first, second) == (film.PAUSE, pytest.approx(2 * film.PAUSE + 0.01))
    found = film.edited([(float(n), "d") for n in range(1000)])
    assert found[-1][0] <= film.LONGEST + 1e-6
    assert len(found) <= film.LONGEST / film.FRAME + 1
    assert "".join(text for _, text in found) == "d" * 1000


def test_each_line_has_its_times(film: Any) -> None:
    shown, length = film.filmed([("ls", [(0.0, "half"), (1.0, "\rwhole\n")])])
    times = {one.text: (one.start, one.end) for one in shown}
    assert times["half"][1] == times["whole"][0] == times["half"][0] + 1
    assert times["whole"][1] is None
    assert length > times["whole"][0]
    tree = ElementTree.fromstring(film.svg(shown, length))
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"half", "whole"} <= set(texts)


def test_colors_and_a_screen_that_moves(film: Any) -> None:
    lines = "".join(f"\x1b[31mline {n} <&>\x1b[0m\n" for n in range(film.ROWS + 5))
    source = film.svg(*film.filmed([("", [(0.0, lines)])]))
    ElementTree.fromstring(source)
    assert "line 3 &lt;&amp;&gt;" in source
    assert 'fill="#' in source
    assert "translateY(-" in source


def test_the_film_of_the_readme() -> None:
    source = (DOCS / "images" / "film.svg").read_text(encoding="utf-8")
    assert len(source) < 400_000
    assert "<script" not in source
    assert "http" not in source.replace("http://www.w3.org/2000/svg", "")
    texts = [element.text or "" for element in ElementTree.fromstring(source).iter("{http://www.w3.org/2000/svg}text")]
    assert any("explained variance" in text for text in texts)
