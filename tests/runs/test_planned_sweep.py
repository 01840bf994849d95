"""`saekit plan` of several SAEs that train together, beside what a run of them has."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from support.sweeps import DOCUMENTS, CountingBackend, changed, fake, manager
from support.tiny import run_config

import saekit
from saekit.data.shared import SharedForwards
from saekit.planning import duration as planned_duration
from saekit.planning import evals as planned_evals
from saekit.planning import rehearsal
from saekit.planning.sizes import Sizes
from saekit.runs import run
from saekit.runs.keeping import Keeping
from saekit.runs.session import Session

pytestmark = pytest.mark.usefixtures("one_thread", "short_rehearsals")

BLOCK_1 = {"site": {"hook_name": "blocks.1.hook_resid_post"}}
TOPK = {"sae": {"name": "topk", "d_sae": 24, "k": 3}}
CHANGES: list[dict[str, Any]] = [
    {},
    {"sae": {"l1_coefficient": 0.3}},
    BLOCK_1 | TOPK,
    BLOCK_1 | TOPK | {"training": {"train_batch_size_tokens": 130, "training_tokens": 1300}},
]
"""Two alike, one at another site and of another architecture, and one that has batches of its own."""


def configs(folder: Path, *more: Mapping[str, Any], **sections: Any) -> list[dict[str, Any]]:
    chosen = {"checkpoints": {"folder": str(folder), "name": "all", "n_checkpoints": 3, "keep_last": 2}}
    return [changed(fake(folder, **sections), {**chosen, **one}) for one in (*CHANGES, *more)]


def planned(given: Any, **options: Any) -> saekit.Plan:
    found = saekit.plan(given, plugins=manager(), dataset=DOCUMENTS, **options)
    assert found.problems == []
    return found


@attrs.define
class Seen:
    """What a run had."""

    saes: int = 0
    kept: int = 0
    checkpoint: int = 0
    saved: int = 0
    forwards: int = 0
    steps: int = 0


def _bytes_in(folder: Path) -> int:
    """Of tensors: headers, JSON and probes are most of what such small SAEs have on the disk."""
    files = [file for file in folder.rglob("*.safetensors") if file.name != "probe.safetensors"]
    return sum(x.nbytes for file in files for x in load_file(file).values())


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[saekit.Plan, Seen, Sizes]:
    """A plan, what the run of it had, and what was counted."""
    folder, seen, counted = tmp_path_factory.mktemp("sweep"), Seen(), list[Sizes]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "_SECONDS", 0.2)
        count = Sizes.count
        patch.setattr(Sizes, "count", lambda sizes: counted.append(count(sizes)) or sizes)
        plan = planned(configs(folder))
        _watch(patch, seen)
        backend = CountingBackend()
        result = saekit.train(configs(folder), plugins=manager(backend), dataset=DOCUMENTS)
    seen.forwards = len(backend.seen)
    seen.saved = sum(_bytes_in(one.folder / "sae") for one in result.results.values())
    assert list(result.results) == plan.facts["names"].split(", ")
    return plan, seen, counted[-1]


def _watch(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    save, remove, take = run._save_trained, Keeping.remove_old, SharedForwards.take

    def look(session: Session, *given: Any) -> None:
        for member in session.members.values():
            weights = sum(one.nbytes for one in member.trainer.sae.parameters())
            state = member.trainer.optimizer.state_dict().values()
            seen.saes += 2 * weights + sum(x.nbytes for own in state for x in own.values() if getattr(x, "ndim", 0))
            seen.steps += member.trainer.step
        save(session, *given)

    def weigh(keeping: Keeping, folder: Path, *given: Any) -> None:
        seen.checkpoint = max(_bytes_in(one) for one in (folder / "checkpoints").iterdir())
        remove(keeping, folder, *given)

    def taken(shared: SharedForwards, *given: Any) -> Any:
        found = take(shared, *given)
        with shared._lock:  # other threads take theirs meanwhile
            seen.kept = max(seen.kept, shared.nbytes)
        return found

    patch.setattr(run, "_save_trained", look)
    patch.setattr(Keeping, "remove_old", weigh)
    patch.setattr(SharedForwards, "take", taken)


def test_memory_is_that_of_all_saes_and_all_batches(truth: tuple[saekit.Plan, Seen, Sizes]) -> None:
    plan, seen, _ = truth
    assert plan.numbers["saes"] == 4
    assert plan.numbers["sae_bytes"] == seen.saes
    rows, width = 8 * 16, 8
    # Four forwards and two ahead of one lane at two sites, and of one at one.
    assert plan.numbers["buffer_bytes"] == (4 + 2) * rows * width * 4 * (2 + 1)
    assert seen.kept <= plan.numbers["kept_bytes"] <= 1.5 * seen.kept, "what waits until both lanes have had it"
    assert "the SAEs in training" in plan.facts["memory on cpu"]


def test_disk_is_that_of_the_run_folder(truth: tuple[saekit.Plan, Seen, Sizes]) -> None:
    plan, seen, counted = truth
    assert plan.numbers["checkpoint_bytes"] == pytest.approx(seen.checkpoint, rel=0.03), "weights, moments and rows"
    assert counted.saved == pytest.approx(seen.saved, rel=0.03)
    # Three that are saved before the end, and the end; two checkpoints, and one that is being written.
    assert counted.disk == 4 * counted.saved + 3 * plan.numbers["checkpoint_bytes"]


def test_forwards_are_made_once_and_steps_by_each(truth: tuple[saekit.Plan, Seen, Sizes]) -> None:
    plan, seen, _ = truth
    assert plan.numbers["forwards"] == pytest.approx(seen.forwards, abs=3), "the thread may make some ahead"
    assert plan.numbers["steps"] == 10
    assert seen.steps == 8 + 8 + 8 + 10
    assert "of all 4 SAEs" in plan.facts["duration"]


def test_what_is_shared_is_said_once(truth: tuple[saekit.Plan, Seen, Sizes]) -> None:
    facts, names = truth[0].facts, truth[0].facts["names"].split(", ")
    assert names[1].endswith("_d_sae=12_l1_coefficient=0.3")
    assert facts["training"] == (
        f"8 steps of 200 tokens, 1,500 in all (3 SAEs); 10 steps of 130 tokens, 1,300 in all ({names[3][:37]}...)"
    )
    assert facts["site"].count("; ") == 1
    assert facts["site"].count("(2 SAEs)") == 2
    assert facts["SAEs"].startswith("4: 12 features, ")
    assert facts["held out"] == "one document in 10, 2 contexts"
    assert list(facts)[:4] == ["training", "site", "SAEs", "names"]
    assert "the SAEs " in facts["duration"]


def test_many_saes_are_told_in_few_words(tmp_path: Path) -> None:
    given = saekit.grid(run_config(tmp_path), {"sae.d_sae": range(128, 136), "training.seed": range(5)})
    found = saekit.plan(given, load=False)
    assert found.problems == []
    assert found.facts["SAEs"] == "40: 128 to 135 features, 33,024 to 34,823 parameters"
    assert (
        found.facts["names"] == "00_d_sae=128_seed=0, 01_d_sae=128_seed=1, 02_d_sae=128_seed=2, ... 39_d_sae=135_seed=4"
    )
    assert (found.numbers["saes"], found.numbers["d_sae"]) == (40, 135)
    parameters = [d_sae * (2 * 128 + 1) + 128 for d_sae in range(128, 136)]
    assert found.numbers["sae_bytes"] == 5 * 16 * sum(parameters)
    lines = [f"{name} {text}" for name, text in found.facts.items()]
    assert max(map(len, lines)) < 500


def test_the_largest_step_is_that_of_the_sae_that_has_it(tmp_path: Path) -> None:
    base = run_config(tmp_path)
    few, many = (base | {"sae": {"name": "batchtopk", "d_sae": 2048, "k": k}} for k in (8.0, 1024.0))
    sizes = [saekit.plan(given, load=False).numbers["step_bytes"] for given in (few, many, [few, many])]
    assert sizes[0] < sizes[1] == sizes[2]


def test_a_list_of_one_is_planned_as_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, 1e12))
    for place in ("planner", "sizes"):  # what is free may change meanwhile
        monkeypatch.setattr(f"saekit.planning.{place}.free_disk", lambda folder: 1e12)
    config = run_config(tmp_path)
    assert saekit.plan([config], load=False) == saekit.plan(config, load=False)
    assert "saes" not in saekit.plan([config], load=False).numbers
    with pytest.raises(saekit.ConfigError, match="there is no configuration to plan: the list is empty"):
        saekit.plan([])


def test_what_all_read_is_forwarded_at_once(truth: tuple[saekit.Plan, Seen, Sizes]) -> None:
    counted = truth[2]
    assert [site.hook_name for site in counted.reads_all().sites.all] == [
        "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    ]  # fmt: skip
    asked: list[set[str]] = []
    shown = counted.backend.run

    def run(tokens: torch.Tensor, **given: Any) -> Any:
        asked.append(set(given["read"]))
        return shown(tokens, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counted.backend, "run", run)
        for number, lane in enumerate(counted.lanes, 1):
            lane.stream.backend.run(torch.full((2, 7), number), read={lane.stream.sites[0].hook_name})
    assert asked == [{"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}] * 2


def test_a_sweep_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = saekit.grid(run_config(tmp_path, checkpoints={"keep_last": 0}), {"sae.d_sae": [4096] * 20})
    one, all_of_them = saekit.plan(given[:1], load=False), saekit.plan(given, load=False)
    room = (one.numbers["memory_bytes"] + all_of_them.numbers["memory_bytes"]) / 2
    monkeypatch.setattr("saekit.planning.planner.free_memory", lambda devices: dict.fromkeys(devices, room))
    assert saekit.plan(given[:1], load=False).fits is True
    found = saekit.plan(given)
    assert found.fits is False
    assert found.facts["duration"] == "not measured: it does not fit"
    (warning,) = [text for text in found.warnings if "are needed on cpu" in text]
    assert "train fewer at a time, have several processes train some each (distributed.saes)" in warning


def test_evals_of_saes_that_are_not_as_they_are_saved_have_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are measured together are there at one time."""
    counted: list[Sizes] = []
    count = Sizes.count
    monkeypatch.setattr(Sizes, "count", lambda sizes: counted.append(count(sizes)) or sizes)
    one = run_config(tmp_path)
    scaled = {"activations": {"normalize_activations": "expected_average_only_in"}}
    apart = {"evals": {"n_contexts": 3}}
    for more in ({}, scaled, {"sae": {"name": "standard", "d_sae": 64, "dtype": "bfloat16"}}):
        each = changed(one, more)
        saekit.plan([each, changed(each, {"training": {"seed": 7}}), each, changed(each, apart)], load=False)
    own = 64 * 257 + 128
    # Of the same seed two are measured together; those of another seed, or on other contexts, are not.
    assert [sum(sizes._measured_beside().values()) for sizes in counted] == [0, 2 * 4 * own, 2 * 2 * own]


