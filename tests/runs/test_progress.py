"""What a person sees while SAEs train: a bar in a terminal, lines elsewhere, nothing when verbose is off."""

from __future__ import annotations

import io
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.tiny import run_config

import saekit
import saekit.progress
from saekit.progress import ProgressDisplay, _rate_text
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

DOCUMENTS = [{"text": f"value_{n} = {n}\n" * 30} for n in range(60)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """Makes whatever is shown go to a terminal so many columns wide; what it received is returned."""

    def make(width: int) -> io.StringIO:
        received = io.StringIO()

        def console(*, stderr: bool, quiet: bool) -> Console:
            assert stderr, "standard output is for results"
            return Console(file=received, quiet=quiet, force_terminal=True, width=width, color_system=None)

        monkeypatch.setattr(saekit.progress, "Console", console)
        return received

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that goes on only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(saekit.progress.time, "monotonic", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


def screens(received: io.StringIO) -> list[str]:
    """What stood in the terminal, one state after the other."""
    states = re.split(r"\r(?:\x1b\[2K(?:\x1b\[1A\x1b\[2K)*)?", received.getvalue())
    return [re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", state).rstrip("\n") for state in states]


def plugins() -> saekit.PluginManager:
    return isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: FakeBackend()), builtins=True
    )


def config(folder: Path, **training: Any) -> dict[str, Any]:
    return run_config(
        folder,
        model={"backend": "test:fake"},
        dataset={"context_size": 16},
        site={"hook_name": "blocks.0.hook_resid_post"},
        sae={"d_sae": 16},
        evals={"split": None, "held_out_every": 10, "n_contexts": 2},
        training={"training_tokens": 2000, "train_batch_size_tokens": 200, "verbose": True} | training,
    )


def train(configs: Any) -> Any:
    return saekit.train(configs, plugins=plugins(), dataset=DOCUMENTS)


@pytest.mark.parametrize("width", [80, 200])
def test_the_bar_of_one_sae(tmp_path: Path, terminal: Callable[[int], io.StringIO], width: int) -> None:
    received = terminal(width)
    result = train(config(tmp_path))
    bar, numbers = screens(received)[-1].splitlines()
    assert max(map(len, (bar, numbers))) <= width
    found = re.fullmatch(r"training ━+ 100%  ([\d,]+) tokens/s 0:00:0\d 0:00:00 left", bar)
    assert found is not None, bar
    assert int(found.group(1).replace(",", "")) > 0
    metrics = result.metrics
    assert numbers == (
        f"  loss {metrics['losses/overall_loss']:.4g}  EV {metrics['metrics/explained_variance']:.4g}  "
        f"L0 {metrics['metrics/l0']:.4g}  dead {metrics['sparsity/dead_features']:.4g}"
    )


def test_the_bar_of_many_saes_shows_the_least_and_the_largest(
    tmp_path: Path, terminal: Callable[[int], io.StringIO]
) -> None:
    received = terminal(80)
    result = train(saekit.grid(config(tmp_path), {"sae.d_sae": [16, 48, 32]}, plugins=plugins()))
    bar, numbers = screens(received)[-1].splitlines()
    assert bar.startswith("training 3 SAEs ━")
    assert "100%" in bar
    assert bar.endswith("left")
    for name, key in (("loss", "losses/overall_loss"), ("L0", "metrics/l0"), ("EV", "metrics/explained_variance")):
        values = [found.metrics[key] for found in result.results.values()]
        assert f"{name} {min(values):.4g} to {max(values):.4g}" in numbers
    assert "dead 0" in numbers
    assert max(map(len, (bar, numbers))) <= 80


def test_the_bar_goes_on_as_tokens_do(tmp_path: Path, terminal: Callable[[int], io.StringIO]) -> None:
    received = terminal(120)
    with ProgressDisplay(1000, doing="training") as progress:
        for done in range(100, 1000, 100):
            progress.update(done, f"loss {done}")
            assert progress._bar is not None
            progress._bar.refresh()
    shown = [re.search(r"(\d+)%", screen) for screen in screens(received)]
    percentages = [int(found.group(1)) for found in shown if found is not None]
    assert [n for n in dict.fromkeys(percentages) if n] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert "loss 900" in screens(received)[-1]


def test_time_left_and_rate_count_what_was_done_since_a_resume(
    terminal: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    received = terminal(100)
    with ProgressDisplay(10_000, doing="training") as progress:
        for done in (6_100, 6_200, 6_300, 6_400):
            now[0] += 10
            progress.update(done, before=6_000)
    last = screens(received)[-1]
    assert "64%  10 tokens/s" in last
    assert "0:00:40 0:06:00 left" in last, "3,600 tokens at 10 a second"


def test_a_resumed_run_says_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presses = [True]

    def build(evals: object, *, run: object) -> Any:
        def press(sae: Any, **services: Any) -> dict[str, float]:
            if presses.pop() if presses else False:
                os.kill(os.getpid(), signal.SIGINT)
            return {}

        return press

    manager = isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: FakeBackend()),
        fake_plugin("evals", "key", build=build),
        builtins=True,
    )
    run = config(tmp_path) | {"checkpoints": {"folder": str(tmp_path), "name": "x"}}
    run["evals"] |= {"run": ["key"], "every_n_steps": 6}
    with pytest.raises(saekit.errors.TrainingInterrupted):
        saekit.train(run, plugins=manager, dataset=DOCUMENTS)
    seen = []
    update = ProgressDisplay.update

    def watch(self: ProgressDisplay, done: int, text: str = "", *, before: int = 0) -> None:
        seen.append((done, before))
        update(self, done, text, before=before)

    monkeypatch.setattr(ProgressDisplay, "update", watch)
    saekit.resume(tmp_path / "x", plugins=manager, dataset=DOCUMENTS)
    assert seen == [(done, 1200) for done in (1400, 1600, 1800, 2000)]


