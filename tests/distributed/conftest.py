"""Two processes, started once for all tests in this folder."""

from __future__ import annotations

from typing import Any

import pytest
from support.processes import Call, together
from support.spread_cases import CHOSEN, MESHES, SIZE, label


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By their labels, what each process made of every call."""
    folder = tmp_path_factory.mktemp("processes")
    calls = {
        label(name, data, features): Call("support.processes:steps", data, features, (case,))
        for data, features in MESHES
        for name, case in CHOSEN.items()
    }
    runs = "support.spread_runs"
    for data, features in MESHES if SIZE == 2 else []:
        calls |= {
            label("text", data, features): Call(f"{runs}:text", data, features),
            label("seeded", data, features): Call(f"{runs}:of_stranger", data, features, ("seeded",)),
            label("moody", data, features): Call(f"{runs}:of_stranger", data, features, ("moody",)),
            label("gain", data, features): Call(f"{runs}:of_strangers_architecture", data, features, (str(folder),)),
        }
        for name, changes in RUNS.items():
            place = str(folder / f"{name}-{data}x{features}")
            calls[label(name, data, features)] = Call(f"{runs}:run", data, features, (place, changes))
    return together(calls, SIZE, folder / "calls")


RUNS: dict[str, dict[str, Any]] = {
    "topk run": {"sae": {"name": "topk", "k": 3, "d_sae": 12}, "evals": {"every_n_steps": 4}},
    "odd batches": {"training": {"train_batch_size_tokens": 201}},
    "compiled": {"training": {"compile": True}},
}
