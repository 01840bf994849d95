"""What the checks on two processes find, beside the faults that :mod:`support.faulty` lists."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.faulty import architectures, optimizers, sources

from saekit.testing import fake_plugin, plugin_report
from saekit.testing.checks import two_processes
from saekit.testing.checks.check import Fault, NotTried
from saekit.testing.checks.two_processes import DATA, FEATURES, on_two

pytestmark = pytest.mark.usefixtures("one_thread")
ONLY = ["two_processes"]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (architectures.Partial, r"the loss \(features split over 2 processes, one site, autograd\): off by"),
        (architectures.OfOwnRows, r"the loss \(batches split over 2 processes, one site, autograd\): off by"),
        (
            architectures.OfKernel,
            r"l1_loss of losses \(features split over 2 processes, one site, fast kernels\): off by",
        ),
        (architectures.Straying, r"\w+ after updates \(batches split over 2 processes, one site, autograd\): off by"),
        (
            architectures.Uneven,
            "ended with -6, .*distributed collective mismatch|waits for what the other does not tell",
        ),
    ],
)
def test_what_an_architecture_says_is_tried(build: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_processes, "_TIMEOUT", 5)
    report = plugin_report(fake_plugin("sae_architectures", build=build, config=architectures.Config), only=ONLY)
    (fault,) = report.faults
    assert re.search(says, str(fault.fault)), report


def test_one_that_says_nothing_is_refused_by_runs_and_not_tried() -> None:
    plugin = fake_plugin("sae_architectures", build=architectures.Silent, config=architectures.Config)
    report = plugin_report(plugin, only=ONLY)
    (outcome,) = report.not_tried
    assert "Silent overrides losses, and not spreads_over" in str(outcome.not_tried)
    build = type("Wordless", (architectures.Silent,), {"spreads_over": frozenset()})
    (outcome,) = plugin_report(
        fake_plugin("sae_architectures", build=build, config=architectures.Config), only=ONLY
    ).not_tried
    assert str(outcome.not_tried).startswith("it does not say spreads_over, and runs on several processes refuse it")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (sources.Dropping, r"it says shares_rows, and of \d+ rows \d+ are in no process, and 0 are there more often"),
        (sources.Numbered, "gave other rows in this process than in another"),
    ],
)
def test_what_a_source_gives_is_looked_at(build: Any, says: str) -> None:
    (fault,) = plugin_report(fake_plugin("activation_sources", build=build), only=ONLY).faults
    assert re.search(says, str(fault.fault)), fault


def test_a_source_that_knows_of_no_other_process_is_fine() -> None:
    report = plugin_report(fake_plugin("activation_sources", build=sources.Numbers), only=ONLY)
    assert not report.faults
    assert not report.not_tried


def test_updates_of_a_part_in_other_memory_are_found() -> None:
    (fault,) = plugin_report(fake_plugin("optimizers", build=optimizers.Replacing), only=ONLY).faults
    said = r"matrix after steps in process [01] of two, each of which updates its part in place: off by"
    assert re.search(said, str(fault.fault)), fault


def test_an_optimizer_that_says_nothing_may_look_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where features are split (``test_an_optimizer_must_work_number_by_number``)."""
    monkeypatch.setattr(optimizers.ByNorm, "elementwise", False)
    assert not plugin_report(fake_plugin("optimizers", build=optimizers.ByNorm), only=ONLY).faults


# ---- the processes themselves


def test_both_work_in_a_world_of_two(tmp_path: Path) -> None:
    before = dict(os.environ)
    found = on_two(dict.fromkeys((DATA, FEATURES), _place), tmp_path)
    assert found == {DATA: [(0, 2, 1), (1, 2, 1)], FEATURES: [(0, 1, 2), (1, 1, 2)]}
    assert dict(os.environ) == before


def _place(world: Any) -> tuple[int, ...]:
    return world.rank, world.data.size, world.features.size


def _dies(world: Any) -> None:
    if world.rank:
        os._exit(7)
    world.all.objects(None)


def _raises(world: Any) -> None:
    if world.rank:
        raise ValueError("of its own")
    world.all.objects(None)


def _refuses(world: Any) -> None:
    raise NotTried("there is nothing to try")


def _waits(world: Any) -> None:
    import time

    time.sleep(60)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (_dies, "process 1 of two ended with 7, and said 'nothing'"),
        (_raises, "in process 1 of two it raised ValueError: of its own"),
        (_waits, "process . of two has not ended after 1 s"),
        (lambda world: (yield), "cannot pickle 'generator' object"),
    ],
)
def test_what_ends_one_is_told(work: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_processes, "_PATIENCE", 1.0 if work is _waits else 60.0)
    with pytest.raises(Fault, match=says):
        on_two({DATA: work}, tmp_path)


def test_what_cannot_be_tried_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotTried, match="there is nothing to try"):
        on_two({DATA: _refuses}, tmp_path)
    monkeypatch.delattr(os, "fork")
    with pytest.raises(NotTried, match="processes cannot be forked here"):
        on_two({DATA: _raises}, tmp_path)
