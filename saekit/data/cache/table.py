"""What stands in ``manifest.json``, as plain values: the seal, and the check of every field before it is believed.

The seal is ``sha256`` in the file: for each other field the checksum of its value.  Sums of single fields, rather than
one of all, so that a damaged field can be named.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from saekit.errors import DataError
from saekit.files.storage import read_json
from saekit.site import Site

__all__ = [
    "DOCUMENTS",
    "FORMAT",
    "HEADER",
    "POSITIONS",
    "SEAL",
    "TOKENS",
    "Contents",
    "contents",
    "read_table",
    "sealed",
    "why_no_file",
]

TOKENS, DOCUMENTS, POSITIONS = "tokens.safetensors", "documents.safetensors", "positions.safetensors"
FORMAT, SEAL = 1, "sha256"
CHOSEN_FORMAT = 2
"""That of a cache without the rows of tokens that do not count."""
HEADER = 4096
"""Bytes before the numbers of every file: its safetensors header, padded with blanks."""
ROW_TYPES = ("float64", "float32", "float16", "bfloat16")
"""The types that rows can have."""
_TYPES = {"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
          "int64": ("I64", 8), "int32": ("I32", 4)}  # fmt: skip
_SHOWN = 12  # faults that are listed


@attrs.frozen
class Contents:
    """The one tensor of a file."""

    tensor: str
    dtype: str
    """As torch names it."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return HEADER + math.prod(self.shape) * _TYPES[self.dtype][1]

    @property
    def header(self) -> dict[str, Any]:
        """What its safetensors header says."""
        offsets = [0, self.nbytes - HEADER]
        return {self.tensor: {"dtype": _TYPES[self.dtype][0], "shape": [*self.shape], "data_offsets": offsets}}


def contents(
    sites: Mapping[str, tuple[str, int]], size: int, contexts: int, rows: int | None = None
) -> dict[str, Contents]:
    """The files of a shard by name; ``sites`` has the type and ``d_in`` of each site's file.

    ``rows`` are those of the tokens that count, where others are left out: then each has its origin for itself.
    """
    length = contexts * size if rows is None else rows
    origins = (contexts, size) if rows is None else (rows,)
    return {
        TOKENS: Contents("token_ids", "int32", origins),
        DOCUMENTS: Contents("document_ids", "int64", origins),
        **({} if rows is None else {POSITIONS: Contents("positions", "int32", origins)}),
        **{name: Contents("activations", dtype, (length, d_in)) for name, (dtype, d_in) in sites.items()},
    }


def why_no_file(name: str, dtype: str) -> str | None:
    """Why rows of a site with this ``name`` and ``dtype`` cannot be in a cache; None: they can."""
    file = f"{name}.safetensors"
    if not name or any(letter in "/\\" or not letter.isprintable() for letter in name):
        return f"its name {_short(name)} is no file name"
    try:
        if len(file.encode()) > 255:
            return f"its name {_short(name)} is too long for a file name (255 bytes)"
    except UnicodeEncodeError:
        return f"its name {_short(name)} is no text"
    if file in (TOKENS, DOCUMENTS, POSITIONS):
        return f"a file {file} is in every shard"
    if dtype not in ROW_TYPES:
        return f"its type is {_short(dtype)}, and a cache holds {', '.join(ROW_TYPES)}"
    return None


