"""W&B without the package, and what its files hold."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

import saekit


def fake_wandb(monkeypatch: pytest.MonkeyPatch, starting_step: int) -> SimpleNamespace:
    """A W&B whose run has been at work up to ``starting_step``; it keeps what it is given."""
    fake = SimpleNamespace(inits=[], logged=[], Settings=dict, Histogram=lambda np_histogram: np_histogram)
    run = SimpleNamespace(starting_step=starting_step, log=lambda metrics, step: fake.logged.append((metrics, step)))
    fake.init = lambda **options: fake.inits.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def leveldb_records(log: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of W&B's transaction log, which is LevelDB's log format after seven bytes of its own."""
    position, parts = 0, b""
    while position + header <= len(log):
        left = block - (position + 7) % block  # W&B's seven bytes count in the first block
        if left < header:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        if position + header + length > len(log):
            return  # still being written
        parts += log[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@attrs.define
class Written:
    """What is in a W&B file."""

    history: list[dict[str, Any]] = attrs.field(factory=list)
    config: dict[str, str] = attrs.field(factory=dict)
    runs: list[Any] = attrs.field(factory=list)
    artifacts: list[Any] = attrs.field(factory=list)
    ended: bool = False


def read_file(file: Path) -> Written:
    from wandb.proto import wandb_internal_pb2

    written = Written()
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            written.history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        if record.HasField("run"):
            written.runs.append(record.run)
            written.config |= {item.key: item.value_json for item in record.run.config.update}
        if record.HasField("artifact"):
            written.artifacts.append(record.artifact)
        written.ended |= record.HasField("exit")
    return written


def read_back(folder: Path) -> list[Written]:
    """What the W&B files of a run folder hold, the oldest first, once the runs have ended.

    W&B's own process writes them, and may still do so after the run's end.
    """
    deadline = time.monotonic() + 60
    while True:
        found = [read_file(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        if all(written.ended for written in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def needs_wandb(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs W&B."""
    missing = saekit.default_manager().get("trackers", "wandb").missing()
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(bool(missing), reason="needs wandb"),
        pytest.mark.filterwarnings("default"),  # wandb's own threads and files are its own affair
        pytest.mark.usefixtures("wandb_data"),
    ):
        test = mark(test)
    return test
