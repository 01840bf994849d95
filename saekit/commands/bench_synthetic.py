"""``saekit bench-synthetic``: how well each architecture finds features that are known."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.commands import preflight
from saekit.commands.jobs import train
from saekit.config import TrainConfig
from saekit.config.files import load_config, plain_config
from saekit.defaults import NO_MODEL, TOY_SOURCE
from saekit.errors import ConfigError, SaekitError, TrainingInterrupted
from saekit.files.paths import as_path
from saekit.files.storage import write_bytes, write_text
from saekit.kinds import SAE_ARCHITECTURES
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.registry import Registered
from saekit.plugins.text import printable
from saekit.progress import ProgressDisplay
from saekit.runs.sweep import member_names
from saekit.toy.synthetic import (
    AXES,
    MEASURES,
    Setting,
    SyntheticBench,
    averaged,
    short_names,
    sparsity_choices,
    told_problem,
)

if TYPE_CHECKING:
    from rich.console import Console

    from saekit.runs.results import SweepResult
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
    home = None if folder is None else as_path(folder)
    with tempfile.TemporaryDirectory(prefix="saekit-synthetic-") as place, contextlib.ExitStack() as stack:
        work = _Work(bench, plugins, Path(place))
        tried, left_out = work.architectures()
        if home is not None:
            _make(home)
        settings = bench.settings()
        progress = stack.enter_context(
            ProgressDisplay(len(settings) * bench.seeds * len(tried), doing="Training", unit="SAEs", verbose=verbose)
        )
        rows: list[dict[str, Any]] = []
        for seed in range(bench.seed, bench.seed + bench.seeds):
            for setting, axes in settings.items():
                rows += [{**row, "axes": axes} for row in work.rows(setting, seed, tried)]
                progress.update(len(rows))
    files = [] if home is None else _write(home, bench, rows, left_out)
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
        base, seed, left_out = next(iter(self.bench.settings())), self.bench.seed, {}
        with self._toy(base, seed) as toy:
            for item in items:
                try:
                    item.check_requirements()
                    config = self._configs(item, base, toy, seed)[0]
                    preflight.of_training([config], self.plugins).raise_any()
                    self._build(config, toy)
                except SaekitError as error:
                    if named:
                        raise
                    left_out[item.key] = str(error).splitlines()[-1].strip()
        if len(left_out) == len(items):
            raise ConfigError("there is no architecture to try: none is registered that trains on one site")
        return [item for item in items if item.key not in left_out], left_out

    def _build(self, config: TrainConfig, toy: ToyModel) -> None:
        """That there is an SAE of so many features, which its own options may refuse."""
        from saekit.pretrained.sae import SAE

        options = plain_config(config.sae.options, self.plugins)
        SAE.from_dict(
            {"name": config.sae.key, **options, "d_in": toy.config.n_hidden}, device="cpu", plugins=self.plugins
        )

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
        for options in sparsity_choices(item.entry.config, setting, toy.config.n_features):
            run = self.bench.run({"name": item.key, **options}, str(self._path), str(self.place), seed)
            run["model"] = {"backend": NO_MODEL, "device": "cpu"}
            run["activations"]["source"]["name"] = TOY_SOURCE
            found.append(load_config(run, plugins=self.plugins))
        return found

    def rows(self, setting: Setting, seed: int, items: Sequence[Registered]) -> Iterator[dict[str, Any]]:
        """Train all on the same rows, and measure each."""
        with self._toy(setting, seed) as toy:
            about = {"setting": {**attrs.asdict(setting), "n_features": toy.config.n_features}, "seed": seed}
            configs = {}
            for item in items:
                several = self._configs(item, setting, toy, seed)
                try:
                    self._build(several[0], toy)
                except ConfigError as error:
                    yield {"architecture": item.key, **about, "problem": str(error)}
                else:
                    configs[item] = several
            if not configs:
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of features that die: that is what is measured
                every = [config for several in configs.values() for config in several]
                try:
                    swept = train(every, plugins=self.plugins)
                except TrainingInterrupted as error:  # its checkpoint goes with the rest
                    raise KeyboardInterrupt("interrupted; nothing is kept of this bench") from error
                names = iter(member_names(every, self.plugins)[1])
            for item, several in configs.items():
                choices = sparsity_choices(item.entry.config, setting, toy.config.n_features)
                tried = dict(zip(islice(names, len(several)), choices, strict=True))
                yield {"architecture": item.key, **about, **_best(tried, swept, toy, seed)}


def _best(tried: Mapping[str, Mapping[str, Any]], swept: SweepResult, toy: ToyModel, seed: int) -> dict[str, Any]:
    """Of SAEs by name that were asked to be more or less sparse, the one whose L0 is nearest to the true one."""
    from saekit.toy.recovery import measure_recovery

    found = [
        (options, measure_recovery(swept.results[name].sae, toy, seed=seed + 1))
        for name, options in tried.items()
        if name in swept.results
    ]
    if not found:
        return {"problem": swept.diverged[next(iter(tried))]}
    options, best = min(found, key=lambda pair: abs(pair[1].l0 - pair[1].true_l0))
    return {"options": options, **best.as_dict()}


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

    whole = [row for row in result.rows if "problem" not in row]
    means, names = list(averaged(whole)), short_names(result.rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("L0 of data", "In pairs", "Per dim.", "Architecture", *MEASURES.values()):
        table.add_column(head, justify="left" if head == "Architecture" else "right")
    before = None
    for row in sorted(means, key=lambda row: [row["setting"][axis] for axis in AXES]):
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
    for lost in (row for row in result.rows if "problem" in row):
        console.print(printable(told_problem(lost)), markup=False, highlight=False, soft_wrap=True)
    if result.left_out:
        left_out = ", ".join(sorted(result.left_out))
        console.print(f"not for one site: {left_out}", markup=False, highlight=False, soft_wrap=True)
    for path in result.files:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
