"""SAEs of other libraries' formats: how each is loaded, and copies in which something is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
NOT_OF_THE_FORMAT = ("expected.safetensors", "meta.json", "peer_cfg.json")
GIVEN: Mapping[str, dict[str, Any]] = {
    "qwen_scope": {"name": "qwen_scope", "k": 9},
    "llama_scope_r1_distill": {"name": "llama_scope_r1_distill", "activation_scale": 0.5},
    "gemma_scope_2_npz": {"name": "gemma_2"},
    "gemma_2_transcoder": {"name": "gemma_2_transcoder"},
}
"""What the files of a format, or the fixture's folder, do not say, as options of its loader."""


def copied(name: str, folder: Path, at: str = "") -> Path:
    """The files of a fixture that are of its format, below ``folder / at``; returns ``folder``."""
    shutil.copytree(
        FIXTURES / name, folder / at, ignore=lambda _, names: set(names) & {*NOT_OF_THE_FORMAT}, dirs_exist_ok=True
    )
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def edit_pickle(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
