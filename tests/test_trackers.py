"""Trackers, by reading back what they wrote."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import run_config

import saekit

wandb = pytest.importorskip("wandb")


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


def read_back(file: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The rows of the history, and the configuration, that are in a W&B file by now."""
    from wandb.proto import wandb_internal_pb2

    history: list[dict[str, str]] = []
    saved: dict[str, str] = {}
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            history.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
        if record.HasField("run"):
            saved |= {item.key: item.value_json for item in record.run.config.update}
    return history, saved


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # wandb's own threads and files are its own affair
def test_wandb_offline(tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"log_frequency": 2}) | {
        "trackers": ["jsonl", {"name": "wandb", "mode": "offline", "project": "p", "tags": ["t"]}]
    }
    result = saekit.train(config)
    (file,) = result.folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # W&B's own process writes the file, and may still do so after the run's end
    history, saved = read_back(file)
    while len(history) < 5 and time.monotonic() < deadline:
        time.sleep(0.2)
        history, saved = read_back(file)
    logged = [row for row in history if "losses/mse_loss" in row]
    assert len(logged) == 5  # steps 1, 2, 4, 6, 8
    assert float(logged[-1]["losses/mse_loss"]) == pytest.approx(result.metrics["losses/mse_loss"])
    assert "evals/ce_recovered" in history[-1]
    assert '"d_sae"' in saved["sae"]
