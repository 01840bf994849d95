"""The SAEs of a sweep side by side: in what they differ, and how good each is."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from saekit.files.storage import check_file
from saekit.reports.folder import RunFolder, SAERun
from saekit.runs.sweep import short_names

__all__ = ["NUMBERS", "Summary", "flat_options", "summary_of"]

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "l0": ("evals/l0", "metrics/l0"),
    "explained_variance": ("evals/explained_variance", "metrics/explained_variance"),
    "ce_recovered": ("evals/ce_recovered",),
    "mse": ("evals/mse", "losses/mse_loss"),
    "dead_features": ("sparsity/dead_features",),
}
"""The columns of ``summary.csv``, and the metrics that each is taken from, the first that is there."""
_NAMED_TOO = ("model", "dataset", "checkpoints")  # sections whose ``name`` chooses no plugin


@attrs.frozen
class Summary:
    """As :attr:`saekit.SweepResult.summary`, but of whatever there is by now."""

    rows: Sequence[Mapping[str, Any]]
    """For each SAE its name, its options that differ, its numbers, its tokens and its status."""
    options: Mapping[str, str]
    """The columns that are options, each with the name that it is shown under."""


def summary_of(run: RunFolder) -> Summary:
    """Of the sweep ``run``, from the folders of its SAEs; what options differ is told by ``summary.csv`` if there is
    one, and else by its record, or by the configurations as they were written."""
    options = _from_csv(run) or _from_configs(run)
    paths = list(next(iter(options.values()), {}))
    return Summary([_row(sae, options[name]) for name, sae in run.saes.items()], short_names(paths))


def _row(sae: SAERun, options: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: sae.history.get(*sources) for name, sources in NUMBERS.items()}
    diverged = sae.why_diverged is not None
    status = "diverged" if diverged else "trained" if sae.saved else "unfinished"
    shown = dict.fromkeys(numbers) if diverged else numbers
    return {"name": sae.name, **options, **shown, "tokens": round(sae.tokens), "status": status}


def _from_csv(run: RunFolder) -> dict[str, dict[str, Any]]:
    """By SAE, the options that a finished sweep has written; nothing where that does not fit the run."""
    path = run.folder / "summary.csv"
    try:
        check_file(path)
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError, csv.Error):
        return {}
    others = {"name", "tokens", "status", *NUMBERS}
    found = {
        str(line.get("name")): {
            key: _value(text) for key, text in line.items() if key not in others and isinstance(key, str)
        }
        for line in lines
    }
    return found if list(found) == list(run.saes) else {}


def _value(text: str | None) -> Any:
    """What a cell of ``summary.csv`` stands for."""
    for kind in (int, float):
        try:
            return kind(text or "")
        except ValueError:
            continue
    return {"True": True, "False": False, "": None, None: None}.get(text, text)


def _from_configs(run: RunFolder) -> dict[str, dict[str, Any]]:
    """By SAE, the options that the record says they differ in, or else those in which their configurations do."""
    tables = {name: flat_options(sae.options.table) for name, sae in run.saes.items()}
    record = next(iter(run.saes.values())).record
    if record is not None and record.changed is not None:
        return {name: {path: table.get(path) for path in record.changed} for name, table in tables.items()}
    paths = dict.fromkeys(path for table in tables.values() for path in table if path != "checkpoints.name")
    first = next(iter(tables.values()))
    changed = [path for path in paths if any(table.get(path) != first.get(path) for table in tables.values())]
    return {name: {path: table.get(path) for path in changed} for name, table in tables.items()}


def flat_options(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted path, a plugin's key at the path where it is chosen."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = prefix + key
        if not isinstance(value, Mapping):
            found[path] = value
            continue
        if chosen := isinstance(value.get("name"), str) and path not in _NAMED_TOO:
            found[path] = value["name"]
        found |= flat_options({k: v for k, v in value.items() if not (chosen and k == "name")}, f"{path}.")
    return found