def test_what_looks_wrong_with_the_text_of_other_lanes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def used(config: Any, *given: Any) -> Any:
        return SimpleNamespace(facts={}, numbers={}, tokens=None, doubts=[f"odd: {config.tokens.seqpos_slice}"])

    monkeypatch.setattr("saekit.planning.text.Used.of", used)
    monkeypatch.setattr(planned_duration.TimedRun, "time", lambda *given: None)
    found = planned([fake(tmp_path), changed(fake(tmp_path), {"tokens": {"seqpos_slice": [0, 12]}})])
    assert [text.partition("odd: ")[2] for text in found.warnings if "odd: " in text] == ["None", "(0, 12)"]
    assert any(text.startswith("1_") and text.endswith("odd: (0, 12)") for text in found.warnings)


# ---- what could not be trained


def test_what_they_cannot_differ_in_is_a_problem(tmp_path: Path) -> None:
    one = run_config(tmp_path)
    other = run_config(tmp_path, dataset={"context_size": 64}, reports={"pictures": True})
    found = saekit.plan([one, other], load=False)
    with pytest.raises(saekit.ConfigError) as refused:
        saekit.train([one, other])
    assert found.problems == [f"{path}: {text}" for path, text in refused.value.problems]
    assert [text.partition(":")[0] for text in found.problems] == ["dataset.context_size", "reports.pictures"]
    assert found.verdict == "It cannot run: 2 problems."
    assert found.facts["duration"] == "not measured: these SAEs cannot be trained together"


