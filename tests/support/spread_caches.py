"""One of the processes that write a cache together; run as a script: ``FOLDER HOW RANK``.

``whole``: all of :data:`CACHES`.  ``killed`` and ``fails``: the process ``RANK`` ends in its third shard.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support import caches
from support.caches import SIZE, config

from saekit import SaekitError
from saekit.testing import FakeBackend

__all__ = ["CACHES", "write_all"]

CACHES: dict[str, dict[str, Any]] = {
    "all": {"tokens": 20 * SIZE, "per_shard": 3},
    "chosen": {"tokens": 150, "per_shard": 4, "sections": {"tokens": {"seqpos_slice": [2, None]}}},
    "by mask": {"tokens": 10**6, "per_shard": 60, "sections": {"tokens": {"exclude_special_tokens": [101, 45]}}},
    "one shard": {"tokens": 5 * SIZE, "per_shard": 8},
    "ends": {"tokens": 10**6, "per_shard": 70},
}
"""Contexts in a shard, activations, and what else is chosen."""


class Dying(FakeBackend):
    """Ends its process in its third shard of two forwards."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.end = end

    def run(self, *arguments: Any, **options: Any) -> Any:
        if len(self.forwards) == 6:  # the first looked at its widths
            self.end()
        return super().run(*arguments, **options)


def write_all(folder: Path) -> None:
    for name, options in CACHES.items():
        write(folder / name, options)
    more = CACHES["all"]
    write(folder / "more", {**more, "tokens": 11 * SIZE})  # of which the last shard is a short one
    write(folder / "more", more)


def write(folder: Path, options: dict[str, Any], backend: FakeBackend | None = None) -> Any:
    rest = {name: value for name, value in options.items() if name != "sections"}
    return caches.cache(config(folder, **options.get("sections", {})), backend, batch_size_prompts=2, **rest)


def fails() -> None:
    raise ValueError("a fault of a model")


def main(folder: str, how: str, rank: str) -> None:
    torch.set_num_threads(1)
    begun = time.monotonic()
    if how == "whole":
        write_all(Path(folder))
        return
    ends = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "fails": fails}
    backend = Dying(ends[how]) if os.environ["RANK"] == rank else FakeBackend()
    try:
        write(Path(folder), CACHES["all"], backend)
    except SaekitError as error:
        print(error, *getattr(error, "__notes__", ()), f"{time.monotonic() - begun:.0f} s", sep="\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
