"""What a feature store is, as its manifest says, and the checks that need nothing else.

A store is a folder::

    manifest.json
    contexts.safetensors          contexts [n, context_size] int32
    vocabulary.json               the text of every token id
    sae-0/
        index.safetensors         numbers of each feature, where its activations begin, histograms
        activations.safetensors   contexts, positions, values, sampled: by feature, and of each by context and position
        kept.safetensors          kept [n, context_size] bool: the tokens that count
        together.safetensors      features and neurons that are active together with each
        weights.safetensors       alignment and neighbors of decoder directions
        statistics.safetensors    cosines and biases of each
        logits.safetensors        what each does to the logits, where something can be said of that
    sae-1/ ...

A folder without ``manifest.json``, which comes last, is no store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import attrs

from saekit.config.structuring import ProblemsError, Structurer
from saekit.errors import DataError, PlaceError
from saekit.files.storage import read_json, sha256, write_text
from saekit.plugins.text import short

__all__ = [
    "ANEW",
    "FORMAT",
    "MANIFEST",
    "AboutSAE",
    "StoreManifest",
    "differences",
    "files_listed",
    "is_sealed",
    "is_store",
    "sealed",
]

MANIFEST, FORMAT = "manifest.json", 2
ANEW = "Collect the features again (overwrite=True of saekit.collect_features, saekit features --overwrite)"
_WORDS = {
    "number": "n_contexts", "size": "context_size", "digest": "the contexts (a checksum)",
    "mask": "the mask (a checksum)", "fingerprint": "the weights (a checksum)", "checksum": "the weights (a checksum)",
}  # fmt: skip
"""What people call what a manifest has."""
_CHECKSUMS = (".digest", ".mask", ".fingerprint", ".checksum")
_BESIDE = ("contexts.safetensors", "vocabulary.json")
_SMALL = 1 << 26  # bytes of files that are summed whenever a store is opened


@attrs.frozen(kw_only=True)
class AboutSAE:
    """An SAE of a store."""

    name: str
    folder: str
    """Where its files are in the store."""
    checksum: str
    """The sha256 of its weights and of what it is."""
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    dtype: str
    inputs: Sequence[str]
    """The sites that it reads, by name."""
    targets: Sequence[str]
    """Those that it writes."""
    hook: str
    """Both as one word, as statistics have it."""
    layer: int | None
    """How many blocks come before what it reads, where that can be told."""
    tokens: Mapping[str, Any]
    """Which tokens count, as :meth:`saekit.tokens.TokenChoice.metadata` says it."""
    metadata: Mapping[str, Any]
    """What the SAE says of itself."""
    features: Sequence[int] | None = None
    """The features that are in the store; None: all."""
    tokens_counted: int = 0
    why_no_logits: str | None = None
    left_out: Mapping[str, str] = attrs.field(factory=dict)
    """Why there is no such column of statistics, by column."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what is found."""
        names = ("checksum", "architecture", "d_sae", "inputs", "targets", "tokens", "features")
        return {name: getattr(self, name) for name in names}