def test_each_mistake_is_said_once_and_of_whom(tmp_path: Path) -> None:
    given = [
        run_config(tmp_path, checkpoints={"folder": str(tmp_path), "name": name}, **sections)
        for name, sections in {
            "one": {"sae": {"d_in": 5}},
            "two": {"sae": {"d_in": 5}, "evals": {"run": ["reconstruction", "saekit:reconstruction"]}},
            "three": {"site": {"hook_name": "blocks.1.hook_resid_pots"}},
            "four": {},
        }.items()
    ]
    found = saekit.plan(given, load=False)
    twice, hook = found.problems
    assert twice.startswith("two: evals.run: names a plugin twice")
    assert hook.startswith("three: the model 'saekit/tiny-python' has no hook 'blocks.1.hook_resid_pots'")
    found = saekit.plan([given[0], given[1], given[3]], load=False)
    assert [text.partition(" in")[0] for text in found.problems[1:]] == [
        "one and two: sae.d_in: is 5, but blocks.1.hook_resid_post of 'saekit/tiny-python' has width 128"
    ]
    everywhere = [
        one | {"dataset": {"context_size": 129}}
        for one in (given[3], given[3] | {"checkpoints": {"name": "five", "folder": str(tmp_path)}})
    ]
    (text,) = saekit.plan(everywhere, load=False).problems
    assert text.startswith("dataset.context_size: is 129"), "it is of all"


