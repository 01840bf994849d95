"""``saekit bench-synthetic``: how well each architecture finds features that are known."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.commands import preflight
from saekit.commands.jobs import train
from saekit.config import TrainConfig
from saekit.config.files import load_config
from saekit.defaults import NO_MODEL, TOY_SOURCE
from saekit.errors import ConfigError, SaekitError
from saekit.files.storage import write_bytes, write_text
from saekit.kinds import SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.registry import Registered
from saekit.plugins.text import printable
from saekit.progress import ProgressDisplay
from saekit.toy.synthetic import AXES, MEASURES, Setting, SyntheticBench, averaged, short_names, sparsity_choices

if TYPE_CHECKING:
    from rich.console import Console

    from saekit.toy.model import ToyModel

__all__ = ["BenchResult", "bench_synthetic", "show_bench"]


_HIGHEST = ("mmcs", "precision", "recall", "f1")


@attrs.frozen(repr=False)
class BenchResult:
    """What came of a bench."""

    rows: Sequence[Mapping[str, Any]]
    """One for each architecture, kind of data and seed."""
    left_out: Mapping[str, str]
    """Architectures that were not tried, and why."""
    files: Sequence[Path] = ()
    """The numbers as JSON, a picture and a page, where a folder was given."""

    def __repr__(self) -> str:
        return f"BenchResult({len(self.rows)} rows of {len({row['architecture'] for row in self.rows})} architectures)"


def bench_synthetic(
    bench: SyntheticBench | None = None,
    folder: str | Path | None = None,
    *,
    plugins: PluginManager | None = None,
    verbose: bool = True,
) -> BenchResult:
    """Train each architecture by the ordinary trainer on hidden activations of random true directions.

    The files go into ``folder``, where one is given; runs leave none.  :class:`saekit.errors.SaekitError` for an
    architecture that was named and cannot be tried.
    """
    bench, plugins = bench or SyntheticBench(), plugins or default_manager()
    if folder is not None:
        _make(Path(folder))
    with tempfile.TemporaryDirectory(prefix="saekit-synthetic-") as place, contextlib.ExitStack() as stack:
        work = _Work(bench, plugins, Path(place))
        tried, left_out = work.architectures()
        settings = bench.settings()
        progress = stack.enter_context(
            ProgressDisplay(len(settings) * bench.seeds * len(tried), doing="Training", unit="SAEs", verbose=verbose)
        )
        rows: list[dict[str, Any]] = []
        for seed in range(bench.seed, bench.seed + bench.seeds):
            for setting, axes in settings.items():
                rows += [{**row, "axes": axes} for row in work.rows(setting, seed, tried)]
                progress.update(len(rows))
    files = _write(Path(folder), bench, rows, left_out) if folder is not None else []
    return BenchResult(rows, left_out, files)


@attrs.frozen
class _Work:
    bench: SyntheticBench
    plugins: PluginManager
    place: Path

    def architectures(self) -> tuple[list[Registered], dict[str, str]]:
        """Those to try, and why others are not; one that was named must be one to try."""
        named = self.bench.architectures
        registry = self.plugins.registry(SAE_ARCHITECTURES)
        items = [self.plugins.get(SAE_ARCHITECTURES, key) for key in dict.fromkeys(named)] if named else registry.items
        left_out = {}
        with self._toy(next(iter(self.bench.settings())), self.bench.seed) as toy:
            for item in items:
                try:
                    item.check_requirements()
                    config = self._configs(item, next(iter(self.bench.settings())), toy, self.bench.seed)[0]
                    preflight.of_training([config], self.plugins).raise_any()
                except SaekitError as error:
                    if named:
                        raise
                    left_out[item.key] = str(error).splitlines()[-1].strip()
        if len(left_out) == len(items):
            raise ConfigError("there is no architecture to try: none is registered that trains on one site")
        return [item for item in items if item.key not in left_out], left_out

    @contextlib.contextmanager
    def _toy(self, setting: Setting, seed: int) -> Iterator[ToyModel]:
        """The toy model, which lies in a file meanwhile."""
        from saekit.toy.model import ToyModel

        model = ToyModel.random(setting.toy(seed))
        model.W.data *= setting.length()
        path = model.save(self._path, plugins=self.plugins)
        yield model
        path.unlink()

    @property
    def _path(self) -> Path:
        return self.place / "toy.safetensors"

    def _configs(self, item: Registered, setting: Setting, toy: ToyModel, seed: int) -> list[TrainConfig]:
        found = []
        for number, options in enumerate(sparsity_choices(item.entry.config, setting, toy.config.n_features)):
            name = f"{item.distribution}-{item.entry.name}-{number}"
            run = self.bench.run({"name": item.key, **options}, str(self._path), str(self.place), name, seed)
            run["model"] = {"backend": NO_MODEL, "device": "cpu"}
            run["activations"]["source"]["name"] = TOY_SOURCE
            found.append(load_config(run, plugins=self.plugins))
        return found

    def rows(self, setting: Setting, seed: int, items: Sequence[Registered]) -> Iterator[dict[str, Any]]:
        """Train all on the same rows, and measure each."""
        from saekit.toy.recovery import measure_recovery

        with self._toy(setting, seed) as toy:
            configs = {item: self._configs(item, setting, toy, seed) for item in items}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of features that die: that is what is measured
                swept = train([config for several in configs.values() for config in several], plugins=self.plugins)
            about = {**attrs.asdict(setting), "n_features": toy.config.n_features}
            for item, several in configs.items():
                found = [
                    (config, measure_recovery(swept.results[str(config.checkpoints.name)].sae, toy, seed=seed + 1))
                    for config in several
                    if config.checkpoints.name in swept.results
                ]
                if not found:
                    reason = swept.diverged[str(several[0].checkpoints.name)]
                    yield {"architecture": item.key, "setting": about, "seed": seed, "diverged": reason}
                    continue
                config, best = min(found, key=lambda pair: abs(pair[1].l0 - pair[1].true_l0))
                chosen = sparsity_choices(item.entry.config, setting, toy.config.n_features)[several.index(config)]
                yield {
                    "architecture": item.key, "setting": about, "seed": seed, "options": chosen, **best.as_dict()
                }  # fmt: skip


def _make(folder: Path) -> None:
    from saekit.errors import PlaceError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"cannot write into {folder}: {error.strerror or error}") from error


def _write(
    folder: Path, bench: SyntheticBench, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]
) -> list[Path]:
    from saekit.toy.synthetic_pictures import synthetic_page, synthetic_png

    files = [folder / name for name in ("synthetic.json", "synthetic.png", "synthetic.html")]
    table = {"bench": attrs.asdict(bench), "measures": list(MEASURES), "rows": rows, "left_out": left_out}
    write_text(files[0], json.dumps(table, indent=1) + "\n")
    write_bytes(files[1], synthetic_png(rows))
    write_text(files[2], synthetic_page(rows))
    return files


def show_bench(result: BenchResult, console: Console) -> None:
    """The numbers, the mean over seeds, with the best of each column and kind of data in bold, and where they lie."""
    from rich.table import Table

    whole = [row for row in result.rows if "diverged" not in row]
    means, names = list(averaged(whole)), short_names(result.rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("true L0", "in pairs", "per dim.", "architecture", *MEASURES.values()):
        table.add_column(head, justify="left" if head == "architecture" else "right")
    before = None
    for row in sorted(means, key=lambda row: [row["setting"][axis] for axis in (*AXES,)]):
        kind = [f"{row['setting'][axis]:g}" for axis in AXES]
        rivals = [other for other in means if other["setting"] == row["setting"]]
        cells = [
            f"[bold]{row[name]:.3f}[/bold]" if name in _HIGHEST and row[name] == max(o[name] for o in rivals)
            else f"{row[name]:.3f}" for name in MEASURES
        ]  # fmt: skip
        if before not in (None, kind):
            table.add_section()
        table.add_row(*(kind if kind != before else [""] * 3), printable(names[row["architecture"]]), *cells)
        before = kind
    console.print(table)
    for row in result.rows:
        if "diverged" in row:
            said = f"{names[row['architecture']]} diverged (seed {row['seed']}): {row['diverged']}"
            console.print(printable(said), markup=False, highlight=False, soft_wrap=True)
    if result.left_out:
        left_out = ", ".join(sorted(result.left_out))
        console.print(f"not for one site: {left_out}", markup=False, highlight=False, soft_wrap=True)
    for path in result.files:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
