"""Token sets of a user's own, in files."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.analysis.token_sets import KINDS, TokenSets, compiled_pattern, token_sets, tokens_of, vocabulary_of
from saekit.cautions import warn
from saekit.errors import ConfigError
from saekit.files.paths import as_path
from saekit.files.storage import check_file, parse_json
from saekit.plugins.text import short
from saekit.protocols import ModelBackend
from saekit.reasons import alike

__all__ = ["MIN_SIZE", "check_asked", "check_numbers", "read_token_sets", "sets_of"]

MIN_SIZE = 5
"""A set of fewer tokens is not scored unless that is asked for: one token alone has a score near 1 in many features."""

_SHOWN = 5


def check_asked(sets: Iterable[str], regex: Mapping[str, str] | None) -> None:
    """:class:`ConfigError` for what is neither a kind of sets nor a file, and for what is no pattern."""
    for one in sets:
        if one not in KINDS and not as_path(one).exists():
            hint = alike(str(one), KINDS)
            raise ConfigError([("sets", f"{one!r} is neither a file nor one of {', '.join(KINDS)}{hint}")])
    for name, pattern in (regex or {}).items():
        compiled_pattern(name, pattern)


def check_numbers(permutations: object, min_size: object) -> None:
    """:class:`ConfigError` for what are no numbers of random orders and of tokens."""
    for name, value, least in (("permutations", permutations, 0), ("min_size", min_size, 1)):
        if type(value) is not int or value < least:
            raise ConfigError([(name, f"must be a whole number of {least} or more, found {value!r}")])


def read_token_sets(path: str | Path, model: ModelBackend | Sequence[str]) -> TokenSets:
    """The sets that a file names, of the tokens of ``model``.

    A ``.json`` or ``.toml`` file has a table of names; each is a list of whole texts of tokens (``" dog"`` is another
    one than ``"dog"``) or of ids, or ``{"regex": "..."}``.  Any other file has a token in each line, and is one set of
    the file's name.  Texts that are no token are a warning with the first of them; :class:`ConfigError` for a file that
    cannot be read, and for one in which no text is a token.
    """
    place = as_path(path)
    return sets_of(_read(place), model, place.name, functools.partial(_wrong, place))


def sets_of(
    listed: Mapping[str, Any], model: ModelBackend | Sequence[str], where: str, wrong: Callable[[str], ConfigError]
) -> TokenSets:
    """The same of what a file lists; ``where`` begins a warning, and ``wrong`` makes an error of what is wrong."""
    texts, found = vocabulary_of(model), TokenSets()
    missing: dict[str, list[str]] = {}
    for name, given in listed.items():
        if isinstance(given, dict) and set(given) == {"regex"}:
            found |= token_sets(texts, (), regex={name: given["regex"]})
            continue
        if not isinstance(given, list) or not all(isinstance(one, (str, int)) and one is not True for one in given):
            expected = 'a list of texts of tokens or of their ids, or {"regex": "..."}'
            raise wrong(f"{name!r} must be {expected}, found {short(given)}")
        if outside := [one for one in given if isinstance(one, int) and not 0 <= one < len(texts)]:
            raise wrong(f"{name!r} has the id {outside[0]}; those of the vocabulary are 0 to {len(texts) - 1:,}")
        found[name], unknown = tokens_of(texts, given)
        if unknown:
            missing[name] = unknown
    _tell(where, wrong, listed, found, missing)
    return found


def _tell(
    where: str,
    wrong: Callable[[str], ConfigError],
    listed: Mapping[str, Any],
    found: TokenSets,
    missing: dict[str, list[str]],
) -> None:
    for name, unknown in missing.items():
        shown = ", ".join(map(repr, unknown[:_SHOWN])) + (", …" if len(unknown) > _SHOWN else "")
        told = f"{len(unknown):,} of the {len(listed[name]):,} texts of {name!r} are no token of the model: {shown}"
        if not len(found[name]):
            hint = "tokens in the middle of a text mostly begin with a space"
            raise wrong(f"{told}. No other is left; {hint}")
        warn(f"{where}: {told}", UserWarning)


def _read(place: Path) -> dict[str, Any]:
    try:
        check_file(place)
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(place, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if place.suffix not in (".json", ".toml"):
        return {place.stem: [line for line in text.splitlines() if line.strip()]}
    try:
        given = parse_json(text) if place.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, ValueError) as error:
        raise _wrong(place, f"is no {place.suffix[1:].upper()}: {error}") from error
    if not isinstance(given, dict) or not given:
        raise _wrong(place, f"must have names of sets, and lists of tokens, found {short(given)}")
    return given


def _wrong(place: Path, told: str) -> ConfigError:
    return ConfigError([("sets", told)], str(place))