def test_an_sae_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    named = {"checkpoints": {"folder": str(tmp_path), "name": "coder"}}
    coder = {"inputs": [{"hook_name": "blocks.0.hook_resid_post"}], "targets": [{"hook_name": "blocks.1.hook_mlp_out"}]}
    given = [run_config(tmp_path, checkpoints={"name": "sae"}), run_config(tmp_path) | named | coder]
    (text,) = saekit.plan(given, load=False).problems
    assert text.startswith("coder: sae.apply_b_dec_to_input: takes what is added to the targets from the inputs")


def test_names_that_clash(tmp_path: Path) -> None:
    given = [run_config(tmp_path, checkpoints={"folder": str(tmp_path), "name": name}) for name in ("a", "a", "b")]
    (text,) = saekit.plan(given, load=False).problems
    assert text.startswith("checkpoints.name: must be the same for all, to name the sweep")


# ---- many processes


def test_of_saes_that_are_laid_out_the_fullest_process_is_counted(tmp_path: Path) -> None:
    given = run_config(tmp_path, distributed={"saes": 2}, sae={"name": "standard", "l1_coefficient": 1.0})
    widths = {"sae.d_sae": [128, 256, 512]}
    found, one = (saekit.plan(saekit.grid(given, axes), load=False) for axes in (widths, {"sae.d_sae": [512, 512]}))
    assert found.problems == one.problems == []
    own = 512 * 257 + 128
    assert found.numbers["sae_bytes"] == one.numbers["sae_bytes"] == 16 * own, "the others are on the other process"
    every = sum(d_sae * 257 + 128 for d_sae in (128, 256, 512))
    assert found.numbers["checkpoint_bytes"] == 12 * every + found.numbers["buffer_bytes"]
    assert found.facts["sweep"].startswith(
        "2 processes, those with the same rows in 2 parts: this is what one takes that trains 1 of 3 SAEs; none has "
        "more weights to train, and each sends its "
    )
    (text,) = saekit.plan(saekit.grid(given | {"distributed": {"saes": 3}}, {"sae.d_sae": [8, 9]}), load=False).problems
    assert text.startswith("distributed.saes: is 3, and the sweep has 2 SAEs")


# ---- seconds


def test_evals_of_a_sweep_share_their_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def timed(config: Any, trainer: Any, backend: Any, evals: Any, contexts: Any, left: float, beside: Any) -> Any:
        asked.append(1 + len(beside))
        return (100.0 * asked[-1], 5.0)

    monkeypatch.setattr(planned_evals, "timed_eval", timed)
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.1)
    often = {"evals": {"every_n_steps": 4}}
    found = planned(configs(tmp_path, {"sae": {"l1_coefficient": 7.0}}, *[often, often]))
    # At the end those of both lanes together; after four steps and after eight the two that are measured then.
    assert asked == [5, 2]
    assert found.numbers["eval_seconds"] == 500 + 5 + 2 * 200 + 5


def test_when_the_time_is_over_no_further_sae_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_LIMIT", 0.0)
    widths = [{"sae": {"d_sae": 12 * width}} for width in (2, 3)]
    found = planned(configs(tmp_path, *widths))
    assert " 1 of 6 SAEs; steps of 4 more, which were not timed, by how much they compute" in found.facts["duration"]
    assert found.numbers["step_seconds"] > 0


def test_other_threads_are_gone(tmp_path: Path) -> None:
    before = threading.active_count()
    state = torch.get_rng_state()
    planned(configs(tmp_path)[:2], load=True)
    assert threading.active_count() == before
    assert torch.equal(state, torch.get_rng_state())
    assert not list(tmp_path.iterdir()), "nothing is written"
