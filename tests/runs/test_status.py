"""What a run says while no bar can: each thing that takes long is named, in a terminal, a notebook and a file."""

from __future__ import annotations

import io
import itertools
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from support.tiny import run_config

import saekit
from saekit.progress import ProgressDisplay
from saekit.status import Lines, Status

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lines_name_what_is_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = {"training": {"verbose": True}, "evals": {"every_n_steps": 5}, "reports": {"pictures": True}}
    saekit.train(run_config(tmp_path, **shown))
    said = capfd.readouterr().err.splitlines()
    named = [line.removesuffix(" ...") for line in said if line.endswith(" ...")]
    assert named == [
        "loading the model saekit/tiny-python", "reading the text", "making the first weights",
        "running the model on the first text", "measuring on held-out text", "saving", "measuring on held-out text",
        "drawing the pictures",
    ]  # fmt: skip
    head = said.index(
        "Training an SAE of 64 features (standard) on blocks.1.hook_resid_post of saekit/tiny-python (128 wide)"
    )
    facts = dict(re.fullmatch(r"  (\w+) +(.*)", line).groups() for line in said[head + 1 : head + 7])  # type: ignore[union-attr]
    assert facts["text"] == "2,000 tokens of saekit/python-stdlib, in contexts of 32"
    assert facts["steps"] == "8 of 256"
    assert facts["model"] == facts["SAE"] == "on cpu in float32"
    assert facts["folder"].startswith(str(tmp_path))


def test_what_takes_long_is_said_again() -> None:
    received = io.StringIO()
    with Status(console=Console(file=received, width=40)) as say:
        say("reading [bold]something[/] whose name is longer than the line is wide")
        time.sleep(3)
        say("writing")
    lines = received.getvalue().splitlines()
    assert lines[0] == "reading [bold]something[/] whose name is longer than the line is wide ..."
    assert re.fullmatch(r"  still reading \[bold\].* wide \(2 s\)", lines[1]), lines
    assert lines[2:] == ["writing ..."]


def test_a_step_that_takes_long_does_not_keep_the_last_line_back() -> None:
    received = io.StringIO()
    with ProgressDisplay(100, doing="training", console=Console(file=received), steady=True) as progress:
        progress.update(10, "loss 1")
        time.sleep(2.6)
        assert received.getvalue().startswith("10/100 tokens")
    assert received.getvalue().count("\n") == 1, "once"


def test_waiting_is_said_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    received = io.StringIO()
    lines = Lines(Console(file=received), (2, 5, 10, 30))
    for second in range(120):
        now[0] = float(second)
        lines.offer(f"{second}")
    assert received.getvalue().split() == ["2", "7", "17", "47", "77", "107"]


def test_lines_are_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    received = io.StringIO()
    lines = Lines(Console(file=received))
    for second in range(36_000):
        now[0] = float(second)
        lines.offer(f"{second}")
    shown = [int(line) for line in received.getvalue().splitlines()]
    assert 500 < len(shown) < 1000, "of ten hours"
    gaps = [after - before for before, after in itertools.pairwise(shown)]
    assert max(gaps[:20]) == 2
    assert gaps[-1] == 60
    assert gaps == sorted(gaps)


def test_a_terminal_has_one_line_that_goes_away() -> None:
    received = io.StringIO()
    with Status(console=Console(file=received, force_terminal=True, width=60, color_system=None)) as say:
        say("reading [bold]x[/]")
        time.sleep(0.3)  # it is painted some times a second
        say("writing")
    text = received.getvalue()
    assert "reading [bold]x[/] ..." in text
    assert "writing ..." in text
    assert text.endswith("\x1b[2K"), "erased"


def test_verbose_off_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Status(verbose=False) as say:
        say("reading")
        say.importing("module_that_is_not_there")
    assert capfd.readouterr() == ("", "")


def test_what_is_imported_already_is_not_said() -> None:
    received = io.StringIO()
    with Status(console=Console(file=received)) as say:
        say.importing("sys")
        say.importing("module_that_is_not_there")
    assert received.getvalue() == "importing module_that_is_not_there ...\n"


# ---- notebooks


class Notebook:
    """Stands for IPython: what each display shows, as it is saved with the notebook."""

    def __init__(self) -> None:
        self.cells: list[list[dict[str, str]]] = []

    def display(self, data: Any, *, raw: bool, display_id: bool = False, **_: Any) -> Any:
        assert raw
        shown = [data]
        self.cells.append(shown)

        class Handle:
            def update(self, data: dict[str, str], *, raw: bool) -> None:
                shown.append(data)

        return Handle() if display_id else None


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    made, module = Notebook(), ModuleType("IPython.display")
    module.display = made.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return made


def test_the_bar_of_a_notebook_stays_in_its_place(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with ProgressDisplay(1000, doing="training", console=Console(force_jupyter=True)) as progress:
        for done in range(10, 1010, 10):
            now[0] += 0.1
            progress.update(done, f"loss {1 / done:.3f} <b>")
    (cell,) = notebook.cells
    assert 15 <= len(cell) <= 25, "not at each of a hundred updates"
    assert cell[-1]["text/plain"].startswith("training  1,000/1,000 tokens")
    assert '<progress value="1.0000" max="1"' in cell[-1]["text/html"]
    assert "&lt;b&gt;" in cell[-1]["text/html"]


def test_the_status_of_a_notebook_leaves_nothing_behind(notebook: Notebook) -> None:
    with Status(console=Console(force_jupyter=True)) as say:
        say("reading")
        say("writing <b>")
    (cell,) = notebook.cells
    assert [shown["text/plain"] for shown in cell] == ["reading ...", "writing <b> ...", ""]
    assert "&lt;b&gt;" in cell[1]["text/html"]


def test_other_work_is_said_under_the_bar(notebook: Notebook) -> None:
    with ProgressDisplay(10, doing="training", console=Console(force_jupyter=True)) as progress:
        progress.doing("measuring on held-out text")
    assert notebook.cells[0][-1]["text/plain"] == "training  measuring on held-out text ..."
