"""What strangers' code gives, as text that is safe to show: short, and without control characters."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["normalized", "printable", "short"]


def printable(text: object, *, keep: str = "") -> str:
    """``text`` with everything that a terminal would obey rather than show (escapes, bidi marks) written as ``\\x1b``.

    ``keep`` are characters that stay as they are, such as newlines.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # spaces of any width


def short(value: object, longest: int = 60) -> str:
    """The ``repr`` of any object, cut, whatever its own ``__repr__`` does."""
    try:
        text = printable(repr(value))
    except Exception:
        text = f"an object of {type(value).__name__} whose repr fails"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def normalized(distribution: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
