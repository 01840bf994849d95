"""Plans in which something goes wrong: what is known is told, and what was opened is closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.sweeps import DOCUMENTS, changed, fake, manager

import saekit
from saekit.errors import DataError, DivergedError
from saekit.planning import planner, rehearsal
from saekit.planning.duration import TimedRun
from saekit.planning.kinds import Kinds
from saekit.planning.lanes import PlannedLane
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(given: Any, **options: Any) -> saekit.Plan:
    return saekit.plan(given, plugins=manager(), dataset=DOCUMENTS, **options)


def test_what_was_known_before_the_timing_failed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_few(kinds: Kinds) -> int:
        raise DataError("too few")

    monkeypatch.setattr(Kinds, "estimate", too_few)
    found = planned(fake(tmp_path))
    assert found.facts["duration"] == "not measured: too few"
    assert found.facts["SAE step"]
    assert found.facts["silent at start"].endswith("first 200 tokens")


def test_a_step_that_is_refused_leaves_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(timed: TimedRun, *given: Any) -> bool:
        timed.facts["SAE step"] = "known"
        raise saekit.ConfigError("no")

    monkeypatch.setattr(TimedRun, "_trials", refused)
    found = planned(fake(tmp_path))
    assert (found.problems, found.facts["SAE step"]) == (["no"], "known")


def test_sources_are_closed_when_a_later_one_fails_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, close = PlannedLane.opened, PlannedLane.close
    seen: list[str] = []

    def failing(lane: PlannedLane, plugins: saekit.PluginManager) -> Any:
        if "opened" in seen:
            raise RuntimeError("a plugin's own")
        seen.append("opened")
        return opened(lane, plugins)

    def closing(lane: PlannedLane) -> None:
        seen.append("closed")
        close(lane)

    monkeypatch.setattr(PlannedLane, "opened", failing)
    monkeypatch.setattr(PlannedLane, "close", closing)
    monkeypatch.setattr(planner._Planner, "count", lambda *given, **options: None)
    with pytest.raises(RuntimeError, match="a plugin's own"):
        planned([fake(tmp_path), changed(fake(tmp_path), {"training": {"seed": 1}})])
    assert seen == ["opened", "closed"]


def test_problems_of_one_sae_come_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["check_run_folder", "check_without_model", "check_spreads", "chosen_trackers", "sae_options"]

    def refusing(name: str) -> Any:
        def refuse(*given: Any) -> None:
            raise saekit.ConfigError([(name, "refused")])

        return refuse

    for name in names:
        monkeypatch.setattr(planner, name, refusing(name))
    found = planned(fake(tmp_path), load=False)
    assert [text.partition(":")[0] for text in found.problems][: len(names)] == names


@pytest.mark.parametrize("given", [None, 5, (one for one in ({}, {}))])
@pytest.mark.parametrize("call", [saekit.plan, saekit.train])
def test_what_is_no_configuration_is_said(call: Any, given: Any) -> None:
    with pytest.raises(saekit.ConfigError, match="a dict or the path of .* or a list of those, found") as refused:
        call(given)
    hint = "; put what it gives into a list" * (type(given).__name__ == "generator")
    assert str(refused.value).endswith(f"found {type(given).__name__}{hint}")


def test_one_that_diverges_leaves_the_others_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on = SAETrainer.train_on

    def diverging(trainer: SAETrainer, *given: Any) -> Any:
        if trainer.name not in {"fine", "sae"}:
            raise DivergedError("the loss is nan")
        return train_on(trainer, *given)

    monkeypatch.setattr(rehearsal, "_SECONDS", 0.05)
    monkeypatch.setattr(SAETrainer, "train_on", diverging)

    def of(*names: str) -> saekit.Plan:
        given = [
            changed(fake(tmp_path, sae={"d_sae": 12 + n}), {"checkpoints": {"name": name}, "training": {"seed": n}})
            for n, name in enumerate(names)
        ]
        return planned(given)

    found = of("wild", "fine")
    assert [text for text in found.warnings if text.startswith("wild: ")] == [
        "wild: the loss is nan; its steps are not timed"
    ]
    assert "of 1 of 2 SAEs; steps of 1 more, which were not timed" in found.facts["duration"]
    assert found.numbers["step_seconds"] > 0
    found = of("wild", "worse")
    assert found.facts["duration"] == "not measured: all SAEs that were tried diverge"
    assert [text for text in found.warnings if "nan" in text or "timed" in text] == [
        "the run could not be timed: all SAEs that were tried diverge",
        "wild: the loss is nan; its steps are not timed",
        "worse: the loss is nan; its steps are not timed",
    ]
