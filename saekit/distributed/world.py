"""All processes of a run: which this one is, and in what groups they work.

``torchrun`` starts them and tells each its number in its environment; the only place that makes process groups is
:func:`open_world`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from saekit.config import DistributedConfig, TrainConfig
from saekit.distributed.agreement import by_first
from saekit.distributed.group import Group, JoinedGroup, MetGroup
from saekit.distributed.launched import Launched, check_mesh
from saekit.distributed.patience import Meeting, Patience
from saekit.distributed.share import WHOLE, Share
from saekit.distributed.telling import Telling

__all__ = ["ALONE", "World", "before_others", "open_world", "trains_on_cuda", "uses_cuda"]

_STORES: dict[tuple[str | None, ...], Any] = {}
"""What the processes of this one's launch write to, by how it was launched; opened once, for all worlds."""
_OPENED = itertools.count()
"""So that a world reads nothing of one that was before it."""


@attrs.frozen(eq=False)
class World:
    """The processes of a run, ``data × features``: process ``d · features + f`` has rows ``d``, features ``f``.

    Or, in a sweep, ``data × saes``: those with the same rows have whole SAEs, each some of them.
    """

    all: Group = attrs.field(factory=Group)
    """Every process."""
    data: Group = attrs.field(factory=Group)
    """Those with the same features, among which batches are split."""
    features: Group = attrs.field(factory=Group)
    """Those with the same rows, among which features are split."""
    behind: Group = attrs.field(factory=Group)
    """Every process, for what threads tell each other while the loops speak in the other groups."""

    telling: Telling = attrs.field(factory=Telling)
    """What they tell each other although some have gone."""
    saes: Group = attrs.field(factory=Group)
    """Those with the same rows, over which the SAEs of a sweep are laid out."""

    @contextlib.contextmanager
    def accounted(self) -> Iterator[None]:
        """What ends this process is told to the others, and where it is that another has gone, which one and why."""
        try:
            yield
        except BaseException as error:
            self.telling.account(error)
            raise

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.all.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.all.size

    @property
    def main(self) -> bool:
        """Whether it is this process that writes, logs and shows."""
        return self.all.rank == 0

    @functools.cached_property
    def column(self) -> World:
        """The processes that train the same SAEs as this one: all, but where SAEs are laid out over processes."""
        return self if self.saes.size == 1 else World(self.data, self.data)

    def share(self, counts: tuple[int, ...] = ()) -> Share:
        """This process's part of a step whose batch has so many rows in each data group.

        Empty: every group has the same rows, which are the whole batch.
        """
        if self.size == 1:
            return WHOLE
        return Share(self.data if counts else Group(), self.features, counts if self.data.size > 1 else ())


ALONE = World()
"""One process."""


def trains_on_cuda(config: TrainConfig) -> bool:
    """Whether its SAEs train on GPUs of NVIDIA's."""
    return uses_cuda(config.training.device)


def uses_cuda(device: str) -> bool:
    """Whether ``device``, as options have it, is a GPU of NVIDIA's."""
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


@contextlib.contextmanager
def open_world(config: DistributedConfig, *, cuda: bool = False) -> Iterator[World]:
    """The processes that ``torchrun`` has started, as ``config`` arranges them; one process is :data:`ALONE`.

    Where some other code has made the process group, that is used, and stays.  When the context ends, so do the groups
    of the world: what asks one then gets an error.  :class:`saekit.errors.ConfigError` for numbers that do not fit.
    """
    launched = Launched.here(os.environ)
    data, width = check_mesh(config, launched)
    if launched.size == 1:
        yield ALONE
        return
    with contextlib.ExitStack() as ends:
        with _ended_by_signals():
            world = _joined(launched, data, width, config, ends, cuda=cuda)
        if config.saes > 1:
            world = attrs.evolve(world, features=Group(), saes=world.features)
        with world.telling.until_the_end():
            yield world


