"""``saekit watch``: a run that trains in another process, or on another machine over a shared disk.  Imports no torch.

It reads what the run writes for itself, ``run.json`` and ``metrics.jsonl``, and of these only what is new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saekit.commands.show import show
from saekit.errors import PlaceError, StorageError
from saekit.files.names import SAE_CONFIG
from saekit.files.paths import as_path
from saekit.plugins.text import printable
from saekit.reports.folder import RunFolder, SAERun, State, read_run
from saekit.reports.history import History, MetricsFile
from saekit.reports.numbers import count, duration, fraction, number, short_count
from saekit.reports.panels import Panel, panels_of
from saekit.reports.sparkline import sparkline
from saekit.runs.place import RECORD

__all__ = ["Watched", "watch"]

_EVERY = {True: 1.0, False: 30.0}
"""Seconds between two looks in a terminal, and between two lines elsewhere."""
_RECORD_EVERY = 3.0  # seconds between two looks at the run's own record
_SILENT = 300.0  # seconds without a word after which a run that nobody is seen at work in is taken for gone
_FINISHING = 10.0  # seconds that a run which has ended may go on drawing pictures
_GRACE = 3.0  # seconds from when a process was seen at work until a run that says nothing is gone
_A_LOOK, _LONG_AGO = 10.0, 3600.0


@attrs.define
class Watched:
    """A run as far as it was read."""

    folder: Path
    clock: Callable[[], float] = time.monotonic
    run: RunFolder | None = None
    problem: str = ""
    """Why something could not be read this time."""
    _files: dict[Path, tuple[MetricsFile, History]] = attrs.field(factory=dict)
    _changed: float = attrs.field(init=False)
    _looked: float = -1e9
    _locked: bool = False
    """Whether a process was seen at work in the folder."""
    _came: bool = False
    """Whether anything was written since this began."""
    _ended: float | None = None
    """When the end was seen first."""

    def __attrs_post_init__(self) -> None:
        self._changed = self.clock()

    @property
    def silent(self) -> float:
        """Seconds since anything was read."""
        return self.clock() - self._changed

    def look(self) -> None:
        """Read what is new."""
        self.problem = ""
        try:
            if self.clock() - self._looked >= _RECORD_EVERY or self.run is None:
                self._look_at_record()
            for sae in () if self.run is None else self.run.saes.values():
                file, history = self._files[sae.metrics]
                known = history.records
                if file.update(history):
                    self._changed = self.clock()
                    self._came = self._came or bool(known)
        except StorageError as error:
            if isinstance(error, PlaceError) and self.run is None:
                raise
            self.problem = str(error)  # of a disk that is shared, perhaps only for now

    def _look_at_record(self) -> None:
        if not any((self.folder / name).exists() for name in (RECORD, "config.toml")):
            _check_may_come(self.folder)
            self.run, self._files = None, {}
            return
        self._looked = self.clock()
        run = read_run(self.folder)
        for sae in run.saes.values():
            file, history = self._files.get(sae.metrics) or (MetricsFile(sae.metrics), History())
            self._files[sae.metrics] = file, history
            sae.history = history
        self.run = run
        self._locked = self._locked or run.state.at_work

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for."""
        if self.run is None:
            return False
        state = self.state
        if state.kind == "running":
            self._ended = None
            return False
        if state.kind == "stopped":
            return self._is_gone
        if self._ended is None:
            self._ended = self.clock()
        finishing = self.clock() - self._ended < _FINISHING
        if state.at_work and not finishing:  # it is gone on with
            return False
        return not state.at_work

    @property
    def state(self) -> State:
        """How it stands: what writes is at work, whatever clocks and locks of a shared disk say."""
        state = State("stopped") if self.run is None else self.run.state
        if self._locked and state.kind == "running" and not state.at_work:  # it was seen, and is gone
            return State("stopped", "its process is gone, and did not say why")
        return State("running") if state.kind == "stopped" and self._came and self.silent < _SILENT else state

    @property
    def _is_gone(self) -> bool:
        """Of a run that nobody is seen at work in: whether it is silent for longer than evals and checkpoints take."""
        if self._locked:
            return self.silent > _GRACE
        between = [sae.history.seconds / sae.history.records for sae in self._saes if sae.history.records]
        age = 0.0 if self.run is None else self.run.state.age
        patience = max(_SILENT, 20 * max(between, default=0.0))
        return self.silent > patience or (age > patience and self.silent > (_A_LOOK if age < _LONG_AGO else 0))

    @property
    def _saes(self) -> list[SAERun]:
        return [] if self.run is None else list(self.run.saes.values())


