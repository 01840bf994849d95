"""How long a run takes, and what memory its process needs, as `saekit plan` puts it together."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from support.tiny import run_config

import saekit
from saekit.abilities import SourceForwards
from saekit.config.files import load_config
from saekit.data.activations import ActivationStream
from saekit.errors import ConfigError
from saekit.evals.forwards import logit_contexts
from saekit.kinds import ACTIVATION_SOURCES
from saekit.planning import duration as planned_duration
from saekit.planning import evals as planned_evals
from saekit.planning import other_ways
from saekit.planning import times as planned_times
from saekit.planning.memory import Memory, Need, Of
from saekit.planning.other_ways import Compared, compared
from saekit.planning.times import Served, Times, evals_of, ran_ahead, timed_writing
from saekit.runs.staging import Staging
from saekit.runs.working_memory import resident, resident_peak
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("short_rehearsals")


@pytest.mark.parametrize("refill", ["full", "needed"])
def test_forwards_are_as_many_as_a_source_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refill: str) -> None:
    config = run_config(tmp_path, training={"training_tokens": 4096}, evals={"run": []})
    config["activations"]["source"] |= {"prefetch": False, "refill": refill}
    made: list[int] = []
    run = ActivationStream.run

    def counted(stream: Any, contexts: Any) -> Any:
        found = run(stream, contexts)
        made.append(len(found))
        return found

    monkeypatch.setattr(ActivationStream, "run", counted)
    saekit.train(config)
    served = Served(capacity=4 * 8 * 32, forward=8 * 32, ahead=False, needed=refill == "needed")
    filling, added = ran_ahead(served, 256, 16, per_row=1.0, per_step=5.0)
    assert (filling, filling + added) == (1024, sum(made))
    assert served.forwards(256, 16) == len(made) == (16 if served.needed else 19)


@pytest.mark.parametrize(("batches", "made"), [(1, 2), (3, 6), (16, 32), (32, 64), (33, 66)])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_needed_is_what_training_takes(batches: int, made: int, ahead: bool) -> None:
    served = Served(capacity=32 * 2048, forward=2048, ahead=ahead, needed=True)
    assert served.forwards(4096, batches) == made
    rows = sum(ran_ahead(served, 4096, batches, per_row=1.0, per_step=3000.0))
    assert rows == pytest.approx(made * 2048, rel=0.02), "a thread's forwards are not counted whole"


def test_a_plan_says_how_forwards_are_spared(tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"training_tokens": 1024}, evals={"run": []})
    found = saekit.plan(config)
    assert found.numbers["forwards"] == 7, "four fill the buffer, and three fill it up before the last batch"
    assert "training takes those of 4" in found.facts["forwards"]
    assert "write activations.source.refill=needed" in found.facts["forwards"]
    config["activations"]["source"]["refill"] = "needed"
    spared = saekit.plan(config)
    assert (spared.numbers["forwards"], spared.facts["forwards"]) == (4, "4 of 256 activations")


def test_rehearsed_steps_take_turns_with_forwards_as_those_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    train_on = SAETrainer.train_on

    def looked(trainer: SAETrainer, *args: Any, **kwargs: Any) -> Any:
        held.append(trainer.turns)
        return train_on(trainer, *args, **kwargs)

    monkeypatch.setattr(SAETrainer, "train_on", looked)
    config = run_config(tmp_path, training={"training_tokens": 2048, "matmul_precision": "medium"}, evals={"run": []})
    saekit.plan(config)
    planned = set(map(type, held))
    held.clear()
    saekit.train(config)
    assert planned == set(map(type, held)) != {nullcontext}


def test_what_a_thread_makes_takes_from_the_steps_as_much() -> None:
    slow = {"per_row": 1.0, "per_step": 100.0}
    served = Served(capacity=1000, forward=100, ahead=True)
    assert ran_ahead(served, 100, 3, **slow) == (1000, 300), "a forward for each batch, and no refill yet"
    beside = Served(capacity=1000, forward=100, ahead=True, shared=0.0)
    assert ran_ahead(beside, 100, 3, **slow) == (1000, 0)
    assert ran_ahead(beside, 100, 7, **slow) == (1000, 0), "all is there when it is refilled"
    assert ran_ahead(beside, 100, 7, per_row=1.0, per_step=40.0) == (1000, 300), "what the thread has not made by then"
    half = Served(capacity=1000, forward=100, ahead=True, shared=0.5)
    assert ran_ahead(half, 100, 3, **slow) == (1000, 150), "what they share"
    _, some = ran_ahead(served, 100, 20_000, **slow)
    _, twice = ran_ahead(served, 100, 40_000, **slow)
    assert twice == pytest.approx(2 * some)


def test_a_run_is_its_parts() -> None:
    times = Times(opening=8, filling=5, weights=1, forwards=20, steps=30, step=3, evals=7, saving=2)
    assert (times.first, times.last, times.end) == (17, 64, 73)
    assert times.numbers()["seconds"] == 73
    more = attrs.evolve(times, cold=0.5, copies=0.25, evals_before=4.0, pictures=6.0)
    assert (more.first, more.last, more.end) == (17.5, 68.75, 79.75), "four of the seven seconds of evals come before"
    assert times.text("the model", messages=False) == (
        "about 73 s, the first step after 17 s: opening 8 s, the model 25 s, the SAE 30 s, evals 7 s, weights and "
        "saving 3 s"
    )


@pytest.mark.parametrize(("every", "times"), [(0, 1), (3, 3), (4, 2), (100, 1)])
def test_evals_are_counted_as_a_run_makes_them(tmp_path: Path, every: int, times: int) -> None:
    given = run_config(tmp_path, evals={"every_n_steps": every})
    given["sae"]["d_sae"] = 32
    assert evals_of(load_config(given)) == times, "of 8 steps"
    metrics = saekit.train(given).folder / "metrics.jsonl"
    assert metrics.read_text().count('ce_recovered"') == times


def test_writing_leaves_nothing(tmp_path: Path) -> None:
    assert timed_writing(str(tmp_path / "not" / "there"), 1e6) > 0
    assert not list(tmp_path.iterdir())


def test_the_peak_of_work_is_that_of_the_process() -> None:
    found, peak = resident_peak(lambda: float(np.ones(100_000_000 // 8).sum()))
    now = resident()
    assert found == 12_500_000
    if peak is not None and now is not None:  # Linux
        assert 80e6 < peak - now < 150e6


def test_loading_counts_where_it_needs_the_most() -> None:
    held, step = [Need(Of.MODEL, "cpu", 100)], [Need(Of.STEP, "cpu", 20)]
    copy = Need(Of.CHECKPOINT, "cpu", 50)
    memory = Memory(held, [[*step, copy]], [Need(Of.LOADING, "cpu", 160)])
    assert memory.needed() == {"cpu": 170}, "what is loaded is held later"
    assert memory.without(Of.CHECKPOINT).needed() == {"cpu": 160}
    assert memory.without(Of.CHECKPOINT).greatest("cpu") == Of.LOADING


def test_the_last_checkpoint_is_no_copy() -> None:
    state = {"weights": torch.ones(3), "list": [torch.zeros(2)]}
    kept, copied = Staging(changes=False).held(state), Staging().held(state)
    state["weights"].fill_(7)
    assert (kept["weights"][0], copied["weights"][0]) == (7, 1)


def test_evals_hold_fewer_logits_on_a_cpu() -> None:
    class Backend:
        d_vocab, device = 50257, "cpu"

    backend: Any = Backend()
    assert logit_contexts(backend, 128) == 5, "134 MB"
    assert logit_contexts(backend, 128, "cuda:0") == 20


# ---- other ways to run the model


def _live(buffered: int) -> SourceForwards:
    """What the source says whose forwards have 16 contexts."""
    prompts, forwards = "activations.source.store_batch_size_prompts", "activations.source.n_batches_in_buffer"
    return SourceForwards(contexts=16, buffered=buffered, contexts_option=prompts, buffered_option=forwards)


def test_what_noise_may_have_made_does_not_pay() -> None:
    assert Compared.of([3.0, 3.0, 3.3], [2.0, 2.0, 2.0]).pays
    assert not Compared.of([3.0, 1.9, 3.0], [2.0, 2.0, 2.0]).pays, "once it was slower"
    assert not Compared.of([2.04, 2.04], [2.0, 2.0]).pays, "too little"
    assert str(Compared.of([1.0, 1.0], [2.0, 4.0])) == "2.67 × slower here (0.25 to 0.50 × as fast in 2 rounds)"
    assert str(Compared.of([1.0, 1.02], [1.0, 1.0])) == "about as fast here (1.00 to 1.02 × in 2 rounds)"
    wild = Compared(1.96, 0.27, 21.27, 7)
    assert not wild.clear
    assert str(wild) == "not clear on this machine: 0.27 to 21 × as fast in 7 rounds"
    assert not Compared(1.1, 0.95, 1.2, 7).clear, "faster as a rule, and slower once"
    assert not Compared(0.9, 0.4, 2.0, 7).clear
    assert Compared(0.5, 0.3, 0.8, 7).clear, "slower each time, however much"
    assert str(Compared.of([3.0, 3.0], [2.0, 2.4])) == "1.38 × faster here (1.25 to 1.50 × in 2 rounds)"


def test_ways_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(other_ways.time, "perf_counter", lambda: clock[0])
    done: list[str] = []

    def work(name: str, seconds: float, amount: float) -> Any:
        def act() -> float:
            clock[0] += 100.0 if name not in done else seconds
            done.append(name)
            return amount

        return act

    found = compared("own", {"own": work("own", 2.0, 1.0), "twice": work("twice", 1.0, 2.0)}, seconds=1000.0)
    assert found == {"twice": Compared(4.0, 4.0, 4.0, 7)}
    assert done == ["own", "twice"] * 8
    done.clear()
    assert compared("own", {"own": work("own", 2.0, 1.0)}, seconds=1.0) == {}
    assert len(done) == 3, "no round after the time is over"


@pytest.mark.usefixtures("one_thread")
def test_ways_are_told_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, evals={"run": []})
    config["activations"]["source"]["n_batches_in_buffer"] = 16
    assert "model.compile" not in saekit.plan(config).facts
    monkeypatch.setattr(other_ways, "_ROUNDS", 2)
    asked: list[bool] = []

    def uncompiled(chosen: Any, plugins: Any, model: Any) -> Any:
        asked.append(chosen.model.compile)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(other_ways, "build_backend", uncompiled)
    found = saekit.plan(config, measure=True)
    assert found.problems == []
    assert asked == [True]
    assert found.facts["model.compile"] == "cannot be tried here: no compiler"
    told = found.facts["contexts in a forward"]
    assert told.startswith("8; ")
    for size in (4, 16, 32):  # as clear as the machine is quiet
        assert f" {size} would be " in told or f" {size} is not clear on this machine" in told


def test_advice_is_what_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = Compared(1.5, 1.4, 1.6, 7)
    monkeypatch.setattr(other_ways, "compared", lambda base, works: {32: faster, 8: Compared(0.9, 0.8, 1.0, 7)})
    monkeypatch.setattr(other_ways, "free_memory", lambda devices: {})
    config = load_config({"activations": {"source": {"name": "live", "n_batches_in_buffer": 32}}})

    class Backend:
        device = "cpu"

    backend: Any = Backend()
    tokens = torch.zeros(64, 4, dtype=torch.long)
    plugins = saekit.default_manager()
    text = other_ways._of_sizes(config, backend, tokens, _live(32), 1.0, 128)
    lines = "activations.source.store_batch_size_prompts=32", "activations.source.n_batches_in_buffer=16"
    assert f"write {lines[0]} and {lines[1]}, for a buffer of the same size" in text
    changed: Any = plugins.options(ACTIVATION_SOURCES, load_config(config, lines).activations.source)
    assert changed.store_batch_size_prompts * changed.n_batches_in_buffer == 16 * 32


def test_nothing_is_advised_by_what_is_not_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    wild = Compared(1.96, 0.27, 21.27, 7)
    monkeypatch.setattr(
        other_ways, "compared", lambda base, works: dict.fromkeys([n for n in works if n != base], wild)
    )
    monkeypatch.setattr(other_ways, "free_memory", lambda devices: {})
    forward = SimpleNamespace(run=lambda tokens, read: SimpleNamespace(held={"x": tokens}))
    backend: Any = SimpleNamespace(device="cpu", run=forward.run)
    monkeypatch.setattr(other_ways, "build_backend", lambda *given: backend)
    config, tokens = load_config({}), torch.zeros(32, 4, dtype=torch.long)
    sizes = other_ways._of_sizes(config, backend, tokens, _live(32), 1.0, 128)
    compiled = other_ways._of_compiling(config, saekit.default_manager(), backend, tokens)
    assert sizes.startswith("16; 8 is not clear on this machine: 0.27 to 21 × as fast in 7 rounds, 32 is not clear")
    assert compiled.startswith(
        "not clear on this machine: 0.27 to 21 × as fast in 7 rounds, after 0 s of compiling: the"
    )
    for text in (sizes, compiled):
        assert text.endswith(other_ways._UNCLEAR)
        assert "faster" not in text
        assert "leave it off" not in text


@pytest.mark.parametrize(("n", "sizes"), [(4, [8, 16, 32]), (6, [8, 16, 32]), (8, [8, 16, 32, 64]), (3, [8, 16])])
def test_only_what_a_run_takes_is_compared(n: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of the same size holds whole forwards, two of them at least."""
    tried: list[int] = []

    def compared(base: int, works: Any) -> dict[int, Compared]:
        tried.extend(works)
        return {}

    monkeypatch.setattr(other_ways, "compared", compared)
    monkeypatch.setattr(other_ways, "free_memory", lambda devices: {})
    config = load_config({"activations": {"source": {"name": "live", "n_batches_in_buffer": n}}})
    backend: Any = SimpleNamespace(device="cpu")
    other_ways._of_sizes(config, backend, torch.zeros(64, 4, dtype=torch.long), _live(n), 1.0, 128)
    assert tried == sizes


