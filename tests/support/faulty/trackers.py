"""Trackers that break a promise each."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from support.faulty.case import cases


class Quiet:
    """Nothing is wrong with it."""

    def __init__(self, config: Any, *, run: Any) -> None:
        self.run = run

    def log(self, metrics: Any, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class NumbersOnly(Quiet):
    def log(self, metrics: Any, step: int) -> None:
        for value in metrics.values():
            float(value)


class Intruder(Quiet):
    def log(self, metrics: Any, step: int) -> None:
        (self.run.folder / "mine.txt").write_text(str(step))


class Once(Quiet):
    def __init__(self, config: Any, *, run: Any) -> None:
        super().__init__(config, run=run)
        run.file("mine.txt").touch(exist_ok=False)


class Alone(Quiet):
    at_work: ClassVar[list[Any]] = []

    def __init__(self, config: Any, *, run: Any) -> None:
        super().__init__(config, run=run)
        if self.at_work:
            raise RuntimeError("another run is followed")
        self.at_work.append(run)

    def close(self) -> None:
        self.at_work.clear()


class Mover(Quiet):
    def log_checkpoint(self, folder: Path, step: int) -> None:
        (folder / "cfg.json").rename(folder / "config.json")


class Lasting(Quiet):
    def __init__(self, config: Any, *, run: Any) -> None:
        super().__init__(config, run=run)
        threading.Thread(target=threading.Event().wait, args=[1.0], name="mine").start()


class Optimist(Quiet):
    def conclude(self, end: Any) -> None:
        {"finished": 0, "failed": 1}[end.status]


class Meeting(Quiet):
    """Would meet the other processes, of which none has it."""

    def log(self, metrics: Any, step: int) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.monitored_barrier(timeout=datetime.timedelta(seconds=0.3))


class Unending:
    def __init__(self, config: Any, *, run: Any) -> None:
        pass

    def log(self, metrics: Any, step: int) -> None:
        pass


CASES = cases(
    "trackers",
    {
        "build": (r"which lacks close\(\); expected a tracker", Unending),
        "log": ("in the thread of its own it raised TypeError", NumbersOnly),
        "own_files": ("it writes mine.txt in the run folder, and did not ask run.file for it", Intruder),
        "resume": ("FileExistsError", Once),
        "two_processes": ("in the thread of its own it raised .*", Meeting),
        "several": ("another run is followed", Alone),
        "checkpoints": ("log_checkpoint changes the folder", Mover),
        "end": ("KeyError: 'interrupted'", Optimist),
        "close": (r"after close\(\) there is still the thread mine", Lasting),
    },
)