def _joined(
    launched: Launched,
    data: int,
    features: int,
    config: DistributedConfig,
    ends: contextlib.ExitStack,
    *,
    cuda: bool,
) -> World:
    """Meet the other processes, and make all groups; each step waits for all of them.

    ``ends`` lets go of them, whoever still has the world or a part of it: threads of the engine run as long as they
    are there.
    """
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    if cuda:
        torch.cuda.set_device(launched.local_rank)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    store, new_group = _engine(launched, timeout, ends, cuda=cuda)
    patience = None if store is None else Patience(store, launched.rank, config.timeout_s, config.stuck_s)

    def joined_by(name: str, group: Any) -> JoinedGroup:
        ranks = torch.distributed.get_process_group_ranks(group)
        meeting = None if patience is None else Meeting(patience, f"{name}-{ranks[0]}", ranks)
        found = JoinedGroup(group, meeting)
        ends.callback(found.close)
        return found

    order = torch.arange(launched.size).view(data, features)
    groups = {}
    for name, lines in (("data", order.T), ("features", order)):
        made = [new_group(line.tolist()) for line in lines]
        place = next(number for number, line in enumerate(lines) if launched.rank in line)
        groups[name] = made[place]
    mesh = DeviceMesh.from_group(
        [groups["data"], groups["features"]], "cuda" if cuda else "cpu", mesh=order, mesh_dim_names=tuple(groups)
    )
    several = [name for number, name in enumerate(groups) if order.shape[number] > 1]
    joined = {name: joined_by(name, mesh.get_group(name)) for name in several}
    every, behind = joined_by("all", new_group()), joined_by("behind", new_group(backend="gloo"))
    if patience is not None:
        ends.enter_context(patience.beating())
    data_group, features_group = (joined.get(name, Group()) for name in groups)
    telling = Telling(store, launched.rank, launched.size)
    return World(every, data_group, features_group, behind, telling)


def _engine(
    launched: Launched, timeout: datetime.timedelta, ends: contextlib.ExitStack, *, cuda: bool
) -> tuple[Any, Callable[..., Any]]:
    """The store of the processes, if their group is made here, and what makes further groups of some of them."""
    import torch.distributed as dist

    if dist.is_initialized():

        def new_group(*ranks: Any, **options: Any) -> Any:
            made = dist.new_group(*ranks, **{**options, "timeout": timeout})
            ends.callback(dist.destroy_process_group, made)
            return made

        return None, new_group
    engine: Any = dist  # of which not all is typed
    store, number = _store(launched, timeout), next(_OPENED)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=timeout,
        store=engine.PrefixStore(f"torch-{number}", store),
        rank=launched.rank,
        world_size=launched.size,
    )
    ends.callback(dist.destroy_process_group)  # with all that are made of it
    return engine.PrefixStore(f"saekit-{number}", store), functools.partial(dist.new_group, timeout=timeout)


def _store(launched: Launched, timeout: datetime.timedelta) -> Any:
    """Of torch's, for all processes of the launch."""
    import torch.distributed as dist

    engine: Any = dist
    known = tuple(map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")))
    if known not in _STORES:
        found = next(iter(engine.rendezvous("env://", launched.rank, launched.size, timeout=timeout)))
        _STORES[known] = found[0]
    _STORES[known].set_timeout(timeout)  # it may have been opened for a run with another
    return _STORES[known]


def before_others(work: Callable[[], None], config: DistributedConfig) -> None:
    """Have the first of the processes that ``torchrun`` has started do ``work`` before any of them goes on.

    They need not be in a world yet, and wait as ``config`` says.  Where it fails, the others have
    :class:`StorageError`.
    """
    launched = Launched.here(os.environ)
    if launched.size == 1:
        work()
        return
    import torch.distributed as dist

    engine: Any = dist
    with contextlib.ExitStack() as ends:
        if dist.is_initialized():
            by_first(JoinedGroup(engine.group.WORLD), work)
            return
        with _ended_by_signals():
            store = _store(launched, datetime.timedelta(seconds=config.timeout_s))
        prefix = engine.PrefixStore(f"before-{next(_OPENED)}", store)
        patience = Patience(prefix, launched.rank, config.timeout_s, config.stuck_s)
        ends.enter_context(patience.beating())
        by_first(MetGroup(launched.rank, Meeting(patience, "all", range(launched.size))), work)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process where they come, as if nobody handled them; what is ignored stays so.

    Python handles a signal when torch returns, and to make a group torch waits for the others: for one that has gone,
    until the timeout.  Nothing has been written by then.
    """
    previous: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    previous[number] = handler
                    signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
