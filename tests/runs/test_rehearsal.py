"""A few batches by a run's own loop: what is timed, and what is made of it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.no_time import SITE, Clock, Forwards, Trainer

import saekit
from saekit.abilities import SourceForwards
from saekit.config.files import load_config
from saekit.data import ContextStream, StreamContext, TokenPolicy
from saekit.distributed.world import ALONE
from saekit.errors import DataError, DivergedError, ModelError
from saekit.planning import duration as planned_duration
from saekit.planning import rehearsal
from saekit.planning import times as planned_times
from saekit.planning.rehearsal import Deadline, FirstRows, ForwardStage, rehearsed
from saekit.planning.stepped import Rehearsed, part_added
from saekit.planning.times import Times
from saekit.process_age import process_age
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice
from saekit.training.firing import FiringStatistics
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, Histogram


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rehearsal, "time", made)
    return made


def turns(clock: Clock, trainer: Any, rows: Any, *, forward: int = 4, **given: Any) -> Rehearsed:
    first = FirstRows(3.0, next(rows))
    given = {"ahead": False, "alone": 1.0, "look": lambda metrics: None} | given
    return rehearsed(rows, trainer, first, forward=forward, **given)


def test_the_first_of_each_is_cold(clock: Clock) -> None:
    seen: list[Any] = []
    trainer: Any = Trainer(clock, dead_after=2, steps=100)
    found = turns(clock, trainer, Forwards(clock), look=seen.append)
    assert (found.per_row, found.step) == (0.5, 5), "of each row, and of a step between two forwards for each"
    assert found.cold == (3.0 - 0.5) * 4 + 3
    assert found.held == (8 + 4) * (3 * 4 + 3 * 8)
    assert seen == [{"metrics/l0": 5.0, "details/distinct_documents": 1}], "as the loop hands them on"
    assert trainer.sizes == [8, 8], "no more, since the time was over"
    assert (found.forwards, found.steps) == (5, 2), "of a third batch one, and then all of the time was over"


def test_steps_with_dead_features_are_timed_apart(clock: Clock) -> None:
    class Teaching(Trainer):
        def train_on(self, *given: Any) -> dict[str, Any]:
            self.clock.now += 10 * float((self.firing.since_fired > 2).sum())
            self.firing.since_fired[1] += 1  # the others have fired
            return super().train_on(*given)

    trainer: Any = Teaching(clock, steps=100, dead_after=2)
    found = turns(clock, trainer, Forwards(clock), deadline=Deadline(100))
    assert (found.step, found.late) == (5, 15)
    assert found.mean_step(10, 2) == (2 * 5 + 8 * 15) / 10
    short: Any = Teaching(clock, steps=2, dead_after=2)
    assert turns(clock, short, Forwards(clock)).late == 5, "nothing dies in it"


def test_a_run_that_is_short_is_tried_as_far_as_it_goes(clock: Clock) -> None:
    trainer: Any = Trainer(clock, dead_after=2, steps=1)
    found = turns(clock, trainer, Forwards(clock), ahead=True, alone=0.25)
    assert (found.step, found.cold, found.shared) == (8, 10, 0.25), "of one step, nothing can be said to be cold"


def test_text_that_ends_makes_one_batch(clock: Clock) -> None:
    trainer: Any = Trainer(clock, dead_after=2, steps=5)
    found = turns(clock, trainer, Forwards(clock, left=1))
    assert trainer.sizes == [8], "the rows that there are, twice"
    assert (found.per_row, found.step) == (3.0, 8), "those of the first forward"


def test_time_that_is_over_ends_all_of_it(clock: Clock) -> None:
    """Forwards of 2 s, of which a batch takes 16: the rows at hand are trained on again, and nothing else is begun."""
    trainer: Any = Trainer(clock, dead_after=2, steps=100, seconds=1.0, batch=64)
    found = turns(clock, trainer, Forwards(clock), ahead=True, alone=0.25)
    assert trainer.sizes == [64], "its first step took 4 s, and another would take as long for all that is known"
    assert clock.now <= 20 + 2 + 4 + 2
    assert (found.per_row, found.step, found.forwards, found.steps, found.shared) == (0.5, 4, 11, 1, 0.25)


def test_a_short_step_is_made_twice_all_the_same(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_SPARE", 5.0)
    trainer: Any = Trainer(clock, dead_after=2, steps=100, seconds=1.0, batch=64)
    found = turns(clock, trainer, Forwards(clock))
    assert trainer.sizes == [64, 64]
    assert (found.step, found.forwards) == (1, 11), "and no forward for it"


def test_what_would_not_end_in_time_is_not_begun(clock: Clock) -> None:
    trainer: Any = Trainer(clock, dead_after=2, steps=100, seconds=3.0)
    trainer.firing.since_fired += 5
    assert turns(clock, trainer, Forwards(clock), deadline=Deadline(29)).steps == 2, "two batches would take 14 s"
    assert turns(clock, trainer, Forwards(clock), deadline=Deadline(60)).steps > 4


def stream_of(*, counting: bool = True) -> StreamContext:
    def contexts() -> ContextStream:
        documents = [[1 + n % 100] * 20 for n in range(30)]
        return ContextStream(documents, list, TokenPolicy(context_size=8), d_vocab=128, repeat=True)

    choice = TokenChoice() if counting else TokenChoice(exclude=frozenset(range(128)))
    return StreamContext(
        backend=FakeBackend(), sites=[SITE], batch_size=24, seed=3, open_contexts=contexts, choice=choice
    )


def test_forwards_are_rows_as_the_source_keeps_them() -> None:
    made = next(ForwardStage(stream_of(), SourceForwards(contexts=2, dtype="bfloat16"), Deadline()))
    assert made.activations[SITE].dtype == torch.bfloat16


def test_text_of_which_nothing_counts_is_read_until_the_time_is_over(clock: Clock) -> None:
    stream, forwards = stream_of(counting=False), []

    def run(tokens: Any, **given: Any) -> Any:
        clock.now += 2.0
        forwards.append(len(tokens))
        return FakeBackend.run(stream.backend, tokens, **given)

    stream.backend.run = run  # type: ignore[method-assign]
    with pytest.raises(DataError, match="no token of 40 contexts one after the other counts"):
        next(ForwardStage(stream, SourceForwards(contexts=4), Deadline()))
    assert forwards == [4] * 10


def test_text_that_was_read_is_read_afresh_unless_the_source_states_forwards() -> None:
    stream = stream_of()
    begun = stream.contexts.take(10)
    run: Any = SimpleNamespace(stream=stream, counted=SimpleNamespace(source=SourceForwards(contexts=2)))
    silent: Any = SimpleNamespace()
    stating: Any = SimpleNamespace(source_forwards=SourceForwards())

    def first(source: Any) -> list[int]:
        _, made = planned_duration.TimedRun._first_rows(run, source, Deadline(), runs_model=True)
        return made.given().tokens.tolist()  # type: ignore[union-attr]

    assert first(silent) == first(silent) == begun.tokens[:2].flatten().tolist()
    assert first(stating) == first_of(stream_of(), 10), "where the source goes on"


def first_of(stream: StreamContext, skipped: int) -> list[int]:
    stream.contexts.take(skipped)
    return stream.contexts.take(2).tokens.flatten().tolist()


@pytest.mark.parametrize(
    ("error", "why", "full"),
    [
        (ModelError("no such thing"), "no such thing", False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "ran out of memory", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "ran out of memory", True),
        (KeyError("a"), "KeyError: 'a'", False),
    ],
)
def test_what_cannot_be_timed_is_a_warning(error: Exception, why: str, full: bool) -> None:
    run: Any = SimpleNamespace(facts={}, warnings=[])
    run._untimed = lambda why: planned_duration.TimedRun._untimed(run, why)

    def failing() -> None:
        raise error

    assert planned_duration.TimedRun._tried(run, failing) is None
    assert run.facts == {"duration": f"not measured: {why}"}
    assert run.warnings == [f"the run could not be timed: {why}"]
    assert run._full == full
    if isinstance(error, ModelError):
        with pytest.raises(ModelError):
            planned_duration.TimedRun._tried(run, failing, refuses=True)


@pytest.mark.parametrize("there", [True, False])
def test_dead_features_are_seen_on_other_devices(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a look waits, a trainer knows by its steps that none are dead, and a rehearsal says that some are."""
    monkeypatch.setattr("saekit.training.trainer.at_hand", lambda device: there)
    found = FiringStatistics(4, dead_after=3, window=10, device="cpu")
    assert [found.may_have_dead(step) for step in (0, 3, 4)] == [False, False, True]
    seen: list[Any] = []
    trainer: Any = SimpleNamespace(
        firing=found, step=2, training=SimpleNamespace(dead_after=3, steps=100, compile=False), generator=None,
        backend=None, _rounding=lambda device: contextlib.nullcontext(), finished=False,
        sae=SimpleNamespace(training_step=lambda x, step: seen.append(step.dead)),
    )  # fmt: skip
    SAETrainer._gradients(trainer, torch.ones(2, 3), None, None)
    found.since_fired.copy_(torch.tensor([0, 1, 2, 2]))
    assert rehearsal._let_die(trainer)
    SAETrainer._gradients(trainer, torch.ones(2, 3), None, None)
    assert seen[0] is None or not seen[0].any()
    assert (seen[0] is None) == (not there)
    assert seen[1].tolist() == [False, False, True, True], "those that fired in no step, not in the last alone"


