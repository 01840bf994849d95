"""Rows of the summary of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def row(number: int, options: Mapping[str, Any], l0: float | None, ev: float | None, **more: Any) -> dict[str, Any]:
    name = "_".join([str(number), *(f"{path.rpartition('.')[2]}={value}" for path, value in options.items())])
    return {
        "name": name, **options, "l0": l0, "explained_variance": ev, "ce_recovered": ev, "mse": 12.5,
        "dead_features": 3.0, "tokens": 2000, "status": "trained", **more,
    }  # fmt: skip


GRID = [
    row(n, {"sae.l1_coefficient": l1, "training.lr": lr}, 100 / l1 + n, 0.9 - l1 / 20)
    for n, (l1, lr) in enumerate((l1, lr) for l1 in (0.5, 1.0, 2.0, 5.0) for lr in (1e-4, 3e-4))
]
DIVERGED = dict.fromkeys(("l0", "explained_variance", "ce_recovered", "mse", "dead_features")) | {"status": "diverged"}
