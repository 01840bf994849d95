"""The forwards of several SAEs that train together, as a plan counts them, beside those that a run makes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import DOCUMENTS, CountingBackend, changed, fake, manager

import saekit
from saekit.planning import rehearsal
from saekit.planning.duration import TimedRun
from saekit.planning.evals import measurings
from saekit.planning.sizes import Sizes
from saekit.runs import measuring

pytestmark = pytest.mark.usefixtures("one_thread")

SLICED = {"tokens": {"seqpos_slice": [0, 10]}}
WIDE = {"activations": {"source": {"name": "live", "store_batch_size_prompts": 8, "n_batches_in_buffer": 40}}}


@pytest.mark.parametrize("other", [SLICED, WIDE])
def test_forwards_are_those_of_the_lane_that_makes_most(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.05)
    base = fake(tmp_path, training={"training_tokens": 3000}, evals={"run": []})
    given = [base, changed(base, other)]
    found = saekit.plan(given, plugins=manager(), dataset=DOCUMENTS)
    assert found.problems == []
    backend = CountingBackend()
    saekit.train(given, plugins=manager(backend), dataset=DOCUMENTS)
    assert found.numbers["forwards"] == pytest.approx(len(backend.seen), abs=4), "a thread may make some ahead"


def test_measurings_are_those_that_the_run_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, made = measuring._told, list[tuple[str, ...]]()

    def noted(session: Any, group: Any, *given: Any) -> Any:
        made.append(tuple(one.trainer.name for one in group))
        return told(session, group, *given)

    monkeypatch.setattr(measuring, "_told", noted)
    monkeypatch.setattr(TimedRun, "time", lambda *given: None)
    counted: list[Sizes] = []
    count = Sizes.count
    monkeypatch.setattr(Sizes, "count", lambda sizes: counted.append(count(sizes)) or sizes)
    changes: list[Any] = [
        {"evals": {"every_n_steps": 2}},
        {"evals": {"every_n_steps": 3}},
        {"evals": {"every_n_steps": 4, "n_contexts": 3}},
        {"training": {"seed": 3}},
        {"evals": {"every_n_steps": 0}},
    ]
    given = [changed(fake(tmp_path), one) for one in changes]
    saekit.plan(given, plugins=manager(), dataset=DOCUMENTS)
    saekit.train(given, plugins=manager(), dataset=DOCUMENTS)
    found = measurings(counted[-1].lanes, counted[-1].here)
    assert {tuple(sorted(one.name for one in group.members)): group.number for group in found} == Counter(
        tuple(sorted(group)) for group in made
    )
