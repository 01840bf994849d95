"""Two real processes that work on something together, as those of a run do.

They are forks of this one, so that plugins need not be importable or picklable; each has one thread and the CPU alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from saekit.reasons import error_text
from saekit.testing.checks.check import Fault, NotTried

if TYPE_CHECKING:
    from saekit.distributed import World

__all__ = ["DATA", "FEATURES", "Mesh", "on_two"]

Mesh = tuple[int, int]
DATA, FEATURES = (2, 1), (1, 2)
"""Batches split over the two, and features split over them."""
_TIMEOUT, _PATIENCE, _BETWEEN, _MEETINGS = 30.0, 120.0, 0.005, 2
"""Seconds that one waits for the other, that both may take, and between looks whether they have ended; and how often
they are started where they do not meet: forks of a process with threads may lack a lock that they need."""


@attrs.frozen
class _Failed:
    """What one process says of its end."""

    text: str
    lost: bool
    """Whether it is that the other has gone."""
    met: bool = True
    """Whether they were at work by then."""


def on_two(works: Mapping[Mesh, Callable[[World], Any]], place: Path) -> dict[Mesh, list[Any]]:
    """What both processes made of each work, in a world of its mesh; files of their own go into ``place``.

    What is made must be picklable.  A :class:`Fault` says what one raised, or that both did not end; what a work
    refuses by :class:`NotTried` is not tried.
    """
    if not hasattr(os, "fork"):
        raise NotTried("processes cannot be forked here")
    for _ in range(_MEETINGS):
        folder = Path(tempfile.mkdtemp(dir=place))
        children = [_started(rank, works, folder) for rank in range(2)]
        codes = _waited_for(children)
        found = [_read(folder, rank, code) for rank, code in enumerate(codes)]
        failures = [one for one in found if isinstance(one, (_Failed, NotTried))]
        if not any(isinstance(one, _Failed) and not one.met for one in failures):
            break
    if refused := next((one for one in failures if isinstance(one, NotTried)), None):
        raise refused
    if failures:
        cause = min((one for one in failures if isinstance(one, _Failed)), key=lambda one: one.lost)
        raise Fault(cause.text)
    return {mesh: [one[mesh] for one in found] for mesh in works}


def _started(rank: int, works: Mapping[Mesh, Callable[[World], Any]], folder: Path) -> int:
    """A fork that does all of it; tells its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of Python warn of threads, none of which goes on in a fork
        child = os.fork()
    if not child:
        _work(rank, works, folder)
    return child


def _work(rank: int, works: Mapping[Mesh, Callable[[World], Any]], folder: Path) -> NoReturn:
    """What a fork does, all its life; nothing of the process that it was is left to end it."""
    try:
        faulthandler.disable()  # it would write where the process that it was does
        told = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(told, 1)
        os.dup2(told, 2)
        found = _made(rank, works, folder)
        _write(folder, rank, found)
    except BaseException as error:
        _write(folder, rank, _Failed(error_text(error), lost=False, met=False))
    finally:
        os._exit(0)


def _write(folder: Path, rank: int, found: Any) -> None:
    """By torch, which is quick with many tensors; a pickle of its own has a whole file for each."""
    import torch

    torch.save(found, folder / f"{rank}.pt")


def _made(rank: int, works: Mapping[Mesh, Callable[[World], Any]], folder: Path) -> Any:
    import datetime

    import torch
    import torch.distributed as dist

    from saekit.config import DistributedConfig
    from saekit.distributed import open_world
    from saekit.errors import LostProcessError

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    timeout = datetime.timedelta(seconds=_TIMEOUT)
    where = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timeout)
    found: dict[Mesh, Any] = {}
    for mesh, work in works.items():
        data, features = mesh
        with open_world(DistributedConfig(data=data, features=features, timeout_s=_TIMEOUT)) as world:
            try:
                found[mesh] = work(world)
            except NotTried as reason:
                return reason
            except Fault as fault:
                return _Failed(str(fault), lost=False)
            except LostProcessError as error:
                return _Failed(f"process {rank} waits for what the other does not tell: {error_text(error)}", lost=True)
            except BaseException as error:
                return _Failed(f"in process {rank} of two it raised {error_text(error)}", lost=False)
    return found


def _waited_for(children: list[int]) -> list[int | None]:
    """Their exit codes; those that take too long are killed: None."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + _PATIENCE
    while left := [child for child in children if child not in codes]:
        for child in left:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = None
        time.sleep(_BETWEEN)
    return [codes[child] for child in children]


def _read(folder: Path, rank: int, code: int | None) -> Any:
    import torch

    file = folder / f"{rank}.pt"
    if code == 0 and file.is_file():
        return torch.load(file, weights_only=False)
    if code is None:
        return _Failed(f"process {rank} of two has not ended after {_PATIENCE:.0f} s", lost=True)
    said = (folder / f"{rank}.txt").read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
    return _Failed(f"process {rank} of two ended with {code}, and said {said[0]!r}", lost=False)
