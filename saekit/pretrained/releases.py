"""Tables of releases as files: what they must hold, and :class:`saekit.released.Release` made of them.

A table has a release under each name: ``repo`` (or ``folder``), ``model``, ``loader``, and ``saes``, by their ids.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.errors import ConfigError
from saekit.files.paths import as_path
from saekit.released import OVERRIDES, Release, ReleasedSAE, fault_of_hooks

__all__ = ["BUILT_IN", "Release", "ReleasedSAE", "Releases", "read_releases", "releases_of"]

BUILT_IN = "releases.json.gz"
"""Beside this file: public facts of the registry of sae-lens 6.54.12."""
_FIELDS = ("repo", "folder", "model", "loader", "revision", "overrides", "links", "hooks", "saes")
_COLUMNS = {"id": "id", "path": "path", "l0": "l0", "neuronpedia": "neuronpedia", "ev": "explained_variance",
            "norm_scaling_factor": "norm_scaling_factor"}  # fmt: skip

_WORDS = {str: "a text", int: "a whole number", bool: "true or false", dict: "a table"}


@attrs.frozen
class Releases:
    """Releases from one place.  What the hook ``saekit_register_releases`` builds."""

    _all: tuple[Release, ...]

    def releases(self) -> Iterable[Release]:
        """All of them."""
        return self._all


def read_releases(path: str | Path, source: str = "user") -> Releases:
    """The releases in a ``.toml``, ``.json`` or ``.json.gz`` file; :class:`ConfigError` names what is wrong in it."""
    file = as_path(path)
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(
            f"the releases in {file} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        table = _parsed(text, file)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no table of releases: {error}") from error
    return releases_of(table, source, str(file), beside=file.parent)


def _parsed(text: str, file: Path) -> Any:
    if file.name.endswith(".toml"):
        import tomllib

        return tomllib.loads(text)
    if file.name.endswith((".json", ".json.gz")):
        return json.loads(text)
    raise ValueError("the name must end in .toml, .json or .json.gz")


def releases_of(table: object, source: str, where: str, *, beside: Path | None = None) -> Releases:
    """Those of a table.  ``where`` is for messages; folders in it are from ``beside``.

    :class:`ConfigError` names every fault of a release; those of its SAEs are found when they are looked at.
    """
    columns: Sequence[str] = ()
    if isinstance(table, Mapping) and table.get("schema") == 1:  # rows in the place of tables, which are shorter
        columns, table = table.get("columns", ()), table.get("releases")
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must hold a table for each release, found {type(table).__name__}")
    problems: list[tuple[str, str]] = []
    found = []
    for name, fields in table.items():
        if faults := list(_faults(name, fields)):
            problems += faults
        else:
            found.append(_release(name, fields, columns, source, where, beside))
    if problems:
        raise ConfigError(problems, where)
    return Releases(tuple(found))


def _faults(name: str, fields: object) -> Iterable[tuple[str, str]]:
    if ":" in name or not name.strip() or "/" in name:
        yield name, "is no name for a release: without : and /, please"
    if not isinstance(fields, Mapping):
        yield name, f"expected a table with repo and saes, found {fields!r}"
        return
    for field, value in fields.items():
        if field not in _FIELDS:
            yield f"{name}.{field}", f"is not a field of a release; there are {', '.join(_FIELDS)}"
        elif field in ("repo", "folder", "model", "loader", "revision") and not (isinstance(value, str) and value):
            yield f"{name}.{field}", f"expected a text, found {value!r}"
        elif field in ("overrides", "links") and not isinstance(value, Mapping):
            yield f"{name}.{field}", f"expected a table, found {value!r}"
        elif field == "hooks" and (fault := fault_of_hooks(value)):
            yield f"{name}.{field}", fault
    if bool(fields.get("repo")) == bool(fields.get("folder")):
        yield name, "needs repo, the repository of the Hub, or folder, and not both"
    saes = fields.get("saes")
    if not isinstance(saes, Mapping | list) or not saes:
        yield f"{name}.saes", f"expected a table with the path of each SAE by its id, found {saes!r}"
    yield from _wrong_overrides(name, fields.get("overrides"))


def _wrong_overrides(name: str, overrides: object) -> Iterable[tuple[str, str]]:
    for field, value in overrides.items() if isinstance(overrides, Mapping) else ():
        kind = OVERRIDES.get(field)
        if kind is None:
            yield f"{name}.overrides.{field}", f"cannot be overridden; there are {', '.join(OVERRIDES)}"
        elif type(value) is not kind:
            yield f"{name}.overrides.{field}", f"expected {_WORDS[kind]}, found {value!r}"


def _release(
    name: str, fields: Mapping[str, Any], columns: Sequence[str], source: str, where: str, beside: Path | None
) -> Release:
    given = fields["saes"]
    saes = given if isinstance(given, Mapping) else _by_id(given, columns, f"{name}.saes", where)
    overrides = dict(fields.get("overrides", {}))
    folder = fields.get("folder")

    def facts(one: str) -> ReleasedSAE:
        try:
            return ReleasedSAE.of(one, saes[one], f"{name}.saes.{one}")
        except ConfigError as error:
            raise ConfigError(error.problems, where) from None

    return Release(
        name=name,
        repo=fields.get("repo"),
        folder=None if folder is None else str((beside or Path()) / as_path(folder)),
        model=fields.get("model"),
        loader=fields.get("loader"),
        revision=overrides.get("revision", fields.get("revision")),
        overrides=overrides,
        links=dict(fields.get("links", {})),
        hooks=tuple(map(tuple, fields.get("hooks", ()))),
        source=source,
        where=where,
        ids=tuple(saes),
        facts=facts,
    )


def _by_id(rows: Sequence[Any], columns: Sequence[str], at: str, where: str) -> dict[str, Any]:
    """Rows as tables; those that are texts alone are ids."""
    found: dict[str, Any] = {}
    names = [_COLUMNS.get(column, column) for column in columns] or ["id"]
    for row in rows:
        values = [row] if isinstance(row, str) else row
        if not isinstance(values, list) or not values or len(values) > len(names) or not isinstance(values[0], str):
            raise ConfigError([(at, f"expected ids, found {row!r}")], where)
        if values[0] in found:
            raise ConfigError([(at, f"has the id {values[0]!r} twice")], where)
        found[values[0]] = dict(zip(names[1:], values[1:], strict=False))
    return found
