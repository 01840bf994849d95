"""The forwards of several SAEs that train together, as a plan counts them, beside those that a run makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.sweeps import DOCUMENTS, CountingBackend, changed, fake, manager

import saekit
from saekit.planning import rehearsal

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
