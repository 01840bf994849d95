"""Sets of tokens that have something in common: by what they look like, by what they are, or from a file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.plugins.text import short
from saekit.protocols import ModelBackend

__all__ = ["DEFAULT_KINDS", "KINDS", "TokenSets", "part_of_speech_sets", "token_sets", "tokens_of", "vocabulary_of"]

TokenSets = dict[str, NDArray[np.int64]]
"""Names of sets, and the sorted ids of the tokens in each."""

_NAMES = Path(__file__).with_name("first_names.txt")
_SOME_TEXT = "the texts of a vocabulary, or a model that saekit.load_model returned"


def vocabulary_of(model: ModelBackend | Sequence[str]) -> list[str]:
    """The text of each token by its id, of a model; or the texts themselves, as they are given."""
    if hasattr(model, "token_texts"):
        return cast("ModelBackend", model).token_texts(range(cast("ModelBackend", model).d_vocab))
    if isinstance(model, str) or not isinstance(model, Sequence) or not all(isinstance(text, str) for text in model):
        raise ConfigError([("model", f"must be {_SOME_TEXT}, found {short(model)}")])
    return list(model)


def token_sets(
    model: ModelBackend | Sequence[str],
    kinds: Iterable[str] | None = None,
    *,
    regex: Mapping[str, str] | None = None,
    names: Iterable[str] | None = None,
    tagger: Any | None = None,
) -> TokenSets:
    """Sets of the tokens of ``model``, by :data:`KINDS`; left out, :data:`DEFAULT_KINDS`.

    - ``first_letter``: ``letter_a`` to ``letter_z``, of tokens that are letters alone;
    - ``capitals``: ``capitalized`` (``Paris``) and ``all_caps`` (``NASA``);
    - ``digits``, ``punctuation``, ``space`` (``starts_with_space``);
    - ``names``: first names, those of a short list in English, or ``names``;
    - ``part_of_speech``: ``pos_NN``, ``pos_VB``, … by ``tagger``, which has ``tag([word])``, or by nltk's.

    But for ``space``, a space at a token's beginning or end makes no difference.  ``regex`` are further sets,
    patterns by name; a token is in one where the pattern matches its text from the beginning (:func:`re.match`), space
    and all.  Sets may be empty.  :class:`ConfigError` for a kind that is not there, a bad pattern, and a tagger
    without its data.
    """
    texts = vocabulary_of(model)
    chosen = [kinds] if isinstance(kinds, str) else list(DEFAULT_KINDS if kinds is None else kinds)
    found: TokenSets = {}
    for kind in chosen:
        if kind == "part_of_speech":
            found |= part_of_speech_sets(texts, tagger)
        elif kind == "names":
            found["names"] = _where(texts, _is_among(_shipped_names() if names is None else names))
        elif kind in _BY_TEXT:
            found |= {name: _where(texts, fits) for name, fits in _BY_TEXT[kind].items()}
        elif kind == "space":
            found["starts_with_space"] = _ids(n for n, text in enumerate(texts) if text[:1] == " " and text.strip())
        else:
            raise ConfigError([("sets", f"knows no kind {kind!r}; there are {', '.join(KINDS)}")])
    for name, pattern in (regex or {}).items():
        compiled = compiled_pattern(name, pattern)
        found[name] = _ids(number for number, text in enumerate(texts) if compiled.match(text))
    return found


def compiled_pattern(name: str, pattern: str) -> re.Pattern[str]:
    """The ``pattern`` of a set; :class:`ConfigError` for what is none."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError([("regex", f"{name!r} is no regular expression: {pattern!r}: {error}")]) from error


def tokens_of(texts: Sequence[str], wanted: Iterable[str | int]) -> tuple[NDArray[np.int64], list[str]]:
    """The ids of tokens that are given by their whole texts or as ids, and those texts that are no token's."""
    by_text: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        by_text.setdefault(text, []).append(number)
    ids, unknown = list[int](), list[str]()
    for one in wanted:
        if isinstance(one, str):
            ids += by_text.get(one, [])
            unknown += [] if one in by_text else [one]
        else:
            ids.append(one)
    return _ids(sorted(set(ids))), unknown


def part_of_speech_sets(texts: Sequence[str], tagger: Any | None = None) -> TokenSets:
    """``pos_TAG`` for each tag that a tagger gives to a token alone, of tokens with a letter.

    A token out of its sentence is tagged by its form, so this is rough.
    """
    tag = _nltk() if tagger is None else tagger.tag
    found: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        word = text.strip()
        if any(character.isalpha() for character in word):
            found.setdefault(f"pos_{tag([word])[0][1]}", []).append(number)
    return {name: _ids(found[name]) for name in sorted(found)}


def _nltk() -> Callable[[list[str]], list[tuple[str, str]]]:
    what = "tags parts of speech; or give a tagger of your own (tagger=...), or leave part_of_speech out"
    try:
        from nltk import pos_tag
    except ImportError as error:
        raise ConfigError(
            [("sets", f"part_of_speech needs nltk, which {what}: pip install 'saekit[tagger]'")]
        ) from error
    try:
        pos_tag(["word"])
    except LookupError as error:
        fetch = "python -m nltk.downloader averaged_perceptron_tagger_eng"
        told = f"part_of_speech needs the data with which nltk {what}: {fetch}, or NLTK_DATA set to where it lies"
        raise ConfigError([("sets", told)]) from error
    return cast("Callable[[list[str]], list[tuple[str, str]]]", pos_tag)


def _ids(numbers: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(numbers, dtype=np.int64)


def _where(texts: Sequence[str], fits: Callable[[str], bool]) -> NDArray[np.int64]:
    return _ids(number for number, text in enumerate(texts) if (inner := text.strip()) and fits(inner))


def _is_among(names: Iterable[str]) -> Callable[[str], bool]:
    known = {name.strip().casefold() for name in names}
    return lambda text: text[0].isupper() and text.casefold() in known


def _shipped_names() -> list[str]:
    return _NAMES.read_text(encoding="utf-8").split()


def _is_punctuation(text: str) -> bool:
    return all(unicodedata.category(character)[0] in "PS" and character != "\ufffd" for character in text)


def _begins(letter: str) -> Callable[[str], bool]:
    return lambda text: text.isalpha() and text[0].lower() == letter


_BY_TEXT: dict[str, dict[str, Callable[[str], bool]]] = {
    "first_letter": {f"letter_{letter}": _begins(letter) for letter in ascii_lowercase},
    "capitals": {
        "capitalized": lambda text: len(text) > 1 and text.isalpha() and text[0].isupper() and text[1:].islower(),
        "all_caps": lambda text: len(text) > 1 and text.isalpha() and text.isupper(),
    },
    "digits": {"digits": str.isdecimal},
    "punctuation": {"punctuation": _is_punctuation},
}
"""By kind: names of sets, and which texts, without spaces around them, are in each."""

DEFAULT_KINDS = (*_BY_TEXT, "space", "names")
KINDS = (*DEFAULT_KINDS, "part_of_speech")
