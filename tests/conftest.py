"""Fixtures of the whole suite."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import sys
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

from support import disk  # noqa: E402

disk.wait_no_more()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than processors (``-n auto``): a test that waits for a process that it started does nothing itself."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What libraries and tests are made of stays, so that nobody looks for garbage in it: neither now nor later.

    Rewriting the assertions of a clean checkout takes longer than all else here.  Each of several workers does so for
    some of the files before it comes to the rest, which the others have written meanwhile.
    """
    # While it is imported it looks through all that there is, for who holds random numbers; it always is, at the end.
    from hypothesis import settings

    settings.register_profile("saekit", deadline=None)  # nothing fails for being slow
    settings.load_profile("saekit")
    gc.disable()
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    for path in _own_share(session.config):
        with contextlib.suppress(Exception, pytest.skip.Exception, session.CollectError):
            _ = pytest.Module.from_parent(session, path=path).obj  # what is wrong is told when it is collected
    yield
    sys.dont_write_bytecode = writes_none
    gc.freeze()
    gc.enable()


def _own_share(config: pytest.Config) -> list[Path]:
    """The files of tests that this worker imports first; none where nobody works beside it."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return []
    asked = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    files = {file for path in asked for file in (path.rglob("test_*.py") if path.is_dir() else [path])}
    return sorted(files)[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) :: workers]


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
