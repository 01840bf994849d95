"""Pictures of a run in its own folder: there whole or not at all, and never a reason to lose a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs

from saekit.cautions import warn
from saekit.errors import SaekitError
from saekit.files.storage import write_bytes
from saekit.reasons import error_text
from saekit.reports.folder import RunFolder, SAERun, read_run
from saekit.reports.sweep import summary_of

__all__ = ["CURVES", "SUMMARY", "Pictures", "draw_pictures", "pictures_after"]

CURVES = ("curves.png", "curves.html")
"""What is drawn of each SAE, in its folder."""
SUMMARY = ("summary.png", "summary.html")
"""What is drawn of a sweep, in its folder."""


@attrs.frozen
class Pictures:
    """The files that were drawn."""

    of_saes: Mapping[str, tuple[Path, ...]]
    """By the name of the SAE."""
    of_sweep: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()
    """Why others were not, in words."""

    @property
    def all(self) -> tuple[Path, ...]:
        """Those of the sweep first."""
        return (*self.of_sweep, *(path for paths in self.of_saes.values() for path in paths))


def draw_pictures(run: str | Path | RunFolder) -> Pictures:
    """Draw ``curves.png`` and ``curves.html`` of every SAE of a run, and of a sweep ``summary.png`` and
    ``summary.html``, into its folder, from its metrics as they are now.

    What cannot be drawn or written is told in :attr:`Pictures.problems`, and leaves the one that was there; what has
    nothing to show is left out.  :class:`saekit.errors.PlaceError` where there is no run.
    """
    run = run if isinstance(run, RunFolder) else read_run(run)
    problems: list[str] = []
    of_saes = {}
    for name, sae in run.saes.items():
        makers = dict(zip(CURVES, (_curves_png(sae, run), _curves_html(sae, run)), strict=True))
        of_saes[name] = tuple(_made(sae.home, makers, problems))
    of_sweep: tuple[Path, ...] = ()
    if run.sweep:  # after those of its SAEs, which its page leads to
        makers = dict(zip(SUMMARY, (_summary_png(run), _summary_html(run)), strict=True))
        of_sweep = tuple(_made(run.folder, makers, problems))
    return Pictures(of_saes, of_sweep, tuple(dict.fromkeys(problems)))


def pictures_after(folder: Path) -> Pictures:
    """:func:`draw_pictures` of a run that has ended; whatever goes wrong is a warning."""
    try:
        drawn = draw_pictures(folder)
    except Exception as error:
        drawn = Pictures({}, (), (error_text(error),))
    for problem in drawn.problems:
        warn(
            f"a picture of the run was not drawn: {problem}. Nothing else is missing; `saekit show --draw` tries "
            "again, and reports.pictures=false leaves them out",
            RuntimeWarning,
        )
    return drawn


_Maker = Callable[[], bytes | None]


def _made(folder: Path, makers: Mapping[str, _Maker], problems: list[str]) -> Iterator[Path]:
    """Write what each maker makes; what fails goes to ``problems``."""
    for name, make in makers.items():
        try:
            data = make()
            if data is not None:
                write_bytes(folder / name, data)
                yield folder / name
        except Exception as error:  # of matplotlib, of the disk, of numbers that nobody has thought of
            problems.append(str(error) if isinstance(error, SaekitError) else f"{name}: {error_text(error)}")


def _curves_png(sae: SAERun, run: RunFolder) -> _Maker:
    def make() -> bytes | None:
        from saekit.reports.curves import curves_figure
        from saekit.reports.figures import as_png, styled

        with styled():
            figure = curves_figure(sae, run.state)
            return None if figure is None else as_png(figure)

    return make


def _curves_html(sae: SAERun, run: RunFolder) -> _Maker:
    def make() -> bytes | None:
        from saekit.reports.page import curves_page

        page = curves_page(sae, run.state)
        return None if page is None else page.encode()

    return make


def _summary_png(run: RunFolder) -> _Maker:
    def make() -> bytes | None:
        from saekit.reports.figures import as_png, styled
        from saekit.reports.frontier_figure import frontier_figure

        summary = summary_of(run)
        with styled():
            figure = frontier_figure(summary.rows, summary.options, run.folder.resolve().name)
            return None if figure is None else as_png(figure)

    return make


def _summary_html(run: RunFolder) -> _Maker:
    def make() -> bytes | None:
        from saekit.reports.page import sweep_page

        page = sweep_page(run)
        return None if page is None else page.encode()

    return make