def test_plain_lines_when_not_a_terminal(clock: Callable[[float], None]) -> None:
    received = io.StringIO()
    with ProgressDisplay(1000, doing="training", console=Console(file=received, width=60)) as progress:
        for done, seconds in ((100, 1), (200, 3), (400, 4), (500, 1), (1000, 2), (1000, 0)):
            clock(seconds)
            progress.update(done, f"loss {1 / done:g}  " + "x" * 50)
    many = "x" * 50
    assert received.getvalue().splitlines() == [
        f"200/1,000 tokens  50 tokens/s  loss 0.005  {many}  16 s left",
        f"400/1,000 tokens  50 tokens/s  loss 0.0025  {many}  12 s left",
        f"1,000/1,000 tokens  91 tokens/s  loss 0.001  {many}  0 s left",
    ], "one each two seconds, and the last, once, none broken in two"
    assert "\x1b" not in received.getvalue()


def test_plain_lines_where_nobody_knows_the_total(clock: Callable[[float], None]) -> None:
    received = io.StringIO()
    with ProgressDisplay(None, doing="packing", unit="contexts", console=Console(file=received)) as progress:
        clock(10)
        progress.update(1000, "text", before=500)
    assert received.getvalue() == "1,000 contexts  50 contexts/s  text\n"


def test_plain_lines_of_a_run_that_ends_early(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, training_tokens=10**6)
    run["dataset"] |= {"on_exhausted": "stop"}
    result = train(run)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    (way,) = (line for line in lines if line.startswith("  step "))
    assert "fast kernels, " in way
    assert any(line.startswith("model loss: ") for line in lines), "the fake model is untrained"
    (line,) = (line for line in lines if "tokens/s" in line)
    assert line.startswith(f"{result.metrics['details/n_training_tokens']:,}/1,000,000 tokens  ")
    for name in ("tokens/s", "loss ", "EV ", "L0 ", "dead ", " s left"):
        assert name in line


def test_one_last_line_for_many_saes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(saekit.grid(config(tmp_path), {"training.seed": [1, 2, 3]}, plugins=plugins()))
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("Training 3 SAEs on blocks.0.hook_resid_post of fake (8 wide)")]
    assert "  seed    1, 2, 3" in lines
    (line,) = (line for line in lines if "tokens/s" in line)
    assert line.startswith("2,000/2,000 tokens  ")
    assert re.search(r"loss [\d.]+ to [\d.]+  ", line)


def test_one_that_diverged_needs_no_more_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = config(tmp_path)
    base["sae"] |= {"normalize_sae_decoder": False}
    longer = base | {"training": base["training"] | {"lr": 1e30, "training_tokens": 50_000}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = train([base, longer])
    assert len(result.diverged) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "tokens/s" in line)
    assert line.startswith("2,000/2,000 tokens  ")
    assert "1 diverged" in line
    assert " to " not in line, "its numbers are left out"


@pytest.mark.parametrize("in_terminal", [False, True])
def test_verbose_off_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], terminal: Callable[[int], io.StringIO], in_terminal: bool
) -> None:
    received = terminal(80) if in_terminal else io.StringIO()
    quiet = config(tmp_path, verbose=False)
    train(quiet)
    train(saekit.grid(quiet, {"training.seed": [1, 2]}, plugins=plugins()))
    assert capfd.readouterr() == ("", "")
    assert received.getvalue() == ""
    train([quiet, config(tmp_path, verbose=True)])
    shown = received.getvalue() or capfd.readouterr().err
    assert "tokens/s" in shown, "one that is verbose is enough"


@pytest.mark.parametrize(
    ("rate", "told"),
    [(1234.5, "1,234 features/s"), (9.96, "10 features/s"), (2.34, "2.3 features/s"), (0.41, "0.4 features/s"),
     (0.05, "20 s each"), (0, "")],
)  # fmt: skip
def test_what_goes_slowly_is_told_so(rate: float, told: str) -> None:
    assert _rate_text(rate, "features") == told


def test_before_anything_is_done_no_time_is_left() -> None:
    received = io.StringIO()
    with ProgressDisplay(50, doing="explaining", unit="features", console=Console(file=received)) as progress:
        progress.update(0)
    assert received.getvalue() == "0/50 features\n"
