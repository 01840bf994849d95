"""``saekit show``: what there is of a run, of a sweep or of a saved SAE, and what to type next.

Imports no torch, but for an SAE in another library's files, which is loaded.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saekit.commands.measured import measured_on
from saekit.commands.show_foreign import show_foreign
from saekit.errors import PlaceError, StorageError
from saekit.files.checksums import stated_weights
from saekit.files.names import SAE_CONFIG, SAE_EVALS, SAE_WEIGHTS
from saekit.files.paths import as_path
from saekit.files.storage import check_file, read_json
from saekit.measuring import measured_text
from saekit.plugins.text import printable
from saekit.reports.folder import RunFolder, SAERun, State, read_run
from saekit.reports.numbers import count, fraction, number, size
from saekit.reports.pictures import CURVES, SUMMARY, draw_pictures
from saekit.reports.sweep import NUMBERS
from saekit.reports.table import run_table
from saekit.runs.checkpoints import MANIFEST
from saekit.runs.from_memory import IN_MEMORY, OPTIONS
from saekit.runs.place import RECORD
from saekit.saved import WEIGHT_FILES

__all__ = ["show"]

_ENOUGH = 4 << 20
"""Bytes at the end of metrics that the newest numbers are in."""
_FIRST = {"explained_variance": "explained variance", "ce_recovered": "CE recovered", "l0": "L0"}
"""What is told of those that were measured."""
_ALIKE = 1.1
"""So many times as large an L0 is about the same."""
_STORE = "manifest.json"
_MOST_RUNS = 40
_MOST_LINES = 60


def show(
    folder: str | Path, console: Console, *, draw: bool = False, open_it: bool = False, state: State | None = None
) -> None:
    """Print what ``folder`` holds: a run, a sweep, one SAE of it, a saved SAE, or several runs.

    ``draw`` makes the pictures anew; ``open_it`` opens them, and makes them where there are none.  ``state`` is how it
    stands with the run, where more is known than its folder says.

    :class:`PlaceError` where there is none of that, and :class:`StorageError` for what cannot be read.
    """
    folder = as_path(folder)
    if not _is_run(folder):
        if draw or open_it:
            raise PlaceError(f"{folder} is not a run folder, so there are no pictures to {'draw' if draw else 'open'}")
        _show_other(folder, console)
        return
    run = read_run(folder, last=None if draw else _ENOUGH)
    if draw or (open_it and not _pictures(run)):
        run = read_run(folder)
        for problem in draw_pictures(run).problems:
            console.print(f"not drawn: {printable(problem)}", style="red", markup=False, soft_wrap=True)
    run.state = state or run.state
    _say(console, f"{folder}: {run.state.text}", style="bold")
    for problem in run.problems:
        _say(console, f"broken: {problem}", style="red")
    for sae in run.saes.values():
        if sae.history.damaged:
            whose = f" of {sae.name}" if run.sweep else ""
            _say(console, f"broken: {sae.history.damaged:,} lines of the metrics{whose} are no records", style="red")
    console.print()
    if all(sae.history.records for sae in run.saes.values()) or run.sweep:
        console.print(run_table(run, console))
    else:
        _say(console, "nothing was logged yet" if run.state.kind == "running" else "nothing was logged")
    console.print()
    _list(
        console, "pictures", [f"{path} ({size(path.stat().st_size)})" for path in _pictures(run)] or [_no_pictures(run)]
    )
    _list(console, "features", list(_features(run)))
    _list(console, "next", [f"{what:14} {command}" for what, command in _next(run)])
    if open_it:
        _open(run, console)


def _is_run(folder: Path) -> bool:
    """Whether there is a run, or what is left of one."""
    return any((folder / name).exists() for name in (RECORD, "config.toml"))


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(printable(text, keep="\n"), style=style, markup=False, highlight=False, soft_wrap=True)


def _list(console: Console, title: str, lines: list[str]) -> None:
    for line_number, line in enumerate(lines):
        start = Text(f"{title if line_number == 0 else '':10}", style="dim")
        console.print(start.append(printable(line), style="not dim"), soft_wrap=True, highlight=False)


def _pictures(run: RunFolder) -> list[Path]:
    names = SUMMARY if run.sweep else CURVES
    return [run.folder / name for name in names if (run.folder / name).is_file()]


def _no_pictures(run: RunFolder) -> str:
    return f"none; saekit show {_quoted(run.folder)} --draw makes them of the metrics as they are now"


def _features(run: RunFolder) -> Iterator[str]:
    """What was written of features, or how to find them."""
    store, page = run.folder / "features", run.folder / "dashboard.html"
    if (store / _STORE).is_file():
        yield f"collected in {store}"
    if page.is_file():
        yield f"a dashboard: {page}"
    try:
        check_file(run.folder / "features.txt")
        lines = (run.folder / "features.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        if not (store / _STORE).is_file() and not page.is_file() and not _without_model(run):
            yield f"none were collected; saekit features {_quoted(run.folder)}{_given(run)} does"
        return
    yield from lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        yield f"... {len(lines) - _MOST_LINES} lines more in {run.folder / 'features.txt'}"
    if (run.folder / "features.html").is_file():
        yield f"as a page: {run.folder / 'features.html'}"


def _next(run: RunFolder) -> Iterator[tuple[str, str]]:
    """What to type, each with what for."""
    folder = _quoted(run.folder)
    if run.state.kind == "running":
        yield "watch it", f"saekit watch {folder}"
    elif run.state.kind != "finished" and (run.folder / RECORD).exists():
        yield "go on with it", _resuming(run) or f"saekit train --resume {folder}"
    if any(sae.saved for sae in run.saes.values()) and not _without_model(run):
        collected = (run.folder / "features" / _STORE).is_file()
        if not collected:
            yield "features", f"saekit features {folder}{_given(run)}"
        yield "dashboard", f"saekit dashboard {folder}{_given(run, *(['model'] if collected else IN_MEMORY))}"
    if run.sweep:
        if sum(bool(sae.saved) for sae in run.saes.values()) > 1 and not _without_model(run):
            yield "compare them", f"saekit compare {folder}{_given(run)}"
        if (found := _highest(run)) is not None:
            best, why = found
            yield "look at one", f"saekit show {_quoted(best.home)}  # {why}"
        return
    sae = run.alone
    if sae.saved:
        yield "in Python", f"sae = saekit.SAE.load({str(sae.home / 'sae')!r})"
    if run.state.kind == "finished" and sae.options.total_tokens and (run.folder / RECORD).exists():
        longer = 2 * sae.options.whole("training.training_tokens")
        option = "training.training_tokens"
        command = f"saekit train --resume {folder} {option}={longer} --allow {option}"
        yield "train longer", _resuming(run, f"[{option + f'={longer}'!r}]", option) or command
    if not sae.options.problem:
        other = " checkpoints.name=another" if sae.options.text("checkpoints.name") else ""
        named = "".join(f" {option}={kind.upper()}" for kind, option in OPTIONS.items() if kind in _unnamed(run))
        yield "one like it", f"saekit plan {_quoted(sae.home / 'config.toml')}{named}{other}"


def _without_model(run: RunFolder) -> bool:
    """Whether it says that there is no language model: what needs one would refuse it."""
    return all(sae.record is not None and sae.record.model == "" for sae in run.saes.values())


def _unnamed(run: RunFolder) -> tuple[str, ...]:
    """What came from memory: without it given anew, commands refuse."""
    record = next(iter(run.saes.values())).record
    return () if record is None else record.in_memory


def _given(run: RunFolder, *kinds: str) -> str:
    """The options by which a command is given what came from memory."""
    return "".join(f" --{kind} {kind.upper()}" for kind in kinds or IN_MEMORY if kind in _unnamed(run))


def _resuming(run: RunFolder, changes: str = "", allowed: str = "") -> str | None:
    """How a run goes on that needs something from memory, which a command line has not; None: it needs nothing."""
    if not (needed := _unnamed(run)):
        return None
    arguments = [repr(str(run.folder)), *([f"overrides={changes}", f"allow=[{allowed!r}]"] if changes else [])]
    return f"saekit.resume({', '.join([*arguments, *(f'{kind}=...' for kind in needed)])})"


def _highest(run: RunFolder) -> tuple[SAERun, str] | None:
    """The SAE that recovers most of the loss, or else explains most of the variance, and that in words; None where
    nobody can say.

    Of SAEs whose L0 differ, it is as a rule the densest, and so not called the best.
    """
    healthy = {name: sae for name, sae in run.saes.items() if sae.why_diverged is None}
    densities = {name: sae.history.get(*NUMBERS["l0"]) for name, sae in healthy.items()}
    for metric in ("ce_recovered", "explained_variance"):
        found = {name: sae.history.get(f"evals/{metric}") for name, sae in healthy.items()}
        measured = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        if not measured:
            continue
        name = max(measured, key=lambda name: measured[name])
        told, all_of = densities[name], [value for one in measured if (value := densities[one])]
        why = f"the highest {_FIRST[metric]}, {fraction(measured[name])}"
        if told is None:
            return run.saes[name], why
        alike = max(all_of) <= _ALIKE * min(all_of) if all_of else False
        more = (
            "" if alike else f", where all have {number(min(all_of))} to {number(max(all_of))}: compare SAEs of one L0"
        )
        return run.saes[name], f"{why}, at an L0 of {number(told)}{more if len(all_of) > 1 else ''}"
    return None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _open(run: RunFolder, console: Console) -> None:
    """The page, or else the picture, in a browser."""
    import webbrowser

    found = sorted(_pictures(run), key=lambda path: path.suffix)  # .html before .png
    if not found:
        _say(console, "there is no picture to open: nothing was logged", style="red")
    elif not webbrowser.open(found[0].resolve().as_uri()):
        _say(console, f"no browser was found; the picture is {found[0]}", style="red")


# ---- what is no run


def _show_other(folder: Path, console: Console) -> None:
    if (folder / MANIFEST).exists():
        run = folder.resolve().parent.parent
        raise PlaceError(f"{folder} is a checkpoint; saekit show {_quoted(run)} shows its run")
    if _is_described(folder):
        _show_sae(folder, console)
        return
    if folder.is_file() and folder.name.lower().endswith(WEIGHT_FILES):
        show_foreign(folder, console)
        return
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is not there"
        raise PlaceError(f"{folder} {what}; give a run folder, as `saekit train` prints it, or a folder with an SAE")
    runs = [path.parent for path in folder.glob(f"*/{RECORD}")]
    if runs:
        _show_runs(folder, runs, console)
        return
    show_foreign(folder, console)


def _is_described(folder: Path) -> bool:
    """Whether ``cfg.json`` says what the SAE is, as saekit writes it, or is all there is; or is damaged."""
    if not (folder / SAE_CONFIG).exists():
        return (folder / SAE_WEIGHTS).exists() and not (folder / "config.json").exists()
    try:
        table = read_json(folder / SAE_CONFIG)
    except (OSError, ValueError):
        return True  # which is said
    if not isinstance(table, Mapping) or "saekit" in table:
        return True
    return "d_sae" in table and not (folder / SAE_WEIGHTS).exists()


def _show_sae(folder: Path, console: Console) -> None:
    """A folder with an SAE alone, as its ``cfg.json`` says."""
    try:
        table = read_json(folder / SAE_CONFIG)
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder / SAE_CONFIG} cannot be read, so this is no SAE that loads: {error}") from error
    if not isinstance(table, Mapping):
        raise StorageError(f"{folder / SAE_CONFIG} holds {type(table).__name__}, expected an object")
    _say(console, f"{folder}: an SAE", style="bold")
    console.print()
    grid = Table.grid(padding=(0, 3, 0, 0))
    for name, value in (*_about(table), *_measured(folder)):
        if value not in (None, ""):
            grid.add_row(Text(name, style="dim"), Text(printable(value)))
    console.print(grid)
    console.print()
    _list(console, "next", [f"{'in Python':14} sae = saekit.SAE.load({str(folder)!r})"])


def _about(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is known of a saved SAE."""
    metadata = table.get("metadata")
    known = {**table, **(metadata if isinstance(metadata, Mapping) else {})}
    own = table.get("saekit")
    own = own if isinstance(own, Mapping) else {}
    sites = [
        one.get("hook_name")
        for key in ("inputs", "targets")
        for one in _listed(own.get(key))
        if isinstance(one, Mapping)
    ]
    yield "architecture", own.get("architecture") or table.get("architecture")
    yield "features", f"{table['d_sae']:,}" if isinstance(table.get("d_sae"), int) else table.get("d_sae")
    yield "width", table.get("d_in")
    yield "site", " and ".join(map(str, sites)) or known.get("hook_name") or known.get("hook_point")
    yield "model", known.get("model_name")
    yield "text", known.get("dataset_path")
    yield "context size", known.get("context_size")
    yield "type", table.get("dtype")