def test_where_nothing_is_compared_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="with --no-load .* there is no model to time: leave one of them out"):
        saekit.plan({}, load=False, measure=True)
    monkeypatch.setattr(other_ways, "_of_sizes", lambda *given: "16: the run's is as good as any")
    tokens, backend = torch.zeros(64, 4, dtype=torch.long), SimpleNamespace(device="cpu")
    given: Any = load_config({}), saekit.default_manager(), backend, tokens, 1.0
    unnamed = other_ways.told_of_ways(*given, SourceForwards(), rows=4, alone=False)
    assert unnamed["contexts in a forward"] == "not compared: the source does not let them be chosen"
    assert other_ways.told_of_ways(*given, _live(32), rows=4, alone=False) == {
        "contexts in a forward": "16: the run's is as good as any",
        "model.compile": "not compared: the model was passed, and a second copy cannot be loaded",
    }


@pytest.mark.parametrize(("minutes", "seconds", "copies"), [(1, 39, 0), (1, 41, 1), (1, 100, 2), (0, 100, 0)])
def test_a_copy_is_forgotten_where_the_end_is_clearly_first(minutes: float, seconds: float, copies: int) -> None:
    run: Any = SimpleNamespace(config=load_config({"checkpoints": {"every_minutes": minutes}}))
    assert planned_duration.TimedRun._copies(run, seconds) == copies
    run.config = load_config({"checkpoints": {"every_minutes": minutes, "n_checkpoints": 3}})
    assert planned_duration.TimedRun._copies(run, seconds) == copies + 3


