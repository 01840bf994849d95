"""A run of two processes, of which one is killed at a random moment, again and again: it ends with the same bytes.

``SAEKIT_KILLS`` says how often (``make test-processes``: thirty times), and ``SAEKIT_SEED`` which moments they are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support import spread_stops
from support.processes import ended
from support.runs import contents

from saekit.runs.checkpoints import newest_checkpoint

KILLS, SEED = int(os.environ.get("SAEKIT_KILLS", "2")), int(os.environ.get("SAEKIT_SEED", "7"))
TIMEOUT = 240  # seconds; nothing may take so long, however busy the machine is


def gone_on(folder: Path, sent: str = "") -> list[tuple[int, str]]:
    """Start the run in ``folder``, or go on with it, as whoever finds it stopped does; the ends of both processes."""
    return ended(2, [spread_stops.__file__, str(folder), "goes on", "0", "0"], TIMEOUT, SENT=sent, TORCHRUN="30")


def left_by(folder: Path) -> dict[str, object]:
    """What the run leaves: the SAE, the metrics but for the clock, and all states in its last checkpoint."""
    found = contents(folder / "run")
    kept = {path: value for path, value in found.items() if path.startswith(("sae/", "metrics.jsonl"))}
    last = newest_checkpoint(folder / "run").facts
    assert last["finished"]
    return {**kept, "files": last["files"], "batches": last["batches"]}


@pytest.mark.processes
def test_random_kills_change_no_byte(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert [code for code, _ in gone_on(tmp_path / "whole")] == [0, 0]
    wanted, takes = left_by(tmp_path / "whole"), time.monotonic() - begun
    assert len(wanted) > 4
    draws, kills, runs, stages = random.Random(SEED), 0, 0, []
    run = tmp_path / "killed/run"
    while kills < KILLS:
        rank, moment, begun = draws.randrange(2), draws.uniform(0, takes), time.monotonic()
        ends = gone_on(tmp_path / "killed", f"{rank}:KILL:{moment:.3f}")
        codes, there = [code for code, _ in ends], sorted(run.glob("checkpoints/step-*"), key=os.path.getmtime)
        print(f"process {rank} after {moment:.2f} of {takes:.2f} s: {codes}, {there[-1].name if there else 'nothing'}")
        if codes[rank] == -signal.SIGKILL:
            kills += 1
            stages.append(bool(there))
            assert codes[1 - rank] in (0, 1, 143, -signal.SIGTERM), ends[1 - rank][1]
            assert "Traceback" not in ends[1 - rank][1], ends[1 - rank][1]
        else:
            assert codes == [0, 0], ends
            takes = min(takes, time.monotonic() - begun)
        if there and newest_checkpoint(run).facts["finished"]:
            assert left_by(tmp_path / "killed") == wanted
            runs += 1
            shutil.rmtree(tmp_path / "killed")
    ends = gone_on(tmp_path / "killed")
    assert [code for code, _ in ends] == [0, 0], ends
    assert left_by(tmp_path / "killed") == wanted
    print(f"{kills} kills (seed {SEED}), {sum(stages)} with a checkpoint by then; {runs + 1} runs to their end")
