"""Run folders as runs leave them, written without one: what tables, pictures and ``saekit watch`` read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

OPTIONS: dict[str, Any] = {
    "model": {"name": "saekit/tiny-python", "backend": "saekit:HookedTransformer"},
    "dataset": {"path": "saekit/python-stdlib"},
    "site": {"hook_name": "blocks.1.hook_resid_post"},
    "sae": {"name": "saekit:standard", "d_sae": 1024, "l1_coefficient": 5.0},
    "training": {"training_tokens": 100_000, "train_batch_size_tokens": 1000, "lr": 1e-3, "log_frequency": 1},
    "trackers": [],
    "checkpoints": {"folder": "runs"},
}
"""As ``config.toml`` has them, but for most."""


def record_of(step: int, tokens: int, total: int, noise: float = 0.0, **more: Any) -> dict[str, Any]:
    """A line of metrics as training writes it."""
    part = tokens / total
    ev = 0.9 - 1.6 * math.exp(-9 * part) + noise * random.Random(step).gauss(0, 0.02)
    return {
        "step": step,
        "seconds": round(0.05 * step, 3),
        "losses/mse_loss": 40 + 900 * math.exp(-12 * part) * (1 + noise * random.Random(step).random()),
        "losses/l1_loss": 12.0,
        "losses/overall_loss": 100 + 900 * math.exp(-12 * part) * (1 + noise * random.Random(step).random()),
        "metrics/explained_variance": ev,
        "metrics/l0": 30 + 300 * math.exp(-15 * part) * (1 + noise * random.Random(step + 1).random()),
        "sparsity/dead_features": float(max(0, round(100 * part - 20))),
        "details/current_learning_rate": 1e-3 * min(1.0, 10 * part),
        "details/current_l1_coefficient": 5.0 * min(1.0, 5 * part),
        "details/n_training_tokens": tokens,
        "plots/feature_density_line_chart": {"counts": [1, 2], "edges": [0.0, 1.0, 2.0]},
        **more,
    }


EVALS = {
    "evals/explained_variance": 0.812, "evals/l0": 31.5, "evals/ce_recovered": 0.943, "evals/mse": 41.0,
    "evals/ce_loss_without_sae": 3.5, "evals/ce_loss_with_sae": 4.1, "evals/ce_loss_with_ablation": 13.7,
    "evals/never_fired": 3.0, "evals/n_tokens": 8192.0,
}  # fmt: skip


def records(steps: int = 100, batch: int = 1000, *, of: int | None = None, evals: int = 0, **more: Any) -> list[Any]:
    """Lines of a run of ``steps`` steps; evals every ``evals`` steps and at the end, -1: none at all."""
    total = (of or steps) * batch
    found = []
    for step in range(1, steps + 1):
        line = record_of(step, step * batch, total, **more)
        if evals > 0 and step % evals == 0:
            line |= EVALS | {"evals/explained_variance": line["metrics/explained_variance"] - 0.03}
        found.append(line)
    if evals >= 0:
        found.append({"step": steps, "seconds": 0.05 * steps + 1, **EVALS})
    return found


def lines_of(made: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in made)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def write_run(
    folder: Path,
    made: Sequence[Mapping[str, Any]] | None = None,
    *,
    end: str | None = "finished",
    reason: str = "",
    options: Mapping[str, Any] | None = None,
    sae: bool = True,
) -> Path:
    """A run of one SAE in ``folder``; ``end`` None: it is at work, or was killed."""
    write_home(folder, records() if made is None else made, options or {}, sae=sae)
    write_record(folder, {"sae": "."}, end, reason)
    return folder


def write_home(home: Path, made: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, sae: bool = True) -> None:
    home.mkdir(parents=True, exist_ok=True)
    table = merged(OPTIONS, options)
    (home / "config.toml").write_text(tomli_w.dumps(table))
    (home / "metrics.jsonl").write_text(lines_of(made))
    if sae:
        (home / "sae").mkdir(exist_ok=True)
        (home / "sae/cfg.json").write_text(json.dumps({"d_sae": table["sae"].get("d_sae", 64), "d_in": 128}))


def write_record(
    folder: Path, saes: Mapping[str, str], end: str | None, reason: str = "", diverged: Mapping[str, str] | None = None
) -> None:
    table: dict[str, Any] = {"format": 1, "saes": dict(saes), "in_memory": []}
    if end is not None:
        table["end"] = {"status": end, "reason": reason, "diverged": dict(diverged or {})}
    (folder / "run.json").write_text(json.dumps(table))


def write_sweep(
    folder: Path,
    points: Mapping[str, Mapping[str, Any]],
    *,
    end: str | None = "finished",
    diverged: Mapping[str, str] | None = None,
    steps: int = 60,
) -> Path:
    """A sweep: ``points`` are the options of each SAE by its name; the larger λ, the fewer features fire."""
    trained = records(steps)
    for name, options in points.items():
        lam = merged(OPTIONS, options)["sae"].get("l1_coefficient", 5.0)
        lr = merged(OPTIONS, options)["training"]["lr"]
        l0, ev = 120 / lam**0.9 * (1 + 40 * lr), 0.95 - 0.055 * lam**0.7 - 9 * lr
        last = {"evals/l0": l0, "evals/explained_variance": ev, "evals/ce_recovered": min(ev + 0.08, 0.99)}
        made = [*trained[:-1], trained[-1] | last]
        write_home(folder / name, made[: steps // 3] if name in (diverged or {}) else made, options)
    write_record(folder, {name: name for name in points}, end, diverged=diverged)
    return folder
