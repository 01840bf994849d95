"""Checkpoints that somebody has changed and sealed again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import contents, resume

from saekit.runs.checkpoints import _seal


def seal(checkpoint: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Make the checksums right again, as whoever crafts a checkpoint can."""
    table = json.loads((checkpoint / "checkpoint.json").read_text())
    for name in table["files"]:
        if (checkpoint / name).exists():
            table["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    if change is not None:
        change(table)
    table["sha256"] = _seal(table)
    (checkpoint / "checkpoint.json").write_text(json.dumps(table))


def falls_back(tmp_path: Path, made: Path, change: Callable[[Path], None], told: str = "") -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    change(tmp_path / "run/checkpoints/step-5")
    with pytest.warns(RuntimeWarning, match=f"a newer checkpoint is not used: .*{told}.*Going on from step-3 instead"):
        resume(tmp_path / "run")
    ours, theirs = contents(tmp_path / "run"), contents(made / "whole")
    for path in ("metrics.jsonl", "sae/sae_weights.safetensors", "sae/cfg.json"):
        assert ours[path] == theirs[path]
    assert (tmp_path / "run/checkpoints/step-5.damaged").is_dir()


def setting(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        *keys, last = path.split("/")
        node: Any = table
        for key in keys:
            node = node[int(key) if isinstance(node, list) else key]
        place: Any = int(last) if isinstance(node, list) else last
        if value is Ellipsis:
            del node[place]
        else:
            node[place] = value

    return change
