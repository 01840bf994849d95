"""``examples/one_file.py``: all of training in plain lines, on public parts, with the bytes of ``saekit.train``."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from support import warm
from support.tiny import run_config

import saekit

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_file.py"


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_it_is_short() -> None:
    (function,) = (node for node in ast.parse(EXAMPLE.read_text()).body if isinstance(node, ast.FunctionDef))
    lines = EXAMPLE.read_text().splitlines()[function.lineno - 1 : function.end_lineno]
    assert len([line for line in lines if line.strip() and not line.strip().startswith("#")]) <= 60


def test_it_is_made_of_public_parts() -> None:
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert {name.name for name in node.names} <= set(importlib.import_module(node.module).__all__)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")


@pytest.mark.parametrize("changes", [
    {},
    {"sae": {"name": "topk", "k": 8, "l1_coefficient": None}, "lr_schedule": {"name": "cosine"}},
    {"sae": {"noise_scale": 0.1, "use_ghost_grads": True, "b_dec_init_method": "mean"},
     "activations": {"normalize_activations": "expected_average_only_in"}, "training": {"dead_feature_window": 2}},
    {"sae": {"name": "jumprelu", "l1_coefficient": None}, "optimizer": {"name": "signum"},
     "training": {"seed": 5, "lr_warm_up_steps": 3, "lr_decay_steps": 2}},
], ids=["standard", "topk", "scaled", "jumprelu"])  # fmt: skip
def test_it_leaves_the_bytes_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any) -> None:
    table = run_config(tmp_path, **changes)
    table["sae"] = {name: value for name, value in table["sae"].items() if value is not None}
    expected = saekit.train(table | {"evals": table["evals"] | {"run": []}})
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    importlib.import_module("one_file").train(saekit.load_config(table), tmp_path / "own")
    assert bytes_of(tmp_path / "own") == bytes_of(expected.folder / "sae")
    assert len(bytes_of(tmp_path / "own")) == 4


REFUSED: dict[str, Any] = {
    "inputs": {"inputs": [{"hook_name": f"blocks.{block}.hook_resid_post"} for block in (0, 1)]},
    "model.backend": {"model": {"backend": "none"}},
    "tokens": {"tokens": {"seqpos_slice": [1, None]}},
    "dataset.disable_concat_sequences": {"dataset": {"disable_concat_sequences": True}},
    "dataset.on_exhausted": {"dataset": {"on_exhausted": "error"}},
    "activations.source": {"activations": {"source": {"name": "cached", "folder": "cache"}}},
    "sae.dtype": {"sae": {"dtype": "bfloat16"}},
    "training.device": {"training": {"device": "cuda"}},
    "training.kernels": {"training": {"kernels": "reference"}},
    "training.autocast": {"training": {"autocast": True}},
    "training.compile": {"training": {"compile": True}},
    "training.finetuning_tokens": {"training": {"finetuning_tokens": 64, "finetuning_method": "scale"}},
    "training.from_pretrained_path": {"training": {"from_pretrained_path": "sae"}},
}


@pytest.mark.parametrize("option", REFUSED)
def test_it_refuses_what_it_does_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    table = run_config(tmp_path)
    for name, value in REFUSED[option].items():
        table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    config = saekit.load_config(table)
    with pytest.raises(saekit.ConfigError) as caught:
        importlib.import_module("one_file").train(config, tmp_path / "own")
    assert str(caught.value) == f"{option}: is not done in one file: use saekit.train"
    assert not (tmp_path / "own").exists()


def test_it_ends_with_the_text_and_with_a_loss_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    one_file = importlib.import_module("one_file")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{n}(x): return x + {n}"}) + "\n" for n in range(300)))
    table = run_config(tmp_path, training={"training_tokens": 10**6}, evals={"run": [], "split": None})
    table["dataset"] |= {"path": str(text), "on_exhausted": "stop"}
    expected = saekit.train(table)
    one_file.train(saekit.load_config(table), tmp_path / "own")
    assert bytes_of(tmp_path / "own") == bytes_of(expected.folder / "sae")
    diverging = run_config(tmp_path, training={"lr": 1e30})
    with pytest.raises(saekit.SaekitError, match=r"^the loss or its gradient is no number any more, at step \d$"):
        one_file.train(saekit.load_config(diverging), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run_config(tmp_path)))
    found = warm.python(EXAMPLE, tmp_path / "run.toml", tmp_path / "sae")
    assert found.returncode == 0, found.stderr
    assert saekit.SAE.load(tmp_path / "sae").d_sae == 64