def _measured(folder: Path) -> Iterator[tuple[str, str]]:
    """What ``saekit.evaluate`` has found of these weights."""
    try:
        found = read_json(folder / SAE_EVALS)
        values, errors, about = (dict(found[name]) for name in ("values", "errors", "about"))
        on = f"{measured_on(about)}; at {about.get('sites')}"
    except (OSError, ValueError, LookupError, TypeError):
        return
    measured, now = about.get("weights_sha256"), stated_weights(folder)
    if measured is not None and now is not None and measured != now:
        yield "measured", f"nothing: {SAE_EVALS} is of other weights; saekit eval {_quoted(folder)} measures these"
        return
    for metric, name in _FIRST.items():
        value, error = values.get(metric), errors.get(metric)
        if isinstance(value, (int, float)):
            yield name, measured_text(value, error if isinstance(error, (int, float)) else None)
    yield "measured on", on


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _show_runs(folder: Path, runs: list[Path], console: Console) -> None:
    """A line for each run in a folder, the newest first."""
    from rich.box import SIMPLE_HEAD

    runs.sort(key=lambda path: (path / RECORD).stat().st_mtime, reverse=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("what", overflow="fold")
    for column in ("tokens", "EV", "L0", "CE rec."):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for path in runs[:_MOST_RUNS]:
        table.add_row(*(escape(printable(cell)) for cell in _line_of(path)))
    console.print(table)
    if len(runs) > _MOST_RUNS:
        _say(console, f"... and {len(runs) - _MOST_RUNS} older ones")
    console.print()
    _list(console, "next", [f"{'more of one':14} saekit show {_quoted(runs[0])}"])


def _line_of(path: Path) -> list[str]:
    try:
        run = read_run(path, last=_ENOUGH >> 3)
        saes = list(run.saes.values())
        if run.sweep:
            tokens = max(sae.tokens for sae in saes)
            return [path.name, f"a sweep of {len(saes)} SAEs", count(tokens), "", "", "", run.state.kind]
        history = run.alone.history
        numbers = [
            history.get("evals/explained_variance", "metrics/explained_variance"),
            history.get("evals/l0", "metrics/l0"),
            history.get("evals/ce_recovered"),
        ]
        shown = ["" if n is None else text(n) for n, text in zip(numbers, (fraction, number, fraction), strict=True)]
        return [path.name, run.alone.what, count(run.alone.tokens), *shown, run.state.kind]
    except StorageError:
        return [path.name, "", "", "", "", "", "broken"]
