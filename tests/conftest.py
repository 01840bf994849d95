"""Fixtures of the whole suite."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
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

# Their assertions tell what they found, as those of the tests do.
pytest.register_assert_rewrite("support")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than processors (``-n auto``): a test that waits for a process that it started does nothing itself."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What libraries and tests are made of stays, so that nobody looks for garbage in it: neither now nor later."""
    # While it is imported it looks through all that there is, for who holds random numbers; it always is, at the end.
    from hypothesis import settings

    settings.register_profile("saekit", deadline=None)  # nothing fails for being slow
    settings.load_profile("saekit")
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


_OF_SHORT_RUNS = (
    "ignore:.*wrong site, scale or model:RuntimeWarning",  # what runs of a few steps may well be asked
    "ignore:.*on held-out text .* features of the SAE at .* are active on a token:RuntimeWarning",
    "ignore:.*the model's own loss is .*hardly better than guessing",  # as random models do
)
_NOT_OF_RUNS = {"analysis", "config", "evals", "plugins", "splicing", "testing"}
"""Folders whose tests say themselves where they expect these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that train for a few steps are not asked whether the SAE is of this model."""
    here = Path(__file__).parent
    marks = [pytest.mark.filterwarnings(line) for line in _OF_SHORT_RUNS]

    @cache
    def of_runs(path: Path) -> bool:
        return path.is_relative_to(here) and path.relative_to(here).parts[0] not in _NOT_OF_RUNS

    for item in items:
        if of_runs(item.path):
            for mark in marks:
                item.add_marker(mark)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parameters of :func:`way` and :func:`device`; torch is imported only where it is wanted."""
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", ["fast", "reference"], indirect=True)
    if "device" in metafunc.fixturenames:
        import torch

        metafunc.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever trains, trains by the fast kernels and by plain torch.

    It is the way that every SAE of this process goes which is not told another: in float64, too.
    """
    from saekit import SAE

    def auto(sae: Any) -> str:
        return str(vars(sae).get("kernels_asked_for", request.param))

    def ask(sae: Any, kernels: str) -> None:
        if kernels != "auto":
            vars(sae)["kernels_asked_for"] = kernels

    monkeypatch.setattr(SAE, "kernels", property(auto, ask))
    return str(request.param)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    return str(request.param)


@pytest.fixture
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans try batches for a moment: for tests that do not ask how long they take."""
    monkeypatch.setattr("saekit.planning.rehearsal._SECONDS", 0.05)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[int]:
    """Small tensors are no work for several, which would wait for each other.  Gives how many there were."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture
def several_threads(one_thread: int) -> Iterator[None]:
    """As many as ever, for one test of a module that asks for :func:`one_thread`."""
    import torch

    torch.set_num_threads(one_thread)
    yield
    torch.set_num_threads(1)
