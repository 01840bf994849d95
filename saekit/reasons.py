"""What errors of libraries and of plugins say, as text of ours: short, and without control characters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from saekit.errors import SaekitError
from saekit.plugins.text import printable

__all__ = ["alike", "error_text", "last_line", "reason", "reason_of_unpickling"]

_UNSAFE = ("weights_only", "weights only", "allow_pickle", "safe_globals", "unpickl", "torch.load")
_FOREIGN_CODE = ("trust_remote_code", "custom code")
_LONGEST = 400
_WITHOUT_A_SENTENCE = (AttributeError, IndexError, KeyError)


def reason(error: BaseException) -> str:
    """What ``error`` says, in a line.  Advice to read files in an unsafe way is never passed on."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if type(error).__name__ == "OfflineModeIsEnabled":  # of huggingface_hub
        return "the Hub is not asked (offline mode), and its cache does not hold it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    whole = " ".join(lines).lower()
    if any(words in whole for words in _FOREIGN_CODE):
        return "it needs code of its own, and saekit runs no code that comes with a model or a dataset"
    if any(words in whole for words in _UNSAFE):
        return "the file is damaged, or holds other things than tensors, which saekit does not read"
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    first = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
    return f"{type(error).__name__}: {first}" if isinstance(error, _WITHOUT_A_SENTENCE) else first


def reason_of_unpickling(error: BaseException) -> str:
    """What torch's weights-only unpickler says, in a line; it goes on with how to run the pickle all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "WeightsUnpickler error" in line or line.startswith("Unsupported")]
    if told:
        return told[0].split("WeightsUnpickler error:")[-1].split(". Please")[0].strip()
    if isinstance(error, EOFError):
        return "it is empty or cut off"
    return type(error).__name__ if lines and lines[0].startswith("Weights only load failed") else reason(error)


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


def alike(name: str, known: Collection[str]) -> str:
    """Those of ``known`` that are spelled alike, as the end of a message; empty where there are none.

    Of names that differ from it in a number alone, as those of blocks do, all are told.
    """
    if numbered := _numbered(name, known):
        of = f"{numbered[0]!r} to {numbered[-1]!r}" if len(numbered) > 1 else repr(numbered[0])
        return f". There {'are' if len(numbered) > 1 else 'is'} {len(numbered)} of that kind: {of}"
    close = difflib.get_close_matches(name, known, n=3)
    return f". Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _numbered(name: str, known: Collection[str]) -> list[str]:
    """Those of ``known`` that have another number in one place of their dotted ``name``, by that number."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if not part.isdecimal():
            continue
        start, end = ".".join([*parts[:place], ""]), ".".join(["", *parts[place + 1 :]])
        pattern = re.compile(rf"{re.escape(start)}([0-9]+){re.escape(end)}")
        if found := [(int(match[1]), one) for one in known if (match := pattern.fullmatch(one))]:
            return [one for _, one in sorted(found)]
    return []
