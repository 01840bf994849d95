"""Fixtures of the whole suite."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

import pytest

# No test reaches a hub: a miss would cost half a minute each, and machines without a network must pass.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
# Workers that run side by side share the processors; processes that tests start do as their worker does.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
# Nor does one leave anything in the cache of whoever runs them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="saekit-hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

BOTH_WAYS = {
    "test_finetuning", "test_golden", "test_reference_faults", "test_sae_maths", "test_sweep", "test_topk",
    "test_training", "test_training_options",
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever trains, trains by the fast kernels and by plain torch; a process of its own does as it always does."""
    alone = metafunc.definition.get_closest_marker("own_process") is not None
    if metafunc.module.__name__ in BOTH_WAYS and not alone:
        metafunc.fixturenames.append("kernels")
        metafunc.parametrize("kernels", ["fast", "reference"], indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that every SAE of this process goes which is not told another: in float64, too."""
    from saekit.sae import SAE

    def auto(sae: Any) -> str:
        return str(vars(sae).get("kernels_asked_for", request.param))

    def ask(sae: Any, kernels: str) -> None:
        if kernels != "auto":
            vars(sae)["kernels_asked_for"] = kernels

    monkeypatch.setattr(SAE, "kernels", property(auto, ask))
    return str(request.param)