def test_what_is_read_are_batches(clock: Clock) -> None:
    trainer: Any = Trainer(clock, dead_after=2, steps=5, batch=4)
    found = turns(clock, trainer, Forwards(clock), forward=0)
    assert (found.per_row, found.held) == (0.5, 0)
    assert trainer.sizes == [4, 4]


def test_a_step_that_diverges_says_so(clock: Clock) -> None:
    trainer: Any = Trainer(clock, dead_after=2, steps=5)

    def diverging(*given: Any) -> Any:
        raise DivergedError("the loss is nan")

    trainer.train_on = diverging
    with pytest.raises(DivergedError, match="the loss is nan"):
        turns(clock, trainer, Forwards(clock))


def test_how_much_is_added_is_measured_with_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and steps that only wait share nothing."""
    monkeypatch.setattr(rehearsal, "_MOST", 2)

    class Waiting(Forwards):
        def __next__(self) -> Batch:
            time.sleep(0.03)
            return super().__next__()

    class Resting(Trainer):
        def train_on(self, *given: Any) -> dict[str, Any]:
            time.sleep(0.06)
            return super().train_on(*given)

    trainer: Any = Resting(Clock(), steps=100)
    found = turns(Clock(), trainer, Waiting(Clock()), ahead=True)
    assert trainer.step == 4, "two of each kind"
    assert found.step > 0.06
    assert found.shared < 0.5


@pytest.mark.parametrize(
    ("together", "step", "forwards", "part"),
    [
        (9, 5, 4, 1),
        (5, 5, 4, 0),
        (7, 5, 4, 0.5),
        (4, 5, 4, 0),
        (90, 5, 4, 1.5),
        (8, 4, 8, 0),
        (12, 4, 8, 1),
        (1, 0, 1, 1),
    ],
)
def test_what_forwards_beside_a_step_add(together: float, step: float, forwards: float, part: float) -> None:
    assert part_added(together, step, forwards) == part


def test_pictures_are_drawn_of_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_times.tempfile, "tempdir", str(tmp_path))
    drawn: list[Any] = []

    def draw(folder: Path) -> None:
        drawn.append(planned_times.read_run(folder).saes["sae"])
        assert drawn[0].tokens > 0
        assert "losses/overall_loss" in drawn[0].history.series

    monkeypatch.setattr(planned_times, "pictures_after", draw)
    config = load_config({"training": {"training_tokens": 4096 * 50, "train_batch_size_tokens": 4096}})
    seconds = planned_times.timed_pictures(config, saekit.default_manager(), {"losses/overall_loss": 2.0})
    assert seconds > 0
    assert len(drawn) == 1
    assert (
        len(drawn[0].history.series["losses/overall_loss"])
        == config.training.steps // config.training.log_frequency + 1
    )
    assert not list(tmp_path.iterdir())


def test_what_was_logged_is_read_as_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(planned_times, "pictures_after", lambda folder: lines.append(drawn(folder)))

    def drawn(folder: Path) -> Any:
        return json.loads(planned_times.read_run(folder).saes["sae"].metrics.read_text().splitlines()[0])

    config = load_config({})
    given = {"losses/overall_loss": float("nan"), "metrics/of": Histogram((1, 2), (0.0, 1.0, float("inf")))}
    planned_times.timed_pictures(config, saekit.default_manager(), given)
    assert lines[0]["losses/overall_loss"] is None
    assert lines[0]["metrics/of"] == {"counts": [1, 2], "edges": [0.0, 1.0, None]}


def test_pictures_that_cannot_be_drawn_are_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planned_times.tempfile, "tempdir", str(tmp_path / "gone"))
    run: Any = SimpleNamespace(
        config=load_config({}), plugins=saekit.default_manager(), logged={}, world=ALONE, warnings=[]
    )
    assert planned_duration.TimedRun._pictures(run) is None
    assert run.warnings[0].startswith("pictures could not be timed: ")
    times = Times(opening=8, filling=5, forwards=20, steps=30, step=3, evals=7, saving=2, pictures=None)
    assert times.text("the model", messages=False, on="timed on 1 step").endswith(
        "timed on 1 step; pictures not counted"
    )
    assert "picture_seconds" not in times.numbers()


def test_a_process_is_as_old_as_it_is() -> None:
    age = process_age()
    assert age > 0.05
    if sys.platform == "linux":
        assert age >= 0.9 * time.process_time() / 64, "of no more threads than so many"
        time.sleep(0.03)
        assert process_age() - age > 0.02
