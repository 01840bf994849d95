"""What strangers' code says of itself, as text that is safe to show: short, and without control characters."""

from __future__ import annotations

import unicodedata

from saekit.errors import SaekitError

__all__ = ["error_text", "last_line", "printable", "short"]

_LONGEST = 400


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


def error_text(error: BaseException) -> str:
    """``ValueError: why``, or only why for an error of saekit's own, in as many lines as it has."""
    try:
        text = str(error) if isinstance(error, SaekitError) else f"{type(error).__name__}: {error}"
    except Exception:  # an exception whose own __str__ fails
        text = ""
    text = printable(text.strip().removesuffix(":"), keep="\n") or type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def last_line(error: BaseException) -> str:
    """The last line of :func:`error_text`, as a traceback ends."""
    return error_text(error).splitlines()[-1]
