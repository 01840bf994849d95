"""A process of a run that is killed, or fails: the others end soon and say which; the last checkpoint is good."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import spread_stops
from support.processes import ended

from saekit.runs.checkpoints import newest_checkpoint

TIMEOUT = 90  # seconds; a process waits for the others for ten minutes


@pytest.mark.parametrize(
    ("how", "rank", "code", "told"),
    [
        (
            "killed",
            1,
            -signal.SIGKILL,
            "process 1 has gone or hangs: it was killed or stopped, or its machine is not there any more",
        ),
        pytest.param(
            *(
                "killed",
                0,
                -signal.SIGKILL,
                "process 0 has gone or hangs: it was killed or stopped, or its machine is not there any more",
            ),
            marks=pytest.mark.processes,
        ),
        pytest.param("fails", 1, 1, "process 1 ended: ", marks=pytest.mark.processes),
    ],
)
def test_one_that_ends_ends_all(tmp_path: Path, how: str, rank: int, code: int, told: str) -> None:
    found = ended(2, [spread_stops.__file__, str(tmp_path), how, str(rank), "6"], timeout=TIMEOUT)
    run = tmp_path / "run"
    newest = newest_checkpoint(run)
    assert newest.folder.name in ("step-3", "step-5"), "one that was being written may be given up"
    assert [end for end, _ in found] == ([code, 1] if rank == 0 else [1, code])
    other = found[1 - rank][1]
    assert "another process of the run has gone, or does not answer" in other
    assert told in other
    assert (
        "and the run as it was before could not be saved: the other processes of the run need not be at the same step; "
        f"torchrun --nproc-per-node 2 --no-python saekit train --resume {run} goes on from {newest.folder}"
    ) in other
    if how == "fails":
        assert "a fault of an architecture" in other
        assert "a fault of an architecture" in found[rank][1]
