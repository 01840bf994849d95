"""What is asked for in one word of a command line: numbers of features, named patterns, lines of a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from saekit.errors import ConfigError
from saekit.files.paths import as_path
from saekit.files.storage import check_file
from saekit.plugins.text import short

__all__ = ["asked_features", "feature_numbers", "lines_of", "named_patterns"]

_MOST, _DIGITS = 1 << 24, 12  # numbers, and digits of one, that are listed


def feature_numbers(text: str) -> list[int] | str:
    """``1,2,5-20`` as numbers, both ends of a range among them; ``all`` stays.  :class:`ConfigError` for others."""
    if text.strip() == "all":
        return "all"
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if match is None:
            raise _no_numbers(part.strip() or text)
        if max(map(len, match.groups(""))) > _DIGITS:
            raise ConfigError([("features", f"has a number that is larger than any SAE: {short(part.strip())}")])
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise _no_numbers(part.strip())
        if len(found) + last - first >= _MOST:
            raise ConfigError(
                [("features", f"{short(part.strip())} are more than {_MOST:,} numbers; did you mean all?")]
            )
        found += range(first, last + 1)
    return found


def _no_numbers(text: str) -> ConfigError:
    return ConfigError([("features", f"must be numbers such as 1,2,5-20, or all, found {short(text)}")])


def asked_features(numbers: str | None, random: int | None, skewed: int | None) -> tuple[list[int] | str, int]:
    """What three options say, of which one may be given, and how many features; by default the 100 most skewed."""
    if sum(one is not None for one in (numbers, random, skewed)) > 1:
        raise ConfigError("--features, --random and --skewed each say which features: give one of them")
    if numbers is not None:
        return feature_numbers(numbers), 1
    return ("random", random) if random is not None else ("skewed", 100 if skewed is None else skewed)


def named_patterns(given: Sequence[str]) -> dict[str, str] | None:
    """``NAME=PATTERN`` of each; None for none.  :class:`ConfigError` for one without a name."""
    found = {}
    for text in given:
        name, equals, pattern = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError([("regex", f"must be NAME=PATTERN, found {text!r}")])
        found[name.strip()] = pattern
    return found or None


def lines_of(path: str) -> list[str]:
    """The lines of a file that are not empty; :class:`ConfigError` for one that cannot be read."""
    place = as_path(path)
    try:
        check_file(place)
        return [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
