"""What is left of a world when it has ended: nothing of torch's, whoever still has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import spread_ends
from support.processes import launch


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux tells them")
def test_worlds_that_have_ended_leave_no_threads_and_say_so(tmp_path: Path) -> None:
    for text in launch(2, [spread_ends.__file__, str(tmp_path)], timeout=120):
        found = json.loads(text.splitlines()[-1])
        assert len({*found["alone"]}) == 1, "each world that ends takes its threads with it"
        assert len({*found["beside"]}) == 1, "also where somebody else has made the process group"
        assert found["told"] == 2, "which goes on"
        assert len(found["said"]) == 2
        assert all("the processes of this run do not hear each other any more" in text for text in found["said"])