@attrs.frozen(kw_only=True)
class StoreManifest:
    """What is in a store, and what it was made of."""

    model: Mapping[str, Any]
    """``name``, ``fingerprint`` of the weights, and ``bos``, the id of the token that begins texts, or None."""
    dataset: Mapping[str, Any]
    """What is known of the text: ``dataset``, ``held_out``, ``seed``."""
    contexts: int
    context_size: int
    digest: str
    """The sha256 of the contexts' token ids."""
    mask: str | None = None
    """The sha256 of the mask that says which tokens count beside what SAEs say; None: there is none."""
    options: Mapping[str, Any]
    saes: Sequence[AboutSAE]
    files: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """By path in the folder: ``bytes`` and ``sha256``."""
    saekit_version: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what is found, as plain values."""
        table: dict[str, Any] = {
            "model": dict(self.model),
            "contexts": {"number": self.contexts, "size": self.context_size, "digest": self.digest, "mask": self.mask},
            "options": dict(self.options),
            "SAEs": len(self.saes),
            **{f"SAE {number + 1}": one.identity for number, one in enumerate(self.saes)},
        }
        return json.loads(json.dumps(table))  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        table = {"format": FORMAT, **json.loads(json.dumps(attrs.asdict(self)))}
        write_text(folder / MANIFEST, json.dumps(sealed(table), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it; :class:`DataError` for a folder that is no store, or one that is damaged."""
        try:
            table = read_json(folder / MANIFEST)
        except FileNotFoundError:
            raise PlaceError(_why_none(folder)) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / MANIFEST} cannot be read: {error}. {ANEW}") from error
        if not isinstance(table, dict) or "format" not in table:
            raise DataError(f"{folder / MANIFEST} is not the manifest of a feature store. {ANEW}")
        if table["format"] != FORMAT:
            raise DataError(
                f"the feature store {str(folder)!r} is of format {short(table['format'])}, and this version of saekit "
                f"reads {FORMAT}: {ANEW[0].lower()}{ANEW[1:]}, or read it with the saekit that wrote it "
                f"({table.get('saekit_version') or 'its version is not known'})"
            )
        if not is_sealed(table):
            raise DataError(f"{folder / MANIFEST} was changed after it was written. {ANEW}")
        del table["seal"], table["format"]
        try:
            return cast("Self", Structurer().structured(table, cls))
        except ProblemsError as problems:
            said = "; ".join(f"{path}: {text}" if path else text for path, text in problems.items)
            raise DataError(f"{folder / MANIFEST} does not say what a store's says: {said}. {ANEW}") from None

    def named_as(self, other: Self) -> Self:
        """The same with the names of SAEs, and what SAEs say of themselves, of ``other``, which has the same SAEs."""
        pairs = zip(self.saes, other.saes, strict=True)
        saes = tuple(attrs.evolve(one, name=new.name, metadata=new.metadata) for one, new in pairs)
        return attrs.evolve(self, saes=saes)

    def check_files(self, folder: Path, *, whole: bool | None = None) -> None:
        """:class:`DataError` for a file that is missing or damaged.

        Sizes are compared, and checksums of all files (``whole``), of none (False), or of those that are small.
        """
        try:
            self._check_files(folder, whole)
        except OSError as error:
            raise DataError(f"the feature store {str(folder)!r} cannot be read: {error.strerror or error}") from error

    def _check_files(self, folder: Path, whole: bool | None) -> None:
        for name, entry in self.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != entry["bytes"]:
                what = "is missing" if found is None else f"has {found:,} bytes instead of {entry['bytes']:,}"
                raise DataError(f"the feature store {str(folder)!r} is damaged: {name} {what}. {ANEW}")
            asked = entry["bytes"] <= _SMALL if whole is None else whole
            if asked and sha256(path) != entry["sha256"]:
                raise DataError(
                    f"the feature store {str(folder)!r} is damaged: {name} is not what was written (its checksum "
                    f"differs). {ANEW}"
                )


def is_store(folder: Path) -> bool:
    """Whether what lies in ``folder`` says that it is a store, which may be damaged."""
    try:
        table = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        beside = [(folder / name).is_file() for name in _BESIDE]
        return any(beside) if (folder / MANIFEST).is_file() else all(beside)
    return isinstance(table, dict) and {"format", "saes", "context_size"} <= set(table)


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, a line for each: first what was asked for, then checksums, where they say more."""
    found = dict(_differing(there, wanted))
    if {"contexts.number", "contexts.size"} & {*found}:
        found.pop("contexts.digest", None)  # of other contexts it is another, of course
    ordered = sorted(found, key=lambda name: name.endswith(_CHECKSUMS))
    return [f"{_in_words(name)}: there {found[name][0]}, wanted {found[name][1]}" for name in ordered]


def _in_words(name: str) -> str:
    """As the argument, where there is one, by which it is asked for."""
    section, _, own = name.rpartition(".")
    own = _WORDS.get(own, own)
    return own if section in ("", "options", "contexts") else f"{own} of {section.replace('.', ' ')}"


def _differing(
    there: Mapping[str, Any], wanted: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, tuple[str, str]]]:
    for key in dict.fromkeys([*there, *wanted]):
        one, other, name = there.get(key), wanted.get(key), f"{path}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differing(one, other, f"{name}.")
        elif one != other:
            yield name, (_shown(one), _shown(other))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        value = value.get("checksum", value)
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def files_listed(folder: Path) -> Any:
    """What the manifest that is in ``folder`` now says of files; None: there is none that can be read."""
    try:
        table = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
    return table.get("files") if isinstance(table, dict) else None


def sealed(table: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with a checksum of itself."""
    return {**table, "seal": _seal(table)}


def is_sealed(table: object) -> bool:
    """Whether a table is as :func:`sealed` made it."""
    if not isinstance(table, dict) or "seal" not in table:
        return False
    return bool(table["seal"] == _seal({name: value for name, value in table.items() if name != "seal"}))


def _seal(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no feature store {str(folder)!r}: collect features first (saekit features SAE)"
    if is_store(folder / "features"):
        return f"{str(folder)!r} is not a feature store, but there is one in it: name {str(folder / 'features')!r}"
    if is_store(folder.parent):
        return f"{str(folder)!r} is a part of the feature store {str(folder.parent)!r}: name that"
    return (
        f"{str(folder)!r} is not a feature store, or one that was not finished: it has no {MANIFEST}. Collect features "
        "into it first (saekit features SAE), which goes on where it stopped"
    )
