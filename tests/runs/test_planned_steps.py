"""The steps of several SAEs, and their batches, as a plan tries them and adds them up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.no_time import Clock, Forwards, Trainer

import saekit
from saekit.abilities import SourceForwards
from saekit.config.files import load_config
from saekit.data import StreamContext
from saekit.data.shared import MOST_KEPT
from saekit.distributed.world import ALONE
from saekit.errors import DataError, DivergedError
from saekit.kinds import SAE_ARCHITECTURES
from saekit.planning import evals as planned_evals
from saekit.planning import rehearsal
from saekit.planning.batches import Batches
from saekit.planning.evals import EvalTimes, Measurings, measurings
from saekit.planning.findings import Findings, of_all, of_some
from saekit.planning.kinds import Kinds
from saekit.planning.lanes import LaneSizes, PlannedLane
from saekit.planning.members import PlannedMember, here_of
from saekit.planning.mesh import planned_world
from saekit.planning.rehearsal import Deadline, FirstRows, rehearsed
from saekit.planning.stepped import Rehearsed, Stepped
from saekit.tokens import TokenChoice
from saekit.values import Ports

PLUGINS = saekit.default_manager()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rehearsal, "time", made)
    return made


def tried(clock: Clock, first: Any, *others: Any, looks: list[Any] | None = None, **given: Any) -> Rehearsed:
    rows: Any = Forwards(clock)
    seen = [] if looks is None else looks
    beside = [(one, lambda metrics, name=one.name: seen.append((name, metrics))) for one in others]
    given = {
        "forward": 4,
        "ahead": False,
        "alone": 1.0,
        "look": lambda metrics: seen.append(("first", metrics)),
    } | given
    return rehearsed(rows, first, FirstRows(3.0, next(rows)), beside=beside, **given)


def test_each_steps_in_turn_on_the_same_batches(clock: Clock) -> None:
    one, two, three = (Trainer(clock, seconds, name=name) for name, seconds in (("a", 1), ("b", 2), ("c", 0.5)))
    looks: list[Any] = []
    found = tried(clock, one, two, three, looks=looks, deadline=Deadline(1000))
    assert one.seen == two.seen == three.seen
    assert len(one.seen) >= 2
    assert [found.step, *(own.step for own in found.beside)] == [1, 2, 0.5]
    assert [own.cold for own in (found.own, *found.beside)] == [3, 3, 3], "the first forward's is apart"
    assert (found.cold_forward, found.cold) == ((3 - 0.5) * 4, 13)
    assert [own.steps for own in (found, *found.beside)] == [len(one.seen)] * 3
    assert [name for name, _ in looks] == ["first", "b", "c"]
    assert [metrics["metrics/l0"] for _, metrics in looks] == [1, 2, 0.5], "each is told of its own first step"


def test_one_that_ends_earlier_leaves_the_others(clock: Clock) -> None:
    short, long = Trainer(clock, 0.25, name="short", steps=2), Trainer(clock, 0.5, name="long")
    found = tried(clock, short, long, deadline=Deadline(1000), share=10)
    assert (found.steps, found.beside[0].steps) == (2, len(long.seen))
    assert len(long.seen) > 2
    assert long.seen[:2] == short.seen


def test_no_first_step_is_begun_when_the_time_is_over(clock: Clock) -> None:
    one, two = Trainer(clock, 30, name="a"), Trainer(clock, 30, name="b")
    found = tried(clock, one, two)
    assert (found.steps, found.beside[0].steps) == (1, 0)


def test_of_several_it_is_said_which_diverged(clock: Clock) -> None:
    def diverging(*given: Any) -> Any:
        raise DivergedError("the loss is nan")

    one, two = Trainer(clock, 1, name="a"), Trainer(clock, 1, name="b")
    two.train_on = diverging  # type: ignore[method-assign]
    found = tried(clock, one, two, deadline=Deadline(1000))
    assert (found.steps, found.step, found.beside[0].steps) == (one.step, 1, 0), "the other goes on"
    one, two = Trainer(clock, 1, name="a"), Trainer(clock, 1, name="b")
    one.train_on = two.train_on = diverging  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="^a: the loss is nan; b: the loss is nan$"):
        tried(clock, one, two)


def test_no_round_is_begun_that_would_not_end_in_time(clock: Clock) -> None:
    """Three steps of 2 s each on a batch whose rows take 4 s: of 40 s, there is time for so many rounds."""
    three = [Trainer(clock, 2, name=name) for name in "abc"]
    found = tried(clock, *three, deadline=Deadline(40), share=100)
    # 2 s for the first rows, 4 more for a batch, 3 first steps of 5 s, then 4 + 6 s a round, until 6 s are not left.
    assert [found.steps, *(one.steps for one in found.beside)] == [3, 3, 3]
    assert clock.now == 39, "and not 49"


def test_a_round_is_left_when_the_time_is_over(clock: Clock) -> None:
    one, two, three = Trainer(clock, 1, name="a"), Trainer(clock, 1, name="b"), Trainer(clock, 1, name="c")
    slow = two.train_on

    def slower(*given: Any) -> Any:
        clock.now += 100 * (two.step == 1)
        return slow(*given)

    two.train_on = slower  # type: ignore[method-assign]
    found = tried(clock, one, two, three, deadline=Deadline(60), share=100)
    assert [found.steps, *(own.steps for own in found.beside)] == [2, 2, 1]


# ---- those that are alike


def member(name: str, d_in: int = 8, **sections: Any) -> PlannedMember:
    training = {"training_tokens": 4096 * 10, "dead_feature_window": 4} | sections.pop("training", {})
    config = load_config({"sae": {"name": "topk", "k": 4, "d_sae": 32}, "training": training} | sections)
    options = PLUGINS.options(SAE_ARCHITECTURES, config.sae)
    return PlannedMember(name, config, options, ports=Ports.of(config.sites, dict.fromkeys(config.sites.all, d_in)))


def lane(*members: PlannedMember, contexts: int = 2, buffered: int = 4, ahead: bool = False) -> PlannedLane:
    config = members[0].config
    stream: Any = StreamContext(
        backend=SimpleNamespace(),
        sites=config.sites.all,
        batch_size=4096,
        seed=0,
        open_contexts=lambda: None,  # type: ignore[arg-type,return-value]
    )
    counted = LaneSizes(SourceForwards(contexts=contexts, buffered=buffered, ahead=ahead, needed_line="a.b=c"))
    return PlannedLane(members, stream, 1024, None, counted)


def test_what_is_alike() -> None:
    base = member("base")
    same = [
        member("lr", training={"lr": 0.5}),
        member("seed", training={"seed": 7}),
        member("site", site={"hook_name": "blocks.0.hook_resid_post"}),
        member("evals", evals={"n_contexts": 3}),
        member("schedule", lr_schedule={"name": "cosine"}),
    ]
    other = [
        member("k", sae={"name": "topk", "k": 5, "d_sae": 32}),
        member("width", d_in=9),
        member("features", sae={"name": "topk", "k": 4, "d_sae": 33}),
        member("length", training={"training_tokens": 4096 * 11}),
        member("precision", training={"matmul_precision": "high"}),
        member("no aux", sae={"name": "topk", "k": 4, "d_sae": 32, "aux_loss_coefficient": 0.0}),
        member("optimizer", optimizer="signum"),
    ]
    kinds = Kinds([lane(base, *same, *other)], [base, *same, *other], PLUGINS)
    assert [[one.name for one in kind.members] for kind in kinds.all] == [
        ["base", *(one.name for one in same)], *([one.name] for one in other)
    ]  # fmt: skip
    assert same[3].measured(PLUGINS) != base.measured(PLUGINS) == same[0].measured(PLUGINS)


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [("batchtopk", {"k": 8.0}, {"k": 24.0}), ("batchtopk", {"k": 8}, {"k": 1024}),
     ("standard", {"lp_norm": 1.5}, {"lp_norm": 2.0})],
)  # fmt: skip
def test_not_all_fractions_are_alike(name: str, one: Any, two: Any) -> None:
    """Of some architectures it depends on them how many numbers a step has, or what it computes."""
    first, second = (member(str(own), sae={"name": name, "d_sae": 32} | own) for own in (one, two))
    assert first.kind(PLUGINS) != second.kind(PLUGINS)


def stepped(step: float, late: float, cold: float, steps: int = 5) -> Stepped:
    return Stepped(step=step, late=late, cold=cold, steps=steps)


def test_two_of_a_kind_stand_for_all() -> None:
    alike = [member(str(number), training={"lr": 0.1 + number}) for number in range(5)]
    wide = member("wide", sae={"name": "topk", "k": 4, "d_sae": 64})
    whole = lane(*alike, wide)
    kinds = Kinds([whole], [*alike, wide], PLUGINS)
    assert [one.name for one in kinds.to_try(whole)] == ["0", "wide", "1"]
    trainer: Any = SimpleNamespace()
    kinds.note(whole, {"0": (trainer, 3.0, stepped(1, 2, 9)), "1": (trainer, 1.0, stepped(1.5, 2.5, 1)),
                       "wide": (trainer, 4.0, stepped(7, 7, 2))})  # fmt: skip
    assert kinds.to_try(whole) == []
    assert kinds.estimate() == 0
    first, other = kinds.all
    assert first.step == 5 * 1.25
    assert first.steps == 5 * (4 * 1.25 + 6 * 2.25), "four steps of ten have no dead features"
    assert (first.cold, first.first_weights) == (9 + 4 * 1, 3 + 4 * 1)
    assert (other.step, other.steps, other.cold) == (7, 70, 2)
    assert kinds.timed_on(6, 0) == "15 steps of 3 of 6 SAEs"


def test_what_only_the_first_step_takes_counts_once() -> None:
    alike = [member(str(number), training={"lr": 0.1 + number}) for number in range(5)]
    kinds = Kinds([lane(*alike)], alike, PLUGINS)
    trainer: Any = SimpleNamespace()
    kinds.note(lane(*alike), {"0": (trainer, 3.0, stepped(1, 1, 9)), "1": (trainer, 2.0, stepped(0, 0, 0, 0))})
    (kind,) = kinds.all
    assert (kind.cold, kind.first_weights) == (9, 3 + 4 * 2)


def test_of_those_that_are_dealt_out_the_own_are_tried() -> None:
    alike = [member(str(number), training={"lr": 0.1 + number}) for number in range(4)]
    kinds = Kinds([lane(*alike)], alike[2:3], PLUGINS)
    assert [one.name for one in kinds.to_try(lane(*alike))] == ["2"]


def test_those_without_time_are_told_by_their_size() -> None:
    small, large = member("small"), member("large", sae={"name": "topk", "k": 4, "d_sae": 96})
    whole = lane(small, large)
    kinds = Kinds([whole], [small, large], PLUGINS)
    with pytest.raises(DataError, match="too few activations for a step"):
        kinds.estimate()
    trainer: Any = SimpleNamespace()
    kinds.note(whole, {"small": (trainer, 2.0, stepped(1, 1, 1)), "large": (trainer, 5.0, stepped(0, 0, 0, 0))})
    assert kinds.estimate() == 1
    assert [kind.step for kind in kinds.all] == [1, 3]
    assert kinds.all[1].first_weights == 5, "which were made"
    assert [kind.cold for kind in kinds.all] == [1, 0], "what is made once"
    assert kinds.timed_on(2, 1) == (
        "5 steps of 1 of 2 SAEs; steps of 1 more, which were not timed, by how much they compute"
    )


def test_other_batches_are_tried_too() -> None:
    one, two, three = member("one"), member("two", training={"seed": 1}), member("three", training={"seed": 2})
    same, larger = lane(two), lane(three, contexts=4)
    lanes = [lane(one), same, larger]
    kinds = Kinds(lanes, [one, two, three], PLUGINS)
    trainer: Any = SimpleNamespace()
    kinds.note(lanes[0], {"one": (trainer, 0.0, stepped(1, 1, 0))})
    assert kinds.to_try(same) == [], "all is known of it"
    assert kinds.to_try(larger) == [three], "forwards of another size"


def test_what_is_read_is_timed_by_where_it_is_from() -> None:
    def read(*members: PlannedMember) -> PlannedLane:
        there = lane(*members)
        there.source = SimpleNamespace()  # type: ignore[assignment]
        return there

    def cached(name: str, folder: str, d_in: int = 8) -> PlannedMember:
        return member(name, d_in, activations={"source": {"name": "cached", "folder": folder}})

    lanes = [read(cached("a", "x")), read(cached("b", "x")), read(cached("c", "y")), read(cached("d", "x", 9))]
    assert not any(one.reads for one in lanes)
    assert lanes[0].timed_alike == lanes[1].timed_alike
    assert len({one.timed_alike for one in lanes}) == 3


def test_lanes_that_say_nothing_new_have_no_share_of_the_time() -> None:
    several = [member(str(seed), training={"seed": seed}) for seed in range(6)]
    lanes = [*(lane(one) for one in several[:5]), lane(several[5], contexts=4)]
    assert Kinds(lanes, several, PLUGINS).lanes_to_try(lanes) == 2


def test_the_fullest_process_is_counted() -> None:
    members = [member(str(width), sae={"name": "topk", "k": 4, "d_sae": width}) for width in (32, 64, 16, 80)]
    assert [one.name for one in here_of(members, 2)] == ["16", "80"]
    assert [one.name for one in here_of(members, 4)] == ["80"]


# ---- batches of several lanes


def test_forwards_that_are_shared_count_once() -> None:
    one, long = member("one"), member("long", training={"seed": 1, "training_tokens": 4096 * 20})
    found = Rehearsed(step=1, late=1, cold=3, steps=5, per_row=0.001, shared=1.0, forwards=7, cold_forward=2.0)
    together = Batches([lane(one), lane(long)], ALONE)
    alone = Batches([lane(long)], ALONE)
    for batches in (together, alone):
        batches.note(lane(long), found)
    assert together.seconds(50.0) == alone.seconds(50.0) == pytest.approx((8.192, 4096 * 20 * 0.001), rel=0.1)
    assert together.forwards_told() == alone.forwards_told()
    apart = Batches([lane(one, contexts=4), lane(long)], ALONE)
    apart.note(lane(long), found)
    assert apart.seconds(50.0)[0] == pytest.approx(8.192 + 16.384), "each fills its own buffer by forwards of its own"
    facts, numbers = apart.forwards_told()
    assert numbers == {"forwards": 53}
    assert facts["forwards"].startswith("13 of 4,096 and 40 of 2,048 activations")
    assert (together.cold, together.per_forward(lane(long)), together.timed_on) == (2.0, 2.048, "7 forwards")


FOUND = Rehearsed(step=1, late=1, cold=0, steps=5, per_row=0.001, shared=1.0, forwards=7)


def test_forwards_of_which_fewer_rows_count_are_more_and_take_as_long() -> None:
    """Of the second, a sixteenth of the rows of each context count."""
    whole, some = lane(member("whole")), lane(member("some", training={"seed": 1}), buffered=64)
    some.stream.choice = TokenChoice(seqpos_slice=(0, 64))
    assert some.rows_per_forward * 16 == whole.rows_per_forward == 2048
    both, alone = Batches([whole, some], ALONE), Batches([some], ALONE)
    for batches in (both, alone):
        batches.note(whole, FOUND)
        assert batches.per_forward(some) == batches.per_forward(whole) == 2.048
        assert batches.forwards_told()[1]["forwards"] == 320
    assert both.seconds(1.0) == alone.seconds(1.0)
    assert sum(alone.seconds(1.0)) == pytest.approx(2.048 * 320)


def test_forwards_are_dealt_out_to_the_processes_of_other_saes() -> None:
    own, two = lane(member("one")), planned_world(load_config({"distributed": {"saes": 2}}))
    dealt, alone = Batches([own], two), Batches([own], ALONE)
    for batches in (dealt, alone):
        batches.note(own, FOUND)
    assert dealt.seconds(0.0)[0] * 2 == alone.seconds(0.0)[0] > 0
    assert dealt.forwards_told()[1]["forwards"] * 2 == alone.forwards_told()[1]["forwards"]


def test_the_larger_of_two_buffers_is_filled() -> None:
    small, large = lane(member("small")), lane(member("large", training={"seed": 1}), buffered=400)
    both = Batches([small, large], ALONE)
    both.note(small, FOUND)
    assert both.seconds(1.0)[0] == pytest.approx(400 * 2.048)
    assert both.forwards_told()[1] == {"forwards": 400}


def test_forwards_for_which_there_is_no_room_are_made_again() -> None:
    one, two = lane(member("one")), lane(member("two", training={"seed": 1}))
    enough, half = Batches([one, two], ALONE, MOST_KEPT / 8), Batches([one, two], ALONE, MOST_KEPT / 4)
    for batches in (enough, half):
        batches.note(one, FOUND)
    made = enough.forwards_told()[1]["forwards"]
    assert enough.forwards_told()[0]["forwards"].count("again") == 0
    assert half.forwards_told()[1]["forwards"] == made + 2, "of four that fill the buffer two are kept"
    assert ", and about 2 again, since no more than 4 GB of them wait" in half.forwards_told()[0]["forwards"]
    assert sum(half.seconds(1.0)) == pytest.approx(sum(enough.seconds(1.0)) + 2 * 2.048)


# ---- words


def test_what_all_have_is_said_once() -> None:
    names = list("abcdef")
    assert of_all(dict.fromkeys(names, "10 steps"), names) == "10 steps"
    assert of_all(dict.fromkeys("ab", "10 steps"), names) == "10 steps (2 SAEs)"
    assert of_all({"a": "x", "b": "y", "c": "x"}, "abc") == "x (2 SAEs); y (b)"
    steps = {name: f"{10 * number:,} steps of 1,024 tokens" for number, name in enumerate(names, 99)}
    assert of_all(steps, names) == "990 to 1,040 steps of 1,024 tokens"
    hooks = {name: f"blocks.{number}.hook of m, width 16" for number, name in enumerate(names)}
    assert of_all(hooks, names) == "blocks.0.hook of m, width 16 (a); blocks.1.hook of m, width 16 (b); 4 others"
    assert of_some("no", "abcdef", names) == "no"
    assert of_some("no", "abcde", names) == "a, b and 3 more SAEs: no"
    assert of_some("no", "ab", names) == "a and b: no"


def test_findings_are_of_those_that_have_them() -> None:
    def failing(*problems: tuple[str, str]) -> Any:
        def work() -> None:
            raise saekit.ConfigError(list(problems))

        return work

    found = Findings(["a", "b", "c"])
    assert found.attempt(lambda: 3, of=["a"]) == 3
    assert found.attempt(failing(("x.y", "is 3"), ("", "more")), of=["a"]) is None
    found.attempt(failing(("x.y", "is 3")), of=["b"])
    found.attempt(failing(("z", "is 4")))
    found.attempt(failing(("z", "is 4")), of=["b"])

    def of_one() -> None:
        with found.about(["c"]):
            failing(("w", "is 5"))()

    found.attempt(of_one)
    with pytest.raises(saekit.ConfigError), found.about(["a"]):
        failing(("v", "is 6"))()
    found.attempt(failing(("v", "is 7")))
    found.doubt("odd", of=["c"])
    found.doubt("all")
    assert found.problems == ["a and b: x.y: is 3", "a: more", "z: is 4", "c: w: is 5", "v: is 7"]
    assert found.warnings == ["c: odd", "all"]


# ---- evals


def names_of(found: list[Measurings]) -> dict[tuple[str, ...], tuple[int, int]]:
    return {tuple(one.name for one in group.members): (group.number, group.before) for group in found}


def test_measurings_are_those_of_the_run() -> None:
    """In training of a lane, of those that are due after the same step; at the end of all on the same contexts."""
    often, seldom = {"every_n_steps": 2, "n_contexts": 4}, {"every_n_steps": 4, "n_contexts": 4}
    one, two = member("one", evals=often), member("two", evals=seldom)
    other = member("other", evals=often | {"n_contexts": 8})
    apart = member("apart", evals=often, training={"train_batch_size_tokens": 2048})
    short = member("short", evals=often, training={"training_tokens": 4096 * 5})
    end, none = member("end", evals={"n_contexts": 4}), member("none", evals={"run": []})
    whole = [one, two, other, short, end, none]
    found = names_of(measurings([lane(*whole), lane(apart)], [*whole, apart]))
    assert found == {
        ("one", "short"): (1, 1),  # after step 2
        ("one", "two", "short"): (1, 1),  # 4
        ("one",): (2, 1),  # 6, 10
        ("one", "two"): (1, 1),  # 8
        ("other",): (5, 4),
        ("apart",): (10, 9),
        ("two", "short", "end"): (1, 0),  # at the end those that were not measured after their last step
    }


def test_evals_that_differ_are_timed_by_themselves_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def timed(config: Any, trainer: Any, backend: Any, evals: Any, contexts: Any, left: float, beside: Any) -> Any:
        seen.append(config.evals.n_contexts)
        return 10.0 * len(seen), 1.0

    monkeypatch.setattr(planned_evals, "timed_eval", timed)
    monkeypatch.setattr(EvalTimes, "_contexts", lambda *given: None)
    several = [member(str(n), evals={"n_contexts": n}) for n in (8, 4, 2)]
    more = member("more", evals={"n_contexts": 8, "run": ["reconstruction"]}, training={"seed": 2})
    untried = member("untried", evals={"n_contexts": 6}, sae={"name": "topk", "k": 4, "d_sae": 64})
    several.insert(0, untried)
    whole = [lane(*several), lane(more)]
    kinds = Kinds(whole, [*several, more], PLUGINS)
    trainer: Any = SimpleNamespace(sites=several[0].config.sites)
    kinds.note(whole[0], {"8": (trainer, 0.0, stepped(1, 1, 0))})
    evals: Any = {one.name: {"any": None} for one in (*several, more)}

    def times(left: float) -> tuple[Any, int]:
        backend: Any = None
        corpus: Any = None
        own = EvalTimes(PLUGINS, corpus, backend, whole, kinds, evals, warn=seen.append, note=lambda peak: None)
        deadline: Any = SimpleNamespace(left=left)
        return own.seconds([*several, more], deadline), own.estimated

    assert times(100.0) == ((10 + 20 + 30 + 40 + 4 + 7.5, 0), 1)
    assert seen == [8, 4, 2, 8]
    seen.clear()
    assert times(0.0) == ((10 + 5 + 2.5 + 5 + 1 + 7.5, 0), 4), "by how much is measured"
    assert seen == [8]