def _check_may_come(folder: Path) -> None:
    """:class:`PlaceError` for a folder in which no run will appear."""
    if folder.exists() and not folder.is_dir():
        raise PlaceError(f"{folder} is a file, not a run folder")
    if (folder / SAE_CONFIG).exists():
        raise PlaceError(f"{folder} is the folder of a saved SAE, so there is nothing to watch; saekit show shows it")
    if near := sorted(path.parent.name for path in folder.glob(f"*/{RECORD}")):
        raise PlaceError(f"{folder} is not a run folder, but holds the runs {', '.join(near[:20])}; name one of them")


def watch(folder: str | Path, console: Console, *, every: float | None = None) -> None:
    """Show how the run in ``folder`` gets on, until it ends; then what came of it.

    In a terminal a table that is drawn anew ``every`` second, elsewhere a line every 30 seconds.  A folder that is not
    there yet is waited for.  :class:`PlaceError` for one in which no run will appear.
    """
    watched = Watched(as_path(folder))
    live = console.is_terminal and not console.is_dumb_terminal
    every = _EVERY[live] if every is None else every
    (_watch_live if live else _watch_lines)(watched, console, every)
    console.print()
    gone = watched.state if watched.state.kind == "stopped" else None
    show(watched.folder, console, state=gone)


def _watch_live(watched: Watched, console: Console, every: float) -> None:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            watched.look()
            live.update(picture(watched, console.width, console.height), refresh=True)
            if watched.over:
                return
            time.sleep(every)


def _watch_lines(watched: Watched, console: Console, every: float) -> None:
    said, said_at = "", -1e9
    while True:
        watched.look()
        line = line_of(watched)
        now = watched.clock()
        if line != said and (now - said_at >= every or watched.run is None):
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
            said, said_at = line, now
        if watched.over:
            return
        time.sleep(min(every, 2.0))


# ---- what is shown


def line_of(watched: Watched) -> str:
    """A run in a line."""
    if watched.problem:
        return watched.problem
    if watched.run is None:
        return f"waiting for {watched.folder} to appear"
    saes = _trained(watched.run)
    if not any(sae.history.records for sae in saes):
        return f"{watched.state.kind}, and nothing was logged yet"
    parts = [" ".join(_done(watched.run, watched.silent))]
    for name, key, text in (
        ("loss", "losses/overall_loss", number),
        ("EV", "metrics/explained_variance", fraction),
        ("L0", "metrics/l0", number),
        ("dead", "sparsity/dead_features", count),
    ):
        values = [value for sae in saes if (value := sae.history.get(key)) is not None]
        if values:
            low, high = text(min(values)), text(max(values))
            parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    return "  ".join(parts)


def _done(run: RunFolder, silent: float) -> Iterator[str]:
    """How far it is, how fast, and how long it takes yet: of several SAEs, the one that has the most before it."""
    slowest = min(_trained(run), key=lambda sae: sae.tokens / (sae.options.total_tokens or 1))
    total, rate = slowest.options.total_tokens, slowest.history.rate()
    if total:
        yield f"{100 * slowest.tokens / total:.0f}%  {short_count(slowest.tokens)} of {short_count(total)} tokens"
    else:
        yield f"{short_count(slowest.tokens)} tokens"
    if rate and run.state.kind == "running":
        yield f" {rate:,.0f} tokens/s"
        if total > slowest.tokens:
            yield f" {duration(max((total - slowest.tokens) / rate - silent, 0))} left"


def _trained(run: RunFolder) -> list[SAERun]:
    """The SAEs that were not stopped; of all that were, all."""
    return [sae for sae in run.saes.values() if sae.why_diverged is None] or list(run.saes.values())