def sealed(table: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` as it is read again, with its seal."""
    plain: dict[str, Any] = json.loads(json.dumps(table))
    return {**plain, SEAL: _sums(plain)}


def _sums(table: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for key, value in table.items()
        if key != SEAL
    }


def read_table(file: Path) -> dict[str, Any]:
    """``manifest.json``, every field of which is what it should be; :class:`DataError` names each that is not.

    A seal need not be there: it was not always.
    """
    try:
        table: dict[str, Any] = read_json(file)
        form = table["format"]
        expected = FORMAT if table.get("rows_per_context") is None else CHOSEN_FORMAT
        if form != expected or type(form) is not int:
            raise DataError(
                f"{file} has format {_short(form)}, and this saekit reads {expected}: update saekit to read it"
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}. {_WHAT_TO_DO}") from error
    found = list(_faults(table))
    if SEAL in table:
        found += _broken(table)
    if found:
        more = f"\n  - and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        listed = "\n".join(f"  - {fault}" for fault in found[:_SHOWN]) + more
        raise DataError(f"{file} is damaged:\n{listed}\n{_WHAT_TO_DO}")
    return table


_WHAT_TO_DO = "Restore it from a copy, or remove the cache and run `saekit cache` again"


def _broken(table: Mapping[str, Any]) -> list[str]:
    """The fields that are not as they were sealed."""
    seal, found = table[SEAL], _sums(table)
    if not isinstance(seal, dict):
        return [f"{SEAL}: found {_short(seal)}, expected the checksum of each field"]
    return [
        f"{key}: {'is missing' if key not in found else 'is not as it was written'}"
        for key in dict.fromkeys([*found, *seal])
        if found.get(key) != seal.get(key)
    ]


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and least <= value < 2**53, f"a whole number of {least} or more"


def _is_sum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


_TABLE: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, dict), "a table")
_LIST: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, list), "a list")
_TEXT: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, str), "text")
_SUM: tuple[Callable[[Any], bool], str] = (_is_sum, "a sha256 of 64 digits")
_Fields = Mapping[str, tuple[Callable[[Any], bool], str]]
_MANIFEST: _Fields = {
    "identity": _TABLE,
    "sites": (lambda value: isinstance(value, list) and bool(value), "a list of one or more"),
    "context_size": _whole(1),
    "contexts_per_shard": _whole(1),
    "shards": _LIST,
    "ended": (lambda value: isinstance(value, bool), "true or false"),
    "position": (lambda value: value is None or isinstance(value, dict), "a table or null"),
    "saekit_version": _TEXT,
    "contexts": _whole(0),
    "rows": _whole(0),
}
_SITE_ROWS: _Fields = {"site": _TABLE, "d_in": _whole(1), "dtype": _TEXT, "itemsize": _whole(1)}
_SITE: _Fields = {
    "hook_name": _TEXT,
    "hook_head_index": (lambda value: value is None or _whole(0)[0](value), "null or a whole number of 0 or more"),
}
_SHARD: _Fields = {"contexts": _whole(1), "files": _TABLE}
_CHOSEN_SHARD: _Fields = {**_SHARD, "rows": _whole(0)}
_FILE: _Fields = {"bytes": _whole(0), "sha256": _SUM, "sample": _SUM}


def _fields(entry: Any, fields: _Fields, where: str = "", *, more: bool = False) -> list[str]:
    """What is wrong with ``entry``, a table of ``fields`` (and with ``more``, others that mean nothing here)."""
    if not isinstance(entry, dict):
        return [f"{where.rstrip('.')}: found {_short(entry)}, expected a table"]
    faults = [f"{where}{key}: is missing" for key in fields if key not in entry]
    faults += [f"{where}{_plain(key)}: is not known" for key in entry if key not in fields and not more]
    return faults + [
        f"{where}{key}: found {_short(entry[key])}, expected {expected}"
        for key, (fits, expected) in fields.items()
        if key in entry and not fits(entry[key])
    ]


def _faults(table: Mapping[str, Any]) -> Iterator[str]:
    """Everything that contradicts what a manifest is, or itself; what depends on a wrong field is left out."""
    chosen = table.get("rows_per_context") is not None
    fields = {**_MANIFEST, "rows_per_context": _whole(1)} if chosen else _MANIFEST
    yield from (faults := _fields(table, fields, more=True))
    if faults:
        return
    for number, entry in enumerate(table["sites"]):
        yield from (wrong := _site_faults(entry, f"sites[{number}]"))
        faults += wrong
    if faults:
        return
    rows = [(f"{_site_name(entry)}.safetensors", (entry["dtype"], entry["d_in"])) for entry in table["sites"]]
    if len(dict(rows)) < len(rows):
        yield f"sites: two have one name among {', '.join(file.removesuffix('.safetensors') for file, _ in rows)}"
        return
    size, contexts, length = table["context_size"], 0, 0
    for number, shard in enumerate(table["shards"]):
        yield from (wrong := _shard_faults(shard, f"shards[{number}]", dict(rows), size, table.get("rows_per_context")))
        faults += wrong
        contexts += 0 if wrong else shard["contexts"]
        length += 0 if wrong else shard["rows"] if chosen else shard["contexts"] * size
    if faults:
        return
    for name, found, expected in (("contexts", table["contexts"], contexts), ("rows", table["rows"], length)):
        if found != expected:
            yield f"{name}: found {found:,}, expected {expected:,}, the shards' together"
    if table["shards"] and table["position"] is None:
        yield "position: found null, expected where in the text to go on after the shards"


def _site_faults(entry: Any, where: str) -> list[str]:
    faults = _fields(entry, _SITE_ROWS, f"{where}.")
    if not faults:
        faults = _fields(entry["site"], _SITE, f"{where}.site.")
    if not faults and (reason := why_no_file(_site_name(entry), entry["dtype"])) is not None:
        faults = [f"{where}: {reason}"]
    if not faults and entry["itemsize"] != _TYPES[entry["dtype"]][1]:
        faults = [f"{where}.itemsize: found {entry['itemsize']}, and {entry['dtype']} has {_TYPES[entry['dtype']][1]}"]
    return faults


def _site_name(entry: Mapping[str, Any]) -> str:
    return Site(**entry["site"]).name


def _shard_faults(
    shard: Any, where: str, rows: Mapping[str, tuple[str, int]], size: int, most: int | None
) -> list[str]:
    if faults := _fields(shard, _SHARD if most is None else _CHOSEN_SHARD, f"{where}."):
        return faults
    length = None if most is None else shard["rows"]
    if length is not None and length > shard["contexts"] * (most or 0):
        return [f"{where}.rows: found {length:,}, and {shard['contexts']:,} contexts have {most} each at most"]
    files, expected = shard["files"], contents(rows, size, shard["contexts"], length)
    faults = [f"{where}.files: {name} is missing" for name in expected if name not in files]
    faults += [f"{where}.files: {_short(name)} is no file of a shard" for name in files if name not in expected]
    for name in (name for name in expected if name in files):
        inner = _fields(files[name], _FILE, f"{where}.files[{name!r}].")
        if not inner and files[name]["bytes"] != expected[name].nbytes:
            shape = " x ".join(f"{length:,}" for length in expected[name].shape)
            inner = [f"{where}.files[{name!r}].bytes: found {files[name]['bytes']:,}, expected "
                     f"{expected[name].nbytes:,} for {shape} numbers of {expected[name].dtype}"]  # fmt: skip
        faults += inner
    return faults


def _plain(key: str) -> str:
    return key if key.isidentifier() else _short(key)


def _short(value: Any) -> str:
    """``value`` as it may stand in a message, whatever it is."""
    text = ascii("".join(itertools.islice(value, 60))) if isinstance(value, str) else None
    if text is None:
        text = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