@pytest.mark.parametrize(
    ("left", "asked", "found"),
    [(6.0, [4, 4, 12], (100 * 2 / 12, 4.0)), (1.0, [4], (100 * 5 / 4, 0.0))],
    ids=["warm", "no time"],
)
def test_an_eval_is_measured_again_before_it_is_scaled(
    left: float, asked: list[int], found: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first takes 5 s of what takes 1 s from then on."""
    now, seen = [0.0], []
    takes = iter([5.0, 1.0, 2.0])

    def called(asked: Any, *, backend: Any, contexts: Any) -> None:
        seen.append(len(contexts))
        now[0] += next(takes)

    monkeypatch.setattr(planned_times, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(planned_times, "all_called", called)
    monkeypatch.setattr(planned_times, "weight_metrics", lambda sae: None)
    trainer: Any = SimpleNamespace(raw_sae=lambda: None, sae=SimpleNamespace(parameters=list))
    backend: Any = None
    contexts = torch.zeros(100, 4)
    assert planned_times.timed_eval(load_config({}), trainer, backend, {}, contexts, left) == found
    assert seen == asked


@pytest.mark.parametrize("full", [False, True])
def test_other_ways_are_tried_after_all_of_the_run(full: bool) -> None:
    """What they leave in memory is none of the run's; where that did not suffice, they are not."""
    done: list[str] = []
    run: Any = SimpleNamespace(
        options=SimpleNamespace(d_in=None), ports=SimpleNamespace(d_in=3), measure=False, _full=full,
        _others=lambda: done.append("others"),
        _parts=lambda *given, **how: done.append("parts"),
    )  # fmt: skip
    planned_duration.TimedRun.time(run, None, None, {}, True)
    assert done == ["parts"] + ["others"] * (not full)


def test_evals_that_fail_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> tuple[float, float]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(planned_evals, "timed_eval", failing)
    found = saekit.plan(run_config(tmp_path, checkpoints={"folder": str(tmp_path), "every_minutes": 1000}))
    assert "evals could not be timed: no such thing" in found.warnings
    assert "eval_seconds" not in found.numbers
    assert found.facts["duration"].endswith("; evals not counted")
    assert found.problems == []


def test_a_verdict_counts_what_is_no_tensor() -> None:
    memory = Memory([Need(Of.MODEL, "cpu", 100)], [], [Need(Of.LOADING, "cpu", 160)])
    assert memory.beside(50, 0).needed() == {"cpu": 210}
    assert memory.beside(50, 80).needed() == {"cpu": 230}, "they start when the model is there"
    assert memory.needed() == {"cpu": 160}


def test_evals_are_part_of_the_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_evals, "timed_eval", lambda *given: (1000.0, 50.0))
    found = saekit.plan(run_config(tmp_path, evals={"every_n_steps": 4}))
    numbers = found.numbers
    assert numbers["eval_seconds"] == 2050
    assert numbers["last_step_seconds"] > 1050, "one of them comes before the last step, and it is the slow one"
    assert 1000 < numbers["seconds"] - numbers["last_step_seconds"] < 1900
    assert "evals 34 min" in found.facts["duration"]