def picture(watched: Watched, width: int, height: int) -> RenderableType:
    """What a terminal of ``width`` by ``height`` letters shows."""
    run = watched.run
    if run is None:
        return Text(f"waiting for {printable(watched.folder)} to appear ... (Ctrl-C ends this)")
    first = Text(printable(run.folder), style="bold").append(f"  {_state_text(watched.state)}", style="not bold")
    parts: list[RenderableType] = [first]
    if not run.sweep:
        what = " on ".join(part for part in (run.alone.what, run.alone.where) if part)
        parts.append(Text(printable(what), style="dim", no_wrap=True, overflow="ellipsis"))
    parts += [_bar(run, watched.silent, width), Text()]
    if not any(sae.history.records for sae in run.saes.values()):
        parts.append(Text("nothing was logged yet: the model is loaded, and the first batches are made"))
    elif run.sweep:
        parts.append(_sweep_table(run, width, height - 7))
    else:
        parts.append(_metrics_table(run.alone, width))
    if watched.problem:
        parts.append(Text(printable(watched.problem), style="red"))
    last = f"the last line came {duration(watched.silent)} ago" if watched.silent > 5 else ""
    parts.append(
        Text(" · ".join(text for text in (last, "Ctrl-C ends the watching, not the run") if text), style="dim")
    )
    return Group(*parts)


def _state_text(state: State) -> str:
    return printable(state.kind if state.kind in ("running", "finished") else state.text)


def _bar(run: RunFolder, silent: float, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 2, 0, 0))
    total = sum(sae.options.total_tokens for sae in run.saes.values())
    done = sum(sae.tokens for sae in run.saes.values())
    bar = ProgressBar(total=total or 1, completed=min(done, total or 1), width=max(min(width - 60, 40), 10))
    line.add_row(bar, Text(" ".join(_done(run, silent)), no_wrap=True))
    return line


def _metrics_table(sae: SAERun, width: int) -> Table:
    """A line for each metric: its name, its newest number, and how it came there."""
    table = Table.grid(padding=(0, 2, 0, 0))
    room = max(min(width - 42, 60), 8)
    for panel in panels_of(sae):
        for line in panel.lines:
            main = line is panel.lines[0]
            name = panel.title.partition(" (")[0] if main else f"  {line.name}"
            spark = sparkline(line.pieces, room, log=panel.log, **_ends_of(panel))
            table.add_row(Text(name), Text(line.end, justify="right", style="bold" if main else ""), Text(spark))
    return table


def _ends_of(panel: Panel) -> dict[str, Any]:
    return {"lower": panel.lower, "upper": panel.upper} if panel.upper == 1.0 else {}


def _sweep_table(run: RunFolder, width: int, room: int) -> Table:
    """A line for each SAE."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(*(Text(name, style="dim") for name in ("SAE", "", "loss", "EV", "L0", "dead", "EV over tokens")))
    saes = list(run.saes.values())
    shown = saes if len(saes) <= room else saes[: max(room - 1, 1)]
    longest = max(min(width - 70, 40), 12)
    for sae in shown:
        history = sae.history
        total = sae.options.total_tokens
        cells = [
            (history.get("losses/overall_loss"), number),
            (history.get("metrics/explained_variance"), fraction),
            (history.get("metrics/l0"), number),
            (history.get("sparsity/dead_features"), count),
        ]
        series = history.series.get("metrics/explained_variance")
        spark = "" if series is None else sparkline(series.pieces(), 20, lower=0.0, upper=1.0)
        done = "diverged" if sae.why_diverged else f"{100 * sae.tokens / total:.0f}%" if total else ""
        texts = ["-" if value is None else text(value) for value, text in cells]
        name = Text(printable(sae.name), no_wrap=True, overflow="ellipsis")
        name.truncate(longest, overflow="ellipsis")
        table.add_row(name, Text(done), *(Text(text, justify="right") for text in texts), Text(spark))
    if len(shown) < len(saes):
        table.add_row(Text(f"... and {len(saes) - len(shown)} more", style="dim"))
    return table
