"""To what the processor's time of a run is charged."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import parts

    yield parts
    for name in ("parts", "figures"):
        sys.modules.pop(name, None)


def function_of(file: str, body: str, **given: Any) -> Any:
    """``work(seconds)``, as if it stood in ``file``."""
    names: dict[str, Any] = {"time": time, **given}
    exec(compile(f"def work(seconds):\n    {body}", file, "exec"), names)
    return names["work"]


SPIN = "end = time.thread_time() + seconds\n    while time.thread_time() < end: pass"


def test_time_is_charged_to_what_a_thread_is_at(parts: ModuleType) -> None:
    """To the first part that any caller belongs to; of each thread apart; and nothing to one that waits."""
    engine = function_of("/x/saekit/evals/engine.py", SPIN)
    forward = function_of("/x/saekit/data/activations.py:_forward", SPIN)
    measuring = function_of("/x/saekit/runs/measuring.py", "forward(seconds)", forward=forward)
    waits = function_of("/x/saekit/data/buffer.py", "time.sleep(seconds)")
    threads = [threading.Thread(target=work, args=(0.15,)) for work in (engine, waits, measuring)]
    with parts.Looking() as looking:
        time.sleep(0.02)
        for thread in threads:
            thread.start()
        forward(0.15)
        for thread in threads:
            thread.join()
    assert 0.25 < looking.seconds["evals"] < 0.35, "an eval's forwards are its own"
    assert 0.1 < looking.seconds["forwards"] < 0.2
    assert looking.seconds["the buffer"] < 0.02


def test_forwards_that_training_takes_are_apart(parts: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parts.table({"forwards": 8.6, "steps": 3.6, "imports": 1.0}, 15.0, 10**6, 86, 64, "full")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "full: 15.0 s of the processor, 1.50 x those forwards and the steps"
    assert [line.split("µs/token")[0].strip() for line in lines] == ["6.4", "3.6", "2.2", "1.8", "1.0"]
    assert [line.split("% ")[1].strip() for line in lines] == [
        "64 forwards that training takes", "steps", "22 other forwards", "the rest", "imports",
    ]  # fmt: skip
